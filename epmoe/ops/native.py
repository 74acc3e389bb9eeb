"""Loads the native kernels, epmoe._C, when they are built, wanted and fit the running torch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from epmoe import env
from epmoe.errors import ConfigError

OLDEST_TORCH = "2.11"
"""Whose stable ABI the extension is compiled for, as in setup.py."""


def load_kernels() -> tuple[str, str]:
    """Registers the native kernels if that is possible -> (name of the kernels that serve, reason).

    The operators must be defined before. Where there are no native kernels the reference serves.

    Raises:
        ConfigError: ``EPMOE_KERNELS`` asks for something else than there is, or torch is too old for what was built.
    """
    wanted = env.kernels()
    if wanted not in ("auto", "reference"):
        raise ConfigError(
            f"EPMOE_KERNELS={wanted} must be auto or reference",
            why="native kernels are used wherever they can be loaded; plain PyTorch can be asked for instead",
            fix="unset EPMOE_KERNELS, or EPMOE_KERNELS=reference; `epmoe doctor` says which kernels serve",
        )
    if wanted == "reference":
        return "reference", "EPMOE_KERNELS=reference asks for plain PyTorch"
    if find_spec("epmoe._C") is None:
        return (
            "reference",
            "epmoe._C is not built: it needs torch and a C++ compiler at installation; "
            "`make build`, or pip install --no-build-isolation",
        )
    # The binary must not even be opened by an older torch: what it calls is not there.
    if torch.torch_version.TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise ConfigError(
            f"epmoe._C needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}",
            why=f"it is compiled for the stable ABI of torch {OLDEST_TORCH}, which an older one does not have",
            fix="install a newer torch, or EPMOE_KERNELS=reference for plain PyTorch",
        )
    try:
        extension = import_module("epmoe._C")
    except ImportError as error:
        return "reference", f"epmoe._C cannot be loaded into torch {torch.__version__}: {error}; rebuild it"
    cuda = extension.cuda_architectures
    devices = f"CPU and CUDA kernels (for {cuda})" if cuda else "CPU kernels"
    return "native", f"{devices}, built for torch {extension.torch_version}"
