"""How often the ranks talk in a step: calls of torch.distributed, counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

COUNTED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
    "broadcast",
    "batch_isend_irecv",
)
"""Not every torch has all of them."""


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Yields a counter that has the calls made so far inside the block, by name."""
    counter: Counter[str] = Counter()
    depth = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            counter[name] += depth == 0  # one may be made of another
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

        return call

    originals = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}
    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield counter
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
