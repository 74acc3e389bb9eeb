"""Kernels of other packages that a run may use: flash-attn's attention and parts of NVIDIA apex. None is needed.

A package is imported only when a configuration asks for it and the device could run it. Then it computes one small
example, so that a build for another GPU or another torch is found out at the start and not in the first step. Why a
package is not used is kept as text, with the error of its import as it was raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from epmoe.config import ModelConfig
from epmoe.errors import ConfigError
from epmoe.types import compute_dtype

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention: query ``[B, H, S, P]``, key and value ``[B, J, S, P]`` -> ``[B, H, S, P]``."""
RMSNormFunction = Callable[[Tensor, Tensor, float], Tensor]
"""x ``[..., D]``, weight ``[D]``, eps -> ``[..., D]`` in the dtype of x."""
HALF = (torch.float16, torch.bfloat16)
"""Dtypes flash-attn computes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """What a model computes with other packages; by default nothing."""

    attend: Attend | None = None
    """Attention in fp16 or bf16 where there is neither a mask nor a cache; None = SDPA."""
    rms_norm: RMSNormFunction | None = None
    """None = PyTorch's."""
    note: str = ""
    """What ``attention: auto`` became and why, in one line; empty where the configuration left no choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashLibrary:
    """A generation of flash-attn and what its kernels accept, forward and backward."""

    name: str
    module: str
    """Where ``flash_attn_func`` is. All of them take ``[B, S, heads, P]``; some return a tuple."""
    oldest: tuple[int, int]
    """First compute capability it runs on."""
    before: tuple[int, int] | None
    """First one it does not know any more; None = no limit."""
    max_head: int
    """Widest head, P. Narrower ones come in multiples of 8."""

    @property
    def package(self) -> str:
        """The top-level module."""
        return self.module.partition(".")[0]


FLASH_LIBRARIES = (
    FlashLibrary(
        name="flash-attn 3", module="flash_attn_interface", oldest=(9, 0), before=(10, 0), max_head=256
    ),
    FlashLibrary(name="flash-attn 4", module="flash_attn.cute", oldest=(9, 0), before=(12, 0), max_head=128),
    FlashLibrary(name="flash-attn 2", module="flash_attn", oldest=(8, 0), before=None, max_head=256),
)
"""Best first on the GPUs they share: 3 is written for Hopper, 4 for Blackwell, 2 for everything since Ampere."""


def choose_accelerators(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype, cross_document: bool = True
) -> Accelerators:
    """Finds what ``model.attention`` and ``model.norm`` ask for.

    Args:
        config: The model's.
        device: Where the model will run.
        dtype: In which it multiplies matrices; bfloat16 under autocast.
        cross_document: False = a mask keeps the documents apart.

    Raises:
        ConfigError: ``flash`` or ``apex`` is asked for and is not available.
    """
    attend, note, rms_norm = None, "", None
    if config.attention != "sdpa":
        found = _find_flash(config, device, dtype, cross_document)
        if isinstance(found, str) and config.attention == "flash":
            raise ConfigError(
                "model.attention=flash is not available",
                why=found,
                fix="model.attention=auto, which takes PyTorch's SDPA then; or install flash-attn for this GPU and "
                "this torch: pip install flash-attn --no-build-isolation",
            )
        attend, note = (None, f"sdpa ({found})") if isinstance(found, str) else (found[0], found[1].name)
    if config.norm == "apex":
        example = torch.ones(2, 8, device=device, dtype=dtype)
        function = load_apex(
            "normalization.fused_layer_norm",
            "fused_rms_norm_affine",
            lambda loaded: float(apex_rms_norm(loaded)(example, example[0], config.norm_eps).sum()),
            device=device,
            asked="model.norm=apex",
            instead="model.norm=torch",
        )
        rms_norm = apex_rms_norm(function)
    note = note if config.attention == "auto" else ""
    return Accelerators(attend=attend, rms_norm=rms_norm, note=note)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU, e.g. (9, 0) for Hopper; None of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


# ------------------------------------------------------------------------------------------- flash-attn
def _find_flash(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, cross_document: bool
) -> tuple[Attend, FlashLibrary] | str:
    """The best flash-attn that works here, or why there is none."""
    capability = compute_capability(device)
    if capability is None:
        return f"flash-attn needs a GPU, this is {device.type}"
    if dtype not in HALF:
        name = str(dtype).removeprefix("torch.")
        return f"flash-attn computes in bfloat16 or float16, this is {name}: see train.precision"
    if not cross_document:
        return "data.cross_document=false keeps documents apart by a mask, which flash-attn does not take"
    reasons = []
    for library in FLASH_LIBRARIES:
        found = _try_flash(library, capability, config, device, dtype)
        if not isinstance(found, str):
            return found, library
        if found:
            reasons.append(f"{library.name}: {found}")
    return "; ".join(reasons) or "flash-attn is not installed"


def _try_flash(
    library: FlashLibrary,
    capability: tuple[int, int],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Attend | str:
    """The library's attention, or why not; no reason ("") when it is not installed."""
    if find_spec(library.package) is None:
        return ""
    if capability < library.oldest or (library.before and capability >= library.before):
        below = f" and below {_dotted(library.before)}" if library.before else ""
        return f"runs on compute capability {_dotted(library.oldest)}{below}, not on {_dotted(capability)}"
    if config.head_size > library.max_head or config.head_size % 8:
        return f"heads are multiples of 8 up to {library.max_head} wide, not {config.head_size}"
    try:
        attend = flash_attention(import_module(library.module).flash_attn_func)
        _run_example(attend, config, device, dtype)
    except ModuleNotFoundError as error:
        return "" if error.name in (library.package, library.module) else _told(error)
    except Exception as error:  # whatever a build for another machine raises
        return _told(error)
    return attend


