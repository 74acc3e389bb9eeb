"""A machine on which only the packages that a test writes are installed; a process group of one rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest
import torch.distributed as dist

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


@pytest.fixture(scope="module")
def one_rank_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """Of this process alone, with gloo."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
