"""What a layer refuses to be given, and what padding cannot change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.moe.build import build_moe_layer
from epmoe.moe.layer import MoELayer
from epmoe.types import TokenContext

B, S, D, V = 3, 4, 8, 16


def make_layer(router: Any = "gshard_top2") -> MoELayer:
    moe = MoEConfig.model_validate({"num_experts": 4, "d_ff": 8, "router": router})
    return build_moe_layer(moe, d_model=D, vocab_size=V)


def context(**changes: Any) -> TokenContext:
    known = {
        "valid_BS": torch.ones(B, S, dtype=torch.bool),
        "sample_B": torch.arange(B),
        "token_BS": torch.arange(B * S).view(B, S),
        "segment_BS": torch.zeros(B, S, dtype=torch.int64),
        "task_B": torch.zeros(B, dtype=torch.int64),
    }
    return TokenContext(**{**known, **changes})


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(12, D), r"x must be \[B, S, D\], got \[T, D\] = \[12, 8\]; x.unsqueeze\(0\)"),
        (torch.zeros(B, S, D + 1), r"with D=8, got \[3, 4, 9\]"),
        (torch.zeros(B, S, 1, D), r"got \[3, 4, 1, 8\]"),
        (torch.zeros(B, S, D, dtype=torch.int64), "floating point, got torch.int64"),
        ([[[0.0] * D]], "a tensor .*, got list"),
    ],
)
@pytest.mark.parametrize("router", ["gshard_top2", "soft"])
def test_vectors_that_do_not_fit(router: str, x: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make_layer(router)(x, TokenContext())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"valid_BS": [[True] * S] * B}, r"valid_BS must be bool \[B, S\], got list; pass torch.tensor"),
        ({"valid_BS": torch.ones(B, S)}, r"bool \[B, S\], got torch.float32; pass it with .bool\(\)"),
        ({"valid_BS": torch.ones(B, S).long()}, r"got torch.int64; pass it with .bool\(\)"),
        ({"valid_BS": torch.ones(S, B).bool()}, r"\[3, 4\] as in x, got \[4, 3\]; this looks like its transpose"),
        ({"valid_BS": torch.ones(B * S).bool()}, r"got \[12\]$"),
        ({"sample_B": torch.arange(B * S).view(B, S)}, r"sample_B must be int64 \[B\] = \[3\]"),
        ({"sample_B": torch.arange(B).int()}, r"got torch.int32; pass it with .long\(\)"),
        ({"sample_B": torch.arange(B) + 2**40}, r"sample_B must be in \[0, 1099511627776\)"),
        ({"sample_B": torch.arange(B) - 1}, "but for padding, got -1"),
        ({"token_BS": torch.zeros(B, S + 1).long()}, r"token_BS must be int64 \[B, S\]"),
        ({"segment_BS": torch.zeros(B, S)}, "segment_BS must be int64"),
        ({"task_B": (0, 0, 0)}, "task_B must be int64 .*, got tuple"),
        ({"task_B": torch.zeros(B, device="meta").long()}, r"task_B .* on cpu as x, got it on meta"),
    ],
)  # fmt: skip
def test_contexts_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    layer = make_layer()
    layer(torch.zeros(B, S, D), context())
    with pytest.raises((TypeError, ValueError), match=words):
        layer(torch.zeros(B, S, D), context(**changes))


@pytest.mark.parametrize(
    ("router", "changes", "words"),
    [
        ({"name": "hash", "table": "random"}, {"token_BS": torch.full((B, S), V)}, r"token_BS must be in \[0, 16\)"),
        ({"name": "hash"}, {"token_BS": torch.full((B, S), -100)}, "but for padding, got -100"),
        ({"name": "task", "num_tasks": 2}, {"task_B": torch.tensor([0, 1, 2])}, r"task_B must be in \[0, 2\)"),
    ],
)  # fmt: skip
def test_ids_that_a_router_does_not_know(router: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_layer(router)(torch.zeros(B, S, D), context(**changes))


def test_a_context_is_a_context() -> None:
    with pytest.raises(
        TypeError, match=r"ctx must be a TokenContext, got Tensor; pass TokenContext\(valid_BS"
    ):
        make_layer()(torch.zeros(B, S, D), torch.ones(B, S).bool())


@pytest.mark.parametrize("where", ["left", "middle", "right"])
@pytest.mark.parametrize(
    "router",
    [
        {"name": "hash"},
        {"name": "hash", "table": "random"},
        {"name": "task", "num_tasks": 2},
        "sentence",
        "gshard_top2",
        {"name": "topk", "jitter": 0.1},
    ],
    ids=str,
)
def test_what_padding_says_never_matters(router: Any, where: str) -> None:
    """Not its ids, its document or its vectors, nor the task and number of a sequence that is nothing else."""
    layer = make_layer(router)
    valid_BS = torch.ones(B, S, dtype=torch.bool)
    valid_BS[:, {"left": 0, "middle": 2, "right": S - 1}[where]] = False
    valid_BS[2] = False
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))
    results: list[Tensor] = []
    for junk in (0, -100, 2**62):
        ids_BS = torch.full((B, S), junk)
        number_B = torch.arange(B).masked_fill(~valid_BS.any(1), junk)
        ctx = context(
            valid_BS=valid_BS,
            sample_B=number_B,
            token_BS=context().token_BS.where(valid_BS, ids_BS),  # type: ignore[union-attr]
            segment_BS=torch.zeros(B, S, dtype=torch.int64).where(valid_BS, ids_BS),
            task_B=torch.tensor([0, 1, 0]).where(valid_BS.any(1), ids_BS[:, 0]),
        )
        results.append(layer(x_BSD.masked_fill(~valid_BS.unsqueeze(2), float(junk % 7)), ctx)[0])
    for other in results[1:]:
        assert torch.equal(other[valid_BS], results[0][valid_BS])
