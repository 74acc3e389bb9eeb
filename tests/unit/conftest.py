"""A machine on which only the packages that a test writes are installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest

from epmoe.models import accelerators
from tests.unit.packages import NAMES, Packages


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    """None of flash-attn and apex, whatever is installed here; what a test writes can be imported."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)

    def find_spec(name: str) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(folder)])

    monkeypatch.setattr(accelerators, "find_spec", find_spec)
    yield Packages(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]
