"""``epmoe --version``: what is installed, without importing torch."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from epmoe import __version__


def versions() -> str:
    """Versions of epmoe, torch and CUDA, a line each."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return f"epmoe {__version__}\ntorch not installed\nCUDA  unknown"
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "of unknown version"
    return f"epmoe {__version__}\ntorch {torch}\nCUDA  {_cuda(Path(spec.origin).with_name('version.py'))}"


def _cuda(version_file: Path) -> str:
    """What torch was built with, from the file that torch itself reads it from."""
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    line = re.search(r"^cuda\b[^=\n]*= *(?:['\"](.+?)['\"]|None)", text, re.MULTILINE)
    if line is None:
        return "unknown"
    return line[1] or "none (CPU build)"
