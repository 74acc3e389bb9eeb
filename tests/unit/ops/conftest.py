"""Tests of operators run on poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.ops import twins


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What a kernel leaves out is seen."""
    with twins.poisoned_memory():
        yield
