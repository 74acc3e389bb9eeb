"""The terminal: lines for logs, a panel for people, and no way for either to end a run."""

from __future__ import annotations

import io
import math
import os
import pty
import subprocess
import sys
from collections import deque

import pytest
from rich.console import Console

from epmoe.metrics.terminal import (
    LineDisplay,
    LiveDisplay,
    _Console,
    duration,
    flops,
    load_strip,
    make_display,
    panel,
    plain_line,
    seconds_left,
    sparkline,
)
from epmoe.metrics.trackers import scalars
from tests.patience import HANGS_S
from tests.unit.metrics.samples import health, record


def test_a_line_has_keys_and_values_and_nothing_else():
    line = plain_line(record(20, val={"stdlib": 3.21}, layers={1: health(9, 0, 3), 3: health(1, 1, 1)}), 100)
    pairs = dict(pair.split("=") for pair in line.split(" "))
    assert pairs["step"] == "20/100"
    assert pairs["loss"] == "4.0000"
    assert pairs["val_stdlib"] == "3.2100"
    assert pairs["gflop/s"] == "2.5"
    assert (pairs["drop"], pairs["load_max"], pairs["dead"]) == ("0.0000", "2.25", "1")
    assert pairs["eta"] == "2m40s"
    assert "mfu" not in pairs
    assert "drop=" not in plain_line(record(20, layers={}), 100)
    assert "mfu=0.250" in plain_line(record(20, mfu=0.25), 100)
    assert "skipped=3" in plain_line(record(20, skipped_steps=3), 100)


def test_outside_a_terminal_there_are_lines_without_escape_codes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    display = make_display(100, stream)
    assert isinstance(display, LineDisplay)
    display.log(record(10))
    display.log(record(20))
    display.close()
    assert stream.getvalue().count("\n") == 2
    assert "\x1b" not in stream.getvalue()


def test_the_final_validation_does_not_repeat_the_last_line():
    stream = io.StringIO()
    display = LineDisplay(100, stream)
    display.log(record(100))
    display.log(record(100, val={"stdlib": 3.21}))
    assert stream.getvalue().splitlines()[1] == "step=100/100 val_stdlib=3.2100"


def test_on_a_terminal_there_is_a_panel_and_validation_stays_above_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        display = make_display(100, terminal)
        assert isinstance(display, LiveDisplay)
        display.log(record(10))
        display.log(record(20, val={"stdlib": 3.25}))
        display.close()
        shown = ""
        while not shown.endswith("\x1b[?25h"):  # the sequence that gives the cursor back
            shown += os.read(leader, 4096).decode(errors="replace")
    os.close(leader)
    assert "validation loss stdlib 3.2500" in shown
    assert "step 20 / 100" in shown
    monkeypatch.setenv("TERM", "dumb")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        assert isinstance(make_display(100, terminal), LineDisplay)
    os.close(leader)


def test_the_panel_says_what_matters():
    console = Console(file=io.StringIO(), width=100, color_system=None)
    layers = {1: health(1, 1, 1, 1), 3: health(0, 97, 2, 1, kept=(0, 50, 2, 1))}
    console.print(panel(record(50, layers=layers, clip=0.5), 100, deque([5.0, 4.0])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "step 50 / 100",
        "50%",
        "eta",
        "loss 4.0000",
        "clipped",
        "2.5 GFLOP/s",
        "1.50 GiB",
        "drop 45.2%",
    ):
        assert part in text
    assert "layer 1  ▅▅▅▅  max 1.0x" in text
    assert "layer 3  ×█▁▁  max 3.9x" in text
    assert "1 without tokens" in text
    console.print(panel(record(50, layers={}, mfu=0.415, skipped_steps=2), 100, deque()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "41.5% MFU" in text
    assert "2 steps skipped" in text


def test_a_strip_has_one_cell_per_expert():
    assert load_strip(health(*[5] * 64)).plain == "▅" * 64
    strip = load_strip(health(0, 1, 15, 6))
    assert [str(span.style) for span in strip.spans] == ["bold magenta", "cyan", "cyan", "cyan"]
    assert str(load_strip(health(0, 1, 0, 15)).spans[3].style) == "bold yellow"


def test_small_formats():
    assert [duration(s) for s in (0, 59.6, 192, 3725, math.nan, math.inf)] == [
        "0s",
        "1m 00s",
        "3m 12s",
        "1h 02m",
        "?",
        "?",
    ]
    assert [flops(v) for v in (0.0, 999.0, 2.5e9, 4e14, 4e19)] == [
        "0.0 FLOP/s",
        "999.0 FLOP/s",
        "2.5 GFLOP/s",
        "400.0 TFLOP/s",
        "40000.0 PFLOP/s",
    ]
    assert sparkline(deque([3.0, 2.0, math.nan, 1.0])) == "█▄ ▁"
    assert sparkline(deque([math.nan])) == ""
    assert seconds_left(record(5, seconds_per_step=0.5), 25) == 10.0
    assert math.isnan(seconds_left(record(5, seconds_per_step=math.nan), 10))


def test_a_loss_of_no_token_is_null_and_such_steps_are_counted():
    empty = record(5, loss=math.nan, loss_tokens=0, empty_steps=3)
    assert " loss=null " in plain_line(empty, 10)
    assert " empty=3 " in plain_line(empty, 10)
    assert "train/loss" not in scalars(empty)
    assert scalars(empty)["train/empty_steps"] == 3
    assert "loss=nan" in plain_line(record(5, loss=math.nan), 10)  # which something broke
    assert "empty" not in plain_line(record(5), 10)


SCRIPT = """
import sys
from epmoe.metrics.terminal import make_display
from epmoe.metrics.trackers import Trackers
from tests.unit.metrics.samples import record
trackers = Trackers([lambda: make_display(100)])
sys.stdin.readline()
for step in range(1, 4):
    trackers.log(record(step))
trackers.close()
print("the run prints something itself", flush=True)
print("finished", file=sys.stderr)
"""


@pytest.mark.parametrize("how", ["reader gone", "closed from the start"])
def test_a_run_outlives_the_reader_of_its_output(how: str):
    command = [sys.executable, "-c", SCRIPT]
    if how == "closed from the start":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    run.stdout.close()
    run.stdout = None
    _, errors = run.communicate("go\n", timeout=HANGS_S)
    assert run.returncode == 0, errors
    assert errors.endswith("finished\n")
    if how == "reader gone":
        assert errors.count("warning") == 1
        assert "LineDisplay failed at step 1 (BrokenPipeError" in errors


def test_a_live_panel_outlives_its_terminal():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        display = LiveDisplay(100, _Console(file=stream, force_terminal=True, width=80))
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            display.log(record(1))
        display.close()
