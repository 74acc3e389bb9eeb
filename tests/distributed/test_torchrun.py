"""Real jobs: torchrun, its agent, its restarts and its signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from epmoe.config import Config
from epmoe.config_file import dump_config
from tests.distributed.runs import (
    assert_same_run,
    checkpoints,
    finish,
    history,
    make_config,
    processes_of,
    run,
    status,
)
from tests.patience import HANGS_S

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]
LIMIT_S = HANGS_S


@contextlib.contextmanager
def torchrun(
    base: Path, config: Config, *, ranks: int = 2, restarts: int = 0, fault: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The agent of a job that trains ``config``; what all processes print goes to ``<out>.log``."""
    file = base / f"{Path(config.out).name}.yaml"
    file.write_text(dump_config(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", "-m", "epmoe", "train", str(file)]
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "EPMOE_FAULT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if fault is None else {"EPMOE_FAULT": fault})
    with Path(f"{config.out}.log").open("wb") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield agent
        finally:
            for pid in {agent.pid, *processes_of(file)}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            agent.wait()


def assert_nothing_left(base: Path, config: Config) -> None:
    assert processes_of(base / f"{Path(config.out).name}.yaml") == []
    assert not (Path(config.out) / ".lock").exists()


def log_of(config: Config) -> list[str]:
    return Path(f"{config.out}.log").read_text(errors="replace").splitlines()


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_checkpoint(base: Path, reference: Path) -> None:
    config = make_config(base, "job-killed")
    fault = "point=train.after_backward,rank=1,step=8,action=kill,attempt=0"
    with torchrun(base, config, restarts=1, fault=fault) as agent:
        assert agent.wait(LIMIT_S) == 0, "\n".join(log_of(config)[-40:])
        assert_nothing_left(base, config)
    assert sum("injected fault" in line for line in log_of(config)) == 1
    assert any("(step 5)" in line for line in log_of(config) if line.startswith("resuming from"))
    assert_same_run(Path(config.out), reference)


def test_the_first_failure_ends_the_output(base: Path) -> None:
    config = make_config(base, "job-failed", "train.steps=4")
    with torchrun(base, config, fault="point=train.after_backward,rank=1,step=2,action=exc") as agent:
        assert agent.wait(LIMIT_S) != 0
        assert_nothing_left(base, config)
    log = log_of(config)
    error = "RuntimeError: injected exception at train.after_backward"
    assert any(line.strip() == error for line in log[-30:])
    [root] = [number for number, line in enumerate(log) if line.startswith("Root Cause")]
    assert any(re.search(r"rank +: 1 ", line) for line in log[root:])
    assert any(line.strip() == error for line in log[root:])
    ended = status(Path(config.out))
    assert ended["exit_code"] == 1
    assert "RuntimeError: injected exception" in ended["message"]


def test_restarts_that_get_nowhere_are_refused(base: Path) -> None:
    config = make_config(base, "job-stuck", "train.steps=4")
    fault = "point=train.step_start,step=1,action=exc"
    for _ in range(2):  # two of the three attempts on forked ranks, which is quicker
        [outcome] = run(base, config, fault, world_size=1)
        assert outcome.error is not None
    with torchrun(base, config, ranks=1, restarts=1, fault=fault) as agent:
        assert agent.wait(LIMIT_S) != 0
        assert_nothing_left(base, config)
    assert sum("injected fault" in line for line in log_of(config)) == 1
    ended = status(Path(config.out))
    assert (ended["state"], ended["exit_code"]) == ("failed", 93)
    assert "3 attempts from step 0 failed" in "\n".join(log_of(config))


def test_a_signal_to_the_agent_costs_nothing(base: Path) -> None:
    # At a constant rate a run does not depend on how many steps it will have.
    constant = ["optimizer.schedule=constant", "train.sample.tokens=0"]
    config = make_config(base, "job-signal", *constant, "train.steps=100000", "checkpoint.every=0")
    metrics = Path(config.out) / "metrics.jsonl"
    with torchrun(base, config) as agent:
        while agent.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 4):
            time.sleep(0.01)
        os.kill(agent.pid, signal.SIGTERM)
        assert agent.wait(30) != 0
        assert_nothing_left(base, config)
    ended = status(Path(config.out))
    assert (ended["state"], ended["exit_code"]) == ("stopped", 75), "\n".join(log_of(config)[-40:])
    [saved] = checkpoints(Path(config.out))
    assert 4 <= saved < 1000
    assert history(Path(config.out))[-1]["step"] == saved
    steps = saved + 2
    rerun = finish(base, make_config(base, "job-signal", *constant, f"train.steps={steps}"))
    assert_same_run(
        rerun, finish(base, make_config(base, "no-signal", *constant, f"train.steps={steps}")), steps
    )
