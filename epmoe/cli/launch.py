"""``epmoe launch``: the parent of a launcher, which ends with the run's own exit code.

torchrun makes every exit code 1, dies of SIGUSR1, and may be killed with its ranks left behind. This process knows how
the run ended (``epmoe.train.status``), passes stop signals on as SIGTERM, and ends after everything that it started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from epmoe import env
from epmoe.errors import ConfigError
from epmoe.train.status import noted_exit

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.1


def launch(command: Sequence[str], grace_s: int) -> int:
    """Runs a launcher to its end -> the exit code of the run, or of the command if that was no run.

    Args:
        command: For example ``torchrun --nproc-per-node 8 -m epmoe train CONFIG``.
        grace_s: Seconds from a signal to SIGKILL: for the ranks to finish a step and write a checkpoint.

    Raises:
        ConfigError: There is no such command.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]} is not a command here",
            fix="epmoe launch -- torchrun --nproc-per-node 2 -m epmoe train CONFIG.yaml",
        )
    with tempfile.TemporaryDirectory(prefix="epmoe-launch-") as notes:
        env.adopt_orphans()
        environment = env.for_launcher(notes, grace_s)
        # Held back until there is somebody to pass them on to.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

        def begin() -> None:
            env.die_with_parent()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=begin)

        def pass_on(_number: int, _frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)

        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means what it says
                signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        code = child.wait()
        _end_orphans(grace_s)
        known = noted_exit(Path(notes))
    own = code if code >= 0 else 128 - code
    return own if known is None else known


def _end_orphans(grace_s: float) -> None:
    """Asks what the launcher left behind to stop, and waits for it; processes without a parent become ours."""
    asked: set[int] = set()
    deadline = time.monotonic() + grace_s
    while left := _children():
        late = time.monotonic() > deadline
        for pid in left if late else left - asked:
            print(
                f"epmoe launch: process {pid} is left over, {'killing' if late else 'stopping'} it",
                file=sys.stderr,
            )
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked |= left
        time.sleep(POLL_S)


def _children() -> set[int]:
    """Our children that still run; those that ended are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
