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
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "batch_isend_irecv",
)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Yields a counter that has the calls made so far inside the block, by name."""
    counter: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return original(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in COUNTED}
    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield counter
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