def flash_is_installed() -> bool:
    """Whether any generation is there, by looking and not by importing."""
    return any(find_spec(library.package) for library in FLASH_LIBRARIES)


def flash_attention(function: Callable[..., Any]) -> Attend:
    """A ``flash_attn_func``, which has heads after positions, as an ``Attend``."""

    def attend(query_BHSP: Tensor, key_BJSP: Tensor, value_BJSP: Tensor) -> Tensor:
        out = function(
            query_BHSP.transpose(1, 2), key_BJSP.transpose(1, 2), value_BJSP.transpose(1, 2), causal=True
        )
        # flash-attn 4 and early 3 return the log of the softmax's sum too
        out_BSHP: Tensor = out[0] if isinstance(out, tuple) else out
        return out_BSHP.transpose(1, 2)

    return attend


@torch.enable_grad()
def _run_example(attend: Attend, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of 8 tokens, waited for."""
    heads = (config.num_heads, config.kv_heads, config.kv_heads)
    example = [
        torch.zeros(1, count, 8, config.head_size, device=device, dtype=dtype, requires_grad=True)
        for count in heads
    ]
    attend(*example).sum().backward()
    float(torch.stack([tensor.grad.sum() for tensor in example if tensor.grad is not None]).sum())


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ------------------------------------------------------------------------------------------- apex
def find_apex() -> Literal["missing", "nvidia", "unrelated"]:
    """Which package called apex is installed, by its files: the package index has a web toolkit of that name, and
    importing that one fails in ways that explain nothing."""
    spec = find_spec("apex")
    if spec is None:
        return "missing"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "nvidia" if any((f / "optimizers" / "fused_adam.py").is_file() for f in folders) else "unrelated"


def load_apex(
    module: str,
    name: str,
    example: Callable[[Any], object],
    *,
    device: torch.device,
    asked: str,
    instead: str,
) -> Any:
    """Imports a part of NVIDIA apex and tries it out.

    Args:
        module: Below ``apex``.
        name: What is wanted of it.
        example: Computes something small with it.
        device: Where it will run.
        asked: The setting that wants it, ``key=value``,
        instead: and the one that does without.

    Raises:
        ConfigError: It is not available.
    """
    kind, fix = find_apex(), f"{instead}, which computes the same without apex"
    if kind == "unrelated":
        why = "the installed 'apex' is an unrelated web toolkit"
        fix = f"pip uninstall apex, and {fix}"
    elif kind == "missing":
        why = "NVIDIA apex is not installed"
    elif compute_capability(device) is None:
        why = f"NVIDIA apex needs a GPU, this is {device.type}"
    else:
        try:
            loaded = getattr(import_module(f"apex.{module}"), name)
            example(loaded)
        except Exception as error:  # whatever a build without its CUDA extensions raises
            why = _told(error)
        else:
            return loaded
    raise ConfigError(f"{asked} is not available", why=why, fix=fix)


def apex_rms_norm(function: Callable[..., Any]) -> RMSNormFunction:
    """apex's ``fused_rms_norm_affine`` as an ``RMSNormFunction``.

    Its sums are float32 whatever it is given, so x and weight of one dtype go in as they are; of two, both go in as
    float32. Under autocast it would round float32 values to bfloat16 first, so that is turned off around it.
    """

    def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        dtype = x_D.dtype if x_D.dtype == weight_D.dtype else compute_dtype(x_D.dtype)
        with torch.autocast(x_D.device.type, enabled=False):
            out_D: Tensor = function(x_D.to(dtype), weight_D.to(dtype), weight_D.shape, eps)
        return out_D.to(x_D.dtype)

    return rms_norm
