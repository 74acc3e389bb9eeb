"""Asking a run to stop. Handlers only raise a flag; every loop looks at it where stopping is safe."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from epmoe import env

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm users have sent some minutes before the time limit (``--signal=USR1@300``)."""


class StopFlag:
    """Whether somebody asked this process to stop. The other ranks learn it from an all-reduce, not from here."""

    def __init__(self) -> None:
        self.requested = False
        self.reason: str | None = None
        """Name of the first signal."""

    def request(self, reason: str) -> None:
        """Raises the flag; a second request changes nothing."""
        if not self.requested:
            self.requested, self.reason = True, reason

    def __call__(self) -> bool:
        """The flag as a function, for code that polls one."""
        return self.requested


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM, SIGINT and SIGUSR1 raise while the block runs; earlier handlers come back afterwards.

    Outside the main thread Python cannot set handlers; the flag then stays down unless ``request`` is called.
    """
    flag = StopFlag()

    def raise_flag(number: int, _frame: FrameType | None) -> None:
        flag.request(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    earlier = {number: signal.signal(number, raise_flag) for number in STOP_SIGNALS}
    if env.supervised():
        env.die_with_parent()  # a launcher that is killed cannot tell its ranks to stop
    try:
        yield flag
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
