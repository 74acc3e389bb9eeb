"""Causal grouped-query attention with rotary positions, its masks, and the key/value cache of generation.

Letters here besides the legend: ``Q`` query positions, ``M`` key positions (cache and queries), ``P`` width of a
head, ``J`` key/value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epmoe.config import ModelConfig
from epmoe.errors import EpmoeError
from epmoe.models.accelerators import HALF, Accelerators
from epmoe.models.layers import Linear, RMSNorm
from epmoe.moe.recompute import Remake, plain
from epmoe.types import compute_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """What every block's attention needs besides its vectors; made once per forward pass."""

    cos_QP: Tensor
    """Cosines of the rotary angles, in the compute dtype."""
    sin_QP: Tensor
    """Sines, likewise."""
    mask_QM: Tensor | None
    """bool ``[Q, M]`` or ``[B, 1, Q, M]``, True = may look; None = causal, or everything for a single query."""


class KVCache:
    """Keys and values of the tokens a model has already seen, per layer.

    The memory for ``max_length`` tokens is taken once, on the first forward pass, which also decides batch size,
    dtype and device; afterwards nothing is allocated and nothing is copied.

    Args:
        config: The model's; says how many layers there are.
        max_length: Tokens the cache can hold.
    """

    def __init__(self, config: ModelConfig, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        """Tokens seen so far: the position of the next one."""
        self._keys: list[Tensor | None] = [None] * config.num_layers
        self._values: list[Tensor | None] = [None] * config.num_layers

    def check_room(self, num_tokens: int) -> None:
        """Refuses tokens that do not fit.

        Raises:
            EpmoeError: If ``num_tokens`` more tokens exceed ``max_length``.
        """
        if self.length + num_tokens > self.max_length:
            raise EpmoeError(
                f"the key/value cache holds {self.max_length} tokens, got {self.length} + {num_tokens}",
                fix=f"make it with max_length >= {self.length + num_tokens}",
            )

    def extend(self, layer: int, key_BJQP: Tensor, value_BJQP: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values -> all of them, ``[B, J, M, P]`` each (views of the cache)."""
        return self._append(self._keys, layer, key_BJQP), self._append(self._values, layer, value_BJQP)

    def advance(self, num_tokens: int) -> None:
        """Counts tokens that every layer has stored."""
        self.length += num_tokens

    def _append(self, store: list[Tensor | None], layer: int, new_BJQP: Tensor) -> Tensor:
        kept_BJMP = store[layer]
        if kept_BJMP is None:
            batch, heads, _, width = new_BJQP.shape
            kept_BJMP = store[layer] = new_BJQP.new_empty(batch, heads, self.max_length, width)
        end = self.length + new_BJQP.size(2)
        kept_BJMP[:, :, self.length : end] = new_BJQP
        return kept_BJMP[:, :, :end]


def rotary_table(
    length: int, head_size: int, theta: float, *, start: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[Q, P]`` of RoPE's angles at positions ``start .. start + length``. arXiv:2104.09864.

    Channel pair i of P/2 turns by ``position * theta^(-2i/P)`` radians. As in Llama, both halves of a head hold
    the same angles. Computed where it is used: no buffer, so nothing to lose on the meta device.
    """
    pair_P = torch.arange(0, head_size, 2, dtype=dtype, device=device)
    position_Q = torch.arange(start, start + length, dtype=dtype, device=device)
    angle_QP = position_Q[:, None] / theta ** (pair_P / head_size)
    angle_QP = torch.cat([angle_QP, angle_QP], dim=-1)
    return angle_QP.cos(), angle_QP.sin()


def apply_rotary(x_BHQP: Tensor, cos_QP: Tensor, sin_QP: Tensor) -> Tensor:
    """Turns the pairs (i, i + P/2) of every head by the table's angles, in the table's dtype -> x's dtype."""
    wide_BHQP = x_BHQP.to(cos_QP.dtype)
    first_BHQP, second_BHQP = wide_BHQP.chunk(2, dim=-1)
    turned_BHQP = torch.cat([-second_BHQP, first_BHQP], dim=-1)
    return (wide_BHQP * cos_QP + turned_BHQP * sin_QP).to(x_BHQP.dtype)


def attention_inputs(
    config: ModelConfig, x_BSD: Tensor, *, start: int = 0, segment_BS: Tensor | None = None
) -> AttentionInputs:
    """Rotary table and mask for tokens at positions ``start .. start + S``.

    Args:
        config: The model's.
        x_BSD: The embedded tokens; gives length, dtype and device.
        start: Tokens already in the cache.
        segment_BS: Documents; given, no token looks into another one.
    """
    length, device = x_BSD.size(1), x_BSD.device
    cos_QP, sin_QP = rotary_table(
        length,
        config.head_size,
        config.rope_theta,
        start=start,
        dtype=compute_dtype(x_BSD.dtype),
        device=device,
    )
    # Without a mask F.scaled_dot_product_attention may pick a kernel that never writes a [Q, M] matrix.
    if segment_BS is None and (start == 0 or length == 1):
        return AttentionInputs(cos_QP=cos_QP, sin_QP=sin_QP, mask_QM=None)
    mask_QM = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
    if segment_BS is not None:
        segment_BS = segment_BS.to(device)
        mask_QM = (mask_QM & (segment_BS[:, :, None] == segment_BS[:, None, :])).unsqueeze(1)
    return AttentionInputs(cos_QP=cos_QP, sin_QP=sin_QP, mask_QM=mask_QM)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245): query head h reads key/value head ``h // (H / J)``.

    With ``qk_norm`` the queries and keys of every head pass an RMSNorm before they are turned (Qwen3).
    """

    def __init__(self, config: ModelConfig, *, layer: int, accelerators: Accelerators | None = None) -> None:
        super().__init__()
        accelerators = accelerators or Accelerators()
        self.layer = layer
        self.attend = accelerators.attend
        self.head_size = config.head_size
        self.grouped = config.kv_heads != config.num_heads
        self.q_proj = Linear(config.d_model, config.num_heads * config.head_size)
        self.k_proj = Linear(config.d_model, config.kv_heads * config.head_size)
        self.v_proj = Linear(config.d_model, config.kv_heads * config.head_size)
        self.o_proj = Linear(config.num_heads * config.head_size, config.d_model)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.norm_eps, accelerators.rms_norm)
            self.k_norm = RMSNorm(config.head_size, config.norm_eps, accelerators.rms_norm)

    def forward(
        self,
        x_BSD: Tensor,
        inputs: AttentionInputs,
        cache: KVCache | None = None,
        remake: Remake = plain,
    ) -> Tensor:
        """x ``[B, S, D]`` -> ``[B, S, D]``; ``remake`` computes what need not be kept."""
        query_BHQP = self._heads(self.q_proj(x_BSD, remake), self.q_norm)
        key_BJMP = self._heads(self.k_proj(x_BSD, remake), self.k_norm)
        value_BJMP = self._heads(self.v_proj(x_BSD, remake), None)
        query_BHQP = apply_rotary(query_BHQP, inputs.cos_QP, inputs.sin_QP)
        key_BJMP = apply_rotary(key_BJMP, inputs.cos_QP, inputs.sin_QP)
        if cache is not None:
            key_BJMP, value_BJMP = cache.extend(self.layer, key_BJMP, value_BJMP)
        # Every kernel behind these calls keeps the softmax's maximum and sum in float32 or better.
        if self.attend and cache is None and inputs.mask_QM is None and query_BHQP.dtype in HALF:
            mixed_BHQP = self.attend(query_BHQP, key_BJMP, value_BJMP)
        else:
            mixed_BHQP = F.scaled_dot_product_attention(
                query_BHQP,
                key_BJMP,
                value_BJMP,
                attn_mask=inputs.mask_QM,
                is_causal=inputs.mask_QM is None and query_BHQP.size(2) > 1,
                enable_gqa=self.grouped,
            )
        out_BSD: Tensor = self.o_proj(mixed_BHQP.transpose(1, 2).flatten(2))
        return out_BSD

    def _heads(self, x_BSX: Tensor, norm: RMSNorm | None) -> Tensor:
        """Splits heads, normalises them if asked -> ``[B, heads, S, P]``."""
        heads_BSHP: Tensor = x_BSX.unflatten(-1, (-1, self.head_size))
        if norm is not None:
            heads_BSHP = norm(heads_BSHP)
        return heads_BSHP.transpose(1, 2)
