"""A small plain PyTorch model with epmoe's layer, that learns to reverse eight digits; for the examples beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epmoe import MoEConfig, build_moe_layer

DIGITS, LENGTH, BATCH, WIDTH = 10, 8, 32, 64
MOE = MoEConfig(num_experts=4, router="topk", capacity_factor=None, d_ff=64, losses={"balance": 0.01})


class Reverser(nn.Module):
    """Digits ``[B, 8]`` -> mean loss per digit, balance loss included. The same weights on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(DIGITS, WIDTH)
        self.mix = nn.Linear(LENGTH, LENGTH)
        self.moe = build_moe_layer(MOE, d_model=WIDTH)
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, digit_BS: Tensor) -> Tensor:
        x_BSD = self.mix(self.embed(digit_BS).transpose(1, 2)).transpose(1, 2)
        y_BSD, report = self.moe(x_BSD)
        loss = F.cross_entropy(self.head(x_BSD + y_BSD).flatten(0, 1), digit_BS.flip(1).flatten())
        return loss + MOE.losses["balance"] * report.losses["balance"] / digit_BS.numel()


def batch(step: int, rank: int, world_size: int) -> Tensor:
    """This rank's digits of a step."""
    draws = torch.Generator().manual_seed(step * world_size + rank)
    return torch.randint(DIGITS, (BATCH, LENGTH), generator=draws)
