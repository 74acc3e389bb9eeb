"""One text, one cache of prepared data and one finished run for every test that needs a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the text of all small runs, and the runs themselves."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def reference(base: Path) -> Path:
    """The folder of a run of two ranks that nothing disturbed. Do not change it: copy it."""
    from tests.distributed.runs import finish, make_config

    return finish(base, make_config(base, "reference"))
