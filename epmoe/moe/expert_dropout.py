"""Dropout inside experts whose draws follow the token, not the rank that computes it.

Experts see rows and not whose they are, so while this is on every row brings that along: eight more columns, a byte
in each, which every floating-point dtype on any wire holds exactly.

    columns   D .. D+4   sample number, low byte first          D+5 .. D+7   position in the sequence

Dispatch, exchanges and their backward passes know nothing of it: the columns are part of the row, with no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe.ops import philox
from epmoe.types import Draws, ExpertBatch

SAMPLE_BYTES, POSITION_BYTES = 5, 3
LABEL_WIDTH = SAMPLE_BYTES + POSITION_BYTES
EXPERT_STRIDE = 0x9E3779B1
"""Odd, so that every expert has its own order of the 2**32 positions of the counter."""


def with_labels(x_TD: Tensor, draws: Draws) -> Tensor:
    """The rows with whose they are -> ``[T, D + 8]``."""
    columns = [draws.sample_T >> 8 * byte for byte in range(SAMPLE_BYTES)]
    columns += [draws.position_T >> 8 * byte for byte in range(POSITION_BYTES)]
    label_TX = torch.stack(columns, dim=1) & 0xFF
    return torch.cat((x_TD, label_TX.to(x_TD.dtype)), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenDropout:
    """Sets hidden units of an expert to zero, each with this probability, and divides the others by the rest of it.

    Which ones depends on (seed, layer, sample, position, expert, unit) and on nothing else. Switch Transformer's expert
    dropout, arXiv:2101.03961 section 2.2.
    """

    probability: float
    seed: int
    layer: int

    def __call__(self, act_RF: Tensor, label_RX: Tensor, expert_R: Tensor) -> Tensor:
        """Activations of rows from ``with_labels``.

        Args:
            label_RX: Their last eight columns.
            expert_R: int64 global number of each row's expert.
        """
        byte_RX = label_RX.float().long()
        place_X = torch.tensor([1 << 8 * byte for byte in range(SAMPLE_BYTES)], device=byte_RX.device)
        sample_R = (byte_RX[:, :SAMPLE_BYTES] * place_X).sum(1)
        position_R = (byte_RX[:, SAMPLE_BYTES:] * place_X[:POSITION_BYTES]).sum(1)
        position_R = (position_R + expert_R * EXPERT_STRIDE) & philox.MASK
        draws_RF = philox.uniform(
            self.seed, philox.EXPERT_DROPOUT, self.layer, sample_R, position_R, act_RF.shape[1]
        )
        return torch.where(draws_RF >= self.probability, act_RF / (1 - self.probability), 0.0)


def expert_of_rows(batch: ExpertBatch, first_expert: int) -> Tensor:
    """The global number of each row's expert -> int64 ``[R]``; nothing waits for a device."""
    num_local, num_rows = batch.tokens_per_expert_L.shape[0], batch.rows_RD.shape[0]
    expert_L = torch.arange(first_expert, first_expert + num_local, device=batch.rows_RD.device)
    repeats = batch.tokens_per_expert_L if batch.rows_per_expert is None else batch.rows_per_expert
    return expert_L.repeat_interleave(repeats, output_size=num_rows)
