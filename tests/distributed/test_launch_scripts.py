"""The launch files that are shell scripts for one machine, started as they are, with two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from epmoe.config_file import dump_config
from epmoe.train.status import read_status
from tests.distributed.runs import make_config, processes_of

pytestmark = [pytest.mark.slow, pytest.mark.torchrun]
LAUNCH = Path(__file__).parents[2] / "launch"
COMMANDS = {
    "epmoe": "epmoe",
    "torchrun": "torch.distributed.run",
    "deepspeed": "deepspeed.launcher.runner",
}


@pytest.mark.parametrize("script", ["local.sh", "deepspeed.sh"])
def test_a_script_ends_with_75_when_told_to_stop_and_the_same_line_goes_on(script: str, base: Path) -> None:
    if script == "deepspeed.sh":
        pytest.importorskip("deepspeed", exc_type=ImportError)
    out, file = base / f"out-{script}", base / f"{script}.yaml"
    # At a constant rate a run does not depend on how many steps it will have.
    settings = ("optimizer.schedule=constant", "train.steps=100000", "checkpoint.every=0")
    file.write_text(dump_config(make_config(base, "unused", *settings)))
    variables = {"CONFIG": str(file), "OUT": str(out), "RANKS": "2", "PATH": _commands(base / "bin")}
    metrics = out / "metrics.jsonl"
    with (base / f"{script}.log").open("wb") as log:

        def start(*overrides: str) -> subprocess.Popen[bytes]:
            command = ["bash", str(LAUNCH / script), *overrides]
            return subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)

        with start() as job:
            while job.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 4):
                time.sleep(0.05)
            job.terminate()
            assert job.wait(90) == 75, Path(log.name).read_text()
        stopped = read_status(out)
        assert stopped is not None
        assert stopped.step is not None
        assert processes_of(file) == []
        with start(f"train.steps={stopped.step + 2}") as job:
            assert job.wait(90) == 0, Path(log.name).read_text()
    done = read_status(out)
    assert done is not None
    assert (done.state, done.step) == ("done", stopped.step + 2)
    assert processes_of(file) == []


def _commands(folder: Path) -> str:
    """The search path with the commands of this interpreter in front."""
    folder.mkdir(exist_ok=True)
    for name, module in COMMANDS.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"
