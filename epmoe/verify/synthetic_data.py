"""Made-up sequences by number: of unequal lengths, some of them empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from epmoe.data.loader import Batch
from epmoe.types import TokenContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Training data that is nothing but its numbers: a number names the same sequence in every layout."""

    vocab_size: int
    seq_len: int
    batch_size: int
    """Sequences of an optimizer step over all ranks."""
    kind: Literal["uneven", "half_empty", "one_token"] = "uneven"
    """``uneven``: lengths differ, and samples 2 and 3 of every eight are all padding, so that one of four ranks has no
    valid token. ``half_empty``: the second half of every step is padding. ``one_token``: all tokens are one."""
    seed: int = 0
    num_tasks: int = 1
    documents: bool = False
    """Two documents in every sequence."""

    def batch(self, numbers: list[int]) -> Batch:
        """The sequences of these numbers."""
        token, target, loss, valid = [], [], [], []
        for number in numbers:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
            window = torch.randint(0, self.vocab_size, (self.seq_len + 1,), generator=generator)
            counted = window[1:] % 7 != 0
            if self.kind == "one_token":
                window = torch.ones_like(window)
            real = torch.arange(self.seq_len) < self._length(number)
            token.append(window[:-1])
            target.append(window[1:])
            valid.append(real)
            loss.append(real & counted)
        token_BS = torch.stack(token)
        half_S = (torch.arange(self.seq_len) >= self.seq_len // 2).long()
        sample_B = torch.tensor(numbers)
        context = TokenContext(
            valid_BS=torch.stack(valid),
            sample_B=sample_B,
            token_BS=token_BS,
            segment_BS=half_S.expand_as(token_BS) if self.documents else None,
            task_B=sample_B % self.num_tasks,
        )
        return Batch(
            token_BS=token_BS, target_BS=torch.stack(target), loss_BS=torch.stack(loss), context=context
        )

    def _length(self, number: int) -> int:
        empty = number % 8 in (2, 3)
        if self.kind == "half_empty":
            empty = number % self.batch_size >= self.batch_size // 2
        return 0 if empty else self.seq_len - number % 3
