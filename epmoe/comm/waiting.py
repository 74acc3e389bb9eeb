"""Waiting for a collective that was begun earlier: one place, so that whoever looks at a rank sees that it waits."""

from __future__ import annotations

import torch.distributed as dist


def wait_for(work: dist.Work | None) -> None:
    """Returns when the collective is done; None is one that was done at once."""
    if work is not None:
        work.wait()
