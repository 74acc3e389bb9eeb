"""What needs no DeepSpeed: how its absence is reported."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from epmoe.errors import ConfigError
from epmoe.parallel.deepspeed import load_deepspeed


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0" if name == "LOCAL_RANK" else "cpu")


def test_a_run_without_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match="deepspeed cannot be imported") as caught:
        load_deepspeed("cpu")
    assert "pip install --no-build-isolation" in str(caught.value)
    assert "parallel.engine=native" in str(caught.value)


@pytest.mark.parametrize("version", ["0.19.7", "0.9.0+abc", "0.18.12rc1"])
def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    ops = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__=version, ops=ops))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ops)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"needs version 0.19.8, not {version[:4]}"):
        load_deepspeed("cpu")
