"""Stateless random numbers: Philox4x32-10 (Salmon et al., SC 2011) keyed by what is drawn for whom.

A draw depends on (seed, stream, layer, sample number, position, lane) and on nothing else: not on the step, the
rank, the micro-batch or the world size. Every layout, device and recomputation therefore draws the same number.

    key      seed, low and high 32 bits
    counter  lane >> 2 | position | sample, low 32 bits | stream << 24 | layer << 8 | sample >> 32
    draw     (word[lane & 3] >> 8) * 2**-24, in [0, 1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from epmoe.ops.calls import ops

SECOND_EXPERT, JITTER, NOISE, GUMBEL, DROPOUT, PRIORITY, SMOOTHING, PROBE, EXPERT_DROPOUT = range(9)
"""Streams: what a number is drawn for."""

MAX_LAYER = 2**16
MAX_STREAM = 255

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words -> four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64; masking after the shift still leaves its true high word.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & MASK) ^ c1 ^ k0,
            product_1 & MASK,
            ((product_0 >> 32) & MASK) ^ c3 ^ k1,
            product_0 & MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniform(
    seed: int,
    stream: int,
    layer: int,
    sample_T: Tensor,
    position_T: Tensor,
    num_lanes: int,
    first_lane: int = 0,
) -> Tensor:
    """Draws in [0, 1) for every token and lane -> float32 ``[T, num_lanes]``, by the operator of that name.

    Args:
        seed: Any integer; its low 64 bits are the key.
        stream: What is drawn, one of this module's constants.
        layer: Layer (or other place in the model), below 65536.
        sample_T: int64 sample number of each token's sequence, in [0, 2**40); not checked, that would wait for the
            device.
        position_T: int64 position of each token in its sequence.
        num_lanes: Numbers per token,
        first_lane: from this lane on, a multiple of 4.

    Raises:
        ValueError: A number is out of range.
    """
    key = (seed + 2**63) % 2**64 - 2**63  # the same bits as a signed integer
    draws_TL: Tensor = ops.uniform(
        sample_T.long(), position_T.long(), key, stream, layer, num_lanes, first_lane
    )
    return draws_TL


def normal(
    seed: int,
    stream: int,
    layer: int,
    sample_T: Tensor,
    position_T: Tensor,
    num_lanes: int,
    first_lane: int = 0,
) -> Tensor:
    """Standard normal draws for every token and lane -> float64 ``[T, num_lanes]``. Arguments as for ``uniform``.

    Lanes 2i and 2i+1 are the Box-Muller transform of uniform lanes 2i and 2i+1, whose 24 bits put every draw within
    5.8 standard deviations.
    """
    num_pairs = (num_lanes + 1) // 2
    draws_TL = uniform(seed, stream, layer, sample_T, position_T, 2 * num_pairs, first_lane)
    radius_TQ, angle_TQ = draws_TL.double().unflatten(1, (num_pairs, 2)).unbind(-1)
    radius_TQ = (-2.0 * torch.log1p(-radius_TQ)).sqrt()
    angle_TQ = 2.0 * math.pi * angle_TQ
    pairs_TQ2 = torch.stack((radius_TQ * angle_TQ.cos(), radius_TQ * angle_TQ.sin()), dim=-1)
    return pairs_TQ2.flatten(1)[:, :num_lanes]


def gumbel(uniform_TX: Tensor) -> Tensor:
    """Standard Gumbel draws -ln(-ln u) from this module's uniforms, in float64.

    Half a step is added, so that 0, a possible draw, stays finite.
    """
    return -(-(uniform_TX.double() + 2.0**-25).log()).log()
