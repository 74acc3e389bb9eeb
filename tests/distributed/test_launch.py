"""``epmoe launch`` above small commands, and above real torchrun jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from epmoe.cli.launch import STOP_SIGNALS
from epmoe.config import Config
from epmoe.config_file import dump_config
from epmoe.train.status import read_status
from tests.distributed.runs import assert_same_run, finish, make_config, processes_of
from tests.patience import HANGS_S

LIMIT_S = HANGS_S
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def _begin() -> None:
    """What nohup or a shell in the background had ignored is ignored no more."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def launched(
    command: Sequence[str], log: Path, *options: str, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """``epmoe launch`` with a command, as a process."""
    whole = [sys.executable, "-m", "epmoe", "launch", *options, "--", *command]
    cleared = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "EPMOE_FAULT")
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    with (
        log.open("ab") as file,
        subprocess.Popen(whole, stdout=file, stderr=file, env=environment, preexec_fn=_begin) as parent,
    ):
        try:
            yield parent
        finally:
            with contextlib.suppress(ProcessLookupError):
                parent.kill()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- any command
@pytest.mark.parametrize(
    ("code", "expected"),
    [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_a_command_that_is_no_run_keeps_its_own_code(code: str, expected: int, tmp_path: Path) -> None:
    with launched(python(code), tmp_path / "log") as parent:
        assert parent.wait(LIMIT_S) == expected


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with launched(["torchrunn"], tmp_path / "log") as parent:
        assert parent.wait(LIMIT_S) == 2
    assert "torchrunn is not a command here" in (tmp_path / "log").read_text()


def test_every_exit_of_the_command_line_reaches_the_parent(tmp_path: Path) -> None:
    """Before there is a run folder: a configuration that does not exist, and a launcher that says 1 for it."""
    with launched([*TORCHRUN, "-m", "epmoe", "train", "no.yaml"], tmp_path / "log") as parent:
        assert parent.wait(LIMIT_S) == 2


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
)
def test_stop_signals_are_passed_on_as_sigterm(number: signal.Signals, tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path({str(tmp_path / "ready")!r}).touch()
while True:
    time.sleep(0.05)
"""
    with launched(python(code), tmp_path / "log") as parent:
        wait_for((tmp_path / "ready").exists, parent)
        parent.send_signal(number)
        assert parent.wait(LIMIT_S) == 75


LEAVES_A_CHILD = """
import pathlib, subprocess, sys
child = '''
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, {handler})
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", child, {folder!r}], start_new_session=True)
while not any(pathlib.Path({folder!r}).iterdir()):
    pass
"""


@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(0)", "signal.SIG_IGN"], ids=["willing", "stubborn"])
def test_what_the_launcher_leaves_behind_is_ended(handler: str, tmp_path: Path) -> None:
    (pids := tmp_path / "pids").mkdir()
    code = LEAVES_A_CHILD.format(handler=handler, folder=str(pids))
    with launched(python(code), tmp_path / "log", "--grace=2") as parent:
        assert parent.wait(LIMIT_S) == 0
    [left] = pids.iterdir()
    assert not Path(f"/proc/{left.name}").exists()


# ------------------------------------------------------------------------------------------- torchrun
def training(base: Path, config: Config) -> tuple[list[str], Path]:
    file = base / f"{Path(config.out).name}.yaml"
    file.write_text(dump_config(config))
    return [*TORCHRUN, "-m", "epmoe", "train", str(file)], file


def ranks_of(file: Path) -> dict[int, int]:
    """Process of each rank: those that torchrun started."""
    ranks = {}
    for pid in processes_of(file):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            variables = dict(line.partition(b"=")[::2] for line in lines)
            if b"TORCHELASTIC_RUN_ID" in variables:
                ranks[int(variables[b"RANK"])] = pid
    return ranks


def agent_of(parent: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()[0])


SLOW_STEP = "point=train.after_backward,rank=0,step=7,action=stop"
"""Rank 0 stops itself in a step: then there is time to do something to the job."""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "agent"])
def test_a_run_whose_launcher_is_told_to_stop_or_killed_writes_a_checkpoint_and_goes_on(
    base: Path, victim: str
) -> None:
    reference = finish(base, make_config(base, "launch-reference"))
    config = make_config(base, f"launch-{victim}", "parallel.timeout_s=60")
    command, file = training(base, config)
    log = Path(f"{config.out}.log")
    with launched(command, log, EPMOE_FAULT=SLOW_STEP) as parent:
        wait_for(lambda: b"injected fault" in log.read_bytes(), parent)
        ranks = ranks_of(file)
        if victim == "parent":
            parent.terminate()
        else:
            os.kill(agent_of(parent), signal.SIGKILL)
        time.sleep(0.5)
        os.kill(ranks[0], signal.SIGCONT)
        assert parent.wait(LIMIT_S) == 75, log.read_text()
    assert processes_of(file) == []
    with launched(command, log) as parent:
        assert parent.wait(LIMIT_S) == 0, log.read_text()
    assert_same_run(Path(config.out), reference)


@pytest.mark.slow
def test_a_launcher_above_that_is_killed_takes_the_job_with_it_and_a_checkpoint_stays(base: Path) -> None:
    config = make_config(base, "launch-orphan", "parallel.timeout_s=60", "checkpoint.every=0")
    command, file = training(base, config)
    log = Path(f"{config.out}.log")
    with launched(command, log, EPMOE_FAULT=SLOW_STEP) as parent:
        wait_for(lambda: b"injected fault" in log.read_bytes(), parent)
        ranks = ranks_of(file)
        parent.kill()
        parent.wait()
        time.sleep(0.5)
        os.kill(ranks[0], signal.SIGCONT)
        deadline = time.monotonic() + LIMIT_S
        while processes_of(file):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    status = read_status(Path(config.out))
    assert status is not None
    assert (status.exit_code, status.step) == (75, 7)


@pytest.mark.slow
def test_after_three_times_the_same_comes_93_and_the_cause_stays(base: Path) -> None:
    config = make_config(base, "launch-stuck")
    command, _file = training(base, config)
    fault, log = "point=train.step_start,step=3,action=oom", Path(f"{config.out}.log")
    codes = []
    for _ in range(5):
        with launched([sys.executable, *command[-4:]], log, EPMOE_FAULT=fault) as parent:
            codes.append(parent.wait(LIMIT_S))
    assert codes == [6, 6, 6, 93, 93]
    status = read_status(Path(config.out))
    assert status is not None
    assert status.earlier is not None
    assert (status.earlier.exit_code, status.earlier.step, status.earlier.rank) == (6, 2, 0)
