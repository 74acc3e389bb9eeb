"""What this process runs on."""

from __future__ import annotations

import os
import platform
import socket
from typing import Any

import numpy
import torch

import epmoe


def software_versions() -> dict[str, str]:
    """Versions that matter for results."""
    return {
        "epmoe": epmoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda or "none",
    }


def hardware() -> dict[str, Any]:
    """The machine this rank runs on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
    }
