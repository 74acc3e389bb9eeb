"""A byte-level LSTM language model with a mixture of experts between its layers, and recomputation.

    python examples/lstm_lm.py [FILE]

The layout of Shazeer et al. 2017 (arXiv:1701.06538): LSTM, mixture of feed-forward experts, LSTM. The mixture sees all
time steps of a sequence as one batch, and its activations are not kept: the backward pass computes them again. What it
reports, losses and counts, are values that the first pass returns; the second pass returns its own, which nobody adds
up, draws the same noise, and so nothing is counted twice.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from epmoe import MoEConfig, RouterReport, TokenContext, build_moe_layer

BYTES = 256
LOSSES = {"importance": 0.1, "load": 0.1}


class LSTMWithExperts(nn.Module):
    """Bytes ``[B, S]`` -> logits of the next byte ``[B, S, 256]`` and the report of the mixture.

    Args:
        width: D, of embedding, LSTMs and experts' rows.
        num_experts: E; two of them per byte, by noisy top-k.
        recompute: Keep the mixture's input alone for the backward pass.
        seed: Of weights and noise.
    """

    def __init__(self, width: int, num_experts: int, *, recompute: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        moe = MoEConfig.model_validate(
            {"num_experts": num_experts, "top_k": 2, "router": "noisy_topk", "losses": LOSSES}
        )
        self.recompute = recompute
        self.embed = nn.Embedding(BYTES, width)
        self.before = nn.LSTM(width, width, batch_first=True)
        self.moe = build_moe_layer(moe, d_model=width, d_ff=2 * width, seed=seed)
        self.after = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, BYTES)

    def forward(self, byte_BS: Tensor, ctx: TokenContext) -> tuple[Tensor, RouterReport]:
        """The context says which samples these are: the noise is drawn by their numbers."""
        x_BSD, _ = self.before(self.embed(byte_BS))
        mixed_BSD, report = self._mixture(x_BSD, ctx)
        y_BSD, _ = self.after(x_BSD + mixed_BSD)
        return self.head(y_BSD), report

    def _mixture(self, x_BSD: Tensor, ctx: TokenContext) -> tuple[Tensor, RouterReport]:
        result: tuple[Tensor, RouterReport] = (
            checkpoint(self.moe, x_BSD, ctx, use_reentrant=False) if self.recompute else self.moe(x_BSD, ctx)
        )
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run of ``train`` adds up to."""

    bits: list[float]
    """Bits per byte of every step's batch, before the step."""
    bytes_seen: int
    assignments: int
    """How often a byte was sent to an expert."""
    auxiliary: float
    """Sum over the steps of the auxiliary losses, per byte."""


def train(model: LSTMWithExperts, text: bytes, *, steps: int, batch: int, length: int, seed: int) -> Outcome:
    """Adam on random windows of the text; window i of step n is sample n * batch + i."""
    data_T = torch.tensor(list(text))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    bits, seen, assignments, auxiliary = [], 0, 0, 0.0
    for step in range(steps):
        start_B = torch.randint(len(data_T) - length, (batch,), generator=generator)
        window_BS = data_T[start_B.unsqueeze(1) + torch.arange(length + 1)]
        ctx = TokenContext(sample_B=step * batch + torch.arange(batch))
        logits_BSV, report = model(window_BS[:, :-1], ctx)
        task = F.cross_entropy(logits_BSV.flatten(0, 1), window_BS[:, 1:].flatten())
        balance = torch.stack([LOSSES[name] * loss for name, loss in report.losses.items()]).sum()
        balance = balance / (batch * length)
        optimizer.zero_grad()
        (task + balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bits.append(task.item() / math.log(2))
        seen += int(report.metrics.valid_tokens)
        assignments += int(report.metrics.assignments)
        auxiliary += balance.item()
    return Outcome(bits=bits, bytes_seen=seen, assignments=assignments, auxiliary=auxiliary)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and prints the loss and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="?", help="any file; default: a module of the standard library"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="bytes per window")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument(
        "--keep", action="store_true", help="keep the mixture's activations: no recomputation"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    text = (options.file or Path(textwrap.__file__)).read_bytes()
    if len(text) <= options.length:
        parser.error(f"{options.file} has {len(text)} bytes, a window has {options.length + 1}")
    model = LSTMWithExperts(options.width, options.experts, recompute=not options.keep, seed=options.seed)
    outcome = train(
        model, text, steps=options.steps, batch=options.batch, length=options.length, seed=options.seed
    )
    last = outcome.bits[-10:]
    print(f"bits per byte: {outcome.bits[0]:.3f} at first, {sum(last) / len(last):.3f} in the last steps")
    print(
        f"{outcome.bytes_seen:,} bytes in, {outcome.assignments:,} trips to experts: 2 per byte, recomputed or not"
    )


if __name__ == "__main__":
    main()
