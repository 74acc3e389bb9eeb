"""Small packages with the signatures of flash-attn and NVIDIA apex, written to a folder and imported for real.

Attention is an exact softmax, FusedAdam keeps its state the way apex does, and the norm casts under autocast as apex's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epmoe.models import accelerators

NAMES = ("flash_attn", "flash_attn_interface", "apex", "amp_C")
HOPPER, BLACKWELL, AMPERE, TURING = (9, 0), (10, 0), (8, 0), (7, 5)

_SOFTMAX = """
import torch

calls = []


def _attention(q, k, v, softmax_scale, causal):
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    batch, length, heads, width = q.shape
    assert k.shape == v.shape == (batch, length, k.shape[2], width) and heads % k.shape[2] == 0
    calls.append(tuple(q.shape))
    k, v = (x.float().repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhp,bmhp->bhqm", q.float(), k) * (softmax_scale or width**-0.5)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return torch.einsum("bhqm,bmhp->bqhp", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1)
"""
_FLASH = {
    2: '''
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return _attention(q, k, v, softmax_scale, causal)[0]
''',
    3: '''
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    return _attention(q, k, v, softmax_scale, causal)[0]
''',
    4: '''
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, return_lse=False):
    return _attention(q, k, v, softmax_scale, causal)
''',
}  # fmt: skip
_FILES = {2: "flash_attn/__init__.py", 3: "flash_attn_interface.py", 4: "flash_attn/cute/__init__.py"}

_FUSED_ADAM = """
import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        assert adam_w_mode and not amsgrad and not capturable
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p).float()
                    state["exp_avg_sq"] = torch.zeros_like(p).float()
                m, v, grad = state["exp_avg"], state["exp_avg_sq"], p.grad.float()
                m.copy_(beta1 * m + (1 - beta1) * grad)
                v.copy_(beta2 * v + (1 - beta2) * grad * grad)
                denominator = (v / (1 - beta2**step)).sqrt() + group["eps"]
                update = m / (1 - beta1**step) / denominator + group["weight_decay"] * p
                p.sub_(group["lr"] * update)
"""
_NORM = """
import torch

calls = []


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    if torch.is_autocast_enabled(input.device.type):
        input, weight = input.bfloat16(), weight.bfloat16()
    assert input.dtype == weight.dtype and tuple(normalized_shape) == tuple(weight.shape)
    calls.append(input.dtype)
    wide = input.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(input.dtype)
"""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Packages:
    """What is installed, in one folder that is first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def flash(self, *generations: int) -> None:
        """Installs these generations of flash-attn."""
        for generation in generations:
            _write(self.folder / _FILES[generation], _SOFTMAX + _FLASH[generation])

    def broken_flash(self, generation: int, body: str) -> None:
        """Installs one whose module holds this text."""
        _write(self.folder / _FILES[generation], body)

    def apex(self, fused_adam: str = _FUSED_ADAM, norm: str = _NORM) -> None:
        """Installs NVIDIA's apex."""
        _write(self.folder / "apex/__init__.py", "")
        _write(self.folder / "apex/optimizers/fused_adam.py", fused_adam)
        _write(self.folder / "apex/optimizers/__init__.py", "from .fused_adam import FusedAdam\n")
        _write(self.folder / "apex/normalization/__init__.py", "")
        _write(self.folder / "apex/normalization/fused_layer_norm.py", norm)

    def toolkit(self) -> None:
        """Installs the web toolkit of that name."""
        _write(self.folder / "apex/__init__.py", "raise SystemExit('the toolkit was imported')\n")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> torch.device:
    """The CPU, taken for a GPU of this compute capability: the one thing about these tests that is not real."""
    monkeypatch.setattr(accelerators, "compute_capability", lambda device: capability)
    return torch.device("cpu")
