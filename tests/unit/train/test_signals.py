"""Signals raise a flag and do nothing else."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from epmoe.process.stop_signals import STOP_SIGNALS, StopFlag, stop_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_the_flag_and_a_second_one_does_no_harm(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as flag:
        assert not flag.requested
        assert not flag()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested
        assert flag()
        assert flag.reason == number.name
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_exception() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ValueError, match="boom"), stop_on_signals():
        raise ValueError("boom")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_outside_the_main_thread_the_flag_can_still_be_raised_by_hand() -> None:
    flags: list[StopFlag] = []

    def elsewhere() -> None:
        with stop_on_signals() as flag:
            flag.request("time is up")
            flag.request("again")
            flags.append(flag)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert flags[0].reason == "time is up"
