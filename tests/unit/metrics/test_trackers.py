"""Trackers: no step twice, no torn line, and no tracker that ends a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from epmoe.metrics.step_record import read_records, record_to_json
from epmoe.metrics.trackers import JsonlTracker, TensorBoardTracker, Trackers, scalars
from tests.unit.metrics.samples import health, record


def steps(path: Path) -> list[int]:
    return [r.step for r in read_records(path)]


def test_every_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path, 0)
    tracker.log(record(10))
    assert steps(path) == [10]
    tracker.log(record(20))
    assert list(read_records(path)) == [record(10), record(20)]
    tracker.close()


def test_resuming_drops_later_lines_and_the_torn_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [record_to_json(record(step)) + "\n" for step in (10, 20, 30, 40)]
    path.write_text("".join(lines) + lines[0][:50])
    assert steps(path) == [10, 20, 30, 40]
    tracker = JsonlTracker(path, 25)
    tracker.log(record(30, loss=1.0))
    tracker.close()
    assert steps(path) == [10, 20, 30]
    assert list(read_records(path))[-1].loss == 1.0
    assert path.read_text().count("\n") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_at_the_last_step_with_only_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(record_to_json(record(10)) + "\n" + '{"step": 20, "los')
    JsonlTracker(path, 20).close()
    assert path.read_text() == record_to_json(record(10)) + "\n"


def test_a_new_run_in_an_old_folder_starts_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(record_to_json(record(10)) + "\n\n\x00\xff")
    JsonlTracker(path, 0).close()
    assert path.read_text() == ""


def test_tensorboard_shows_every_number_once(tmp_path: Path):
    for start, last in ((0, 40), (20, 30)):
        tracker = TensorBoardTracker(tmp_path, start)
        for step in range(start + 10, last + 1, 10):
            tracker.log(record(step, loss=float(step), val={"stdlib": 3.0}))
        tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(scalars(record(10, val={"stdlib": 3.0}))) == set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 10.0), (20, 20.0), (30, 30.0)]


def test_the_last_step_may_come_again_with_its_validation(tmp_path: Path):
    for start in (0, 20):
        jsonl, board = JsonlTracker(tmp_path / "metrics.jsonl", start), TensorBoardTracker(tmp_path, start)
        for tracker in (jsonl, board):
            for step in range(start + 10, 21, 10):
                tracker.log(record(step))
            if start == 20:  # a resumed run with nothing left but the evaluation
                tracker.log(record(20, val={"stdlib": 3.0}))
            tracker.close()
    assert list(read_records(tmp_path / "metrics.jsonl")) == [record(10), record(20, val={"stdlib": 3.0})]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20]
    assert [(event.step, event.value) for event in events.Scalars("val/stdlib")] == [(20, 3.0)]


def test_names_of_numbers():
    names = scalars(record(1, val={"a": 2.5}, mfu=0.5, layers={3: health(2, 0)}))
    assert (names["val/a"], names["speed/mfu"], names["layer_3/dead_experts"], names["aux/balance"]) == (
        2.5,
        0.5,
        1,
        1.1,
    )
    assert "speed/mfu" not in scalars(record(1))


class Listener:
    """Remembers steps; fails when told to."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at, self.steps, self.closed = fail_at, [], 0

    def log(self, record) -> None:
        if record.step == self.fail_at:
            raise ConnectionError("the server is gone")
        self.steps.append(record.step)

    def close(self) -> None:
        self.closed += 1
        if self.fail_at >= 0:
            raise ConnectionError("still gone")


def test_a_failing_tracker_is_named_once_and_left_out(capsys: pytest.CaptureFixture[str]):
    good, bad = Listener(), Listener(fail_at=2)
    trackers = Trackers([lambda: bad, lambda: 1 // 0, lambda: good])  # type: ignore[list-item]
    for step in (1, 2, 3, 4):
        trackers.log(record(step))
    trackers.close()
    assert (good.steps, good.closed) == ([1, 2, 3, 4], 1)
    assert (bad.steps, bad.closed) == ([1], 1)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "ZeroDivisionError" in warnings[0]
    assert "Listener failed at step 2 (ConnectionError: the server is gone)" in warnings[1]


def test_closing_goes_on_after_one_tracker_cannot(capsys: pytest.CaptureFixture[str]):
    good, bad = Listener(), Listener(fail_at=99)
    trackers = Trackers([lambda: bad, lambda: good])
    trackers.close()
    trackers.close()
    assert (good.closed, bad.closed) == (1, 1)
    assert "could not be closed" in capsys.readouterr().err


def test_a_full_disk_ends_the_metrics_but_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = Listener()

    metrics = JsonlTracker(tmp_path / "metrics.jsonl", 0)
    metrics.close()
    with open("/dev/full", "a", buffering=1) as full:
        metrics._file = full
        trackers = Trackers([lambda: metrics, lambda: other])
        trackers.log(record(1))
        trackers.log(record(2))
    assert other.steps == [1, 2]
    assert capsys.readouterr().err.count("No space left") == 1
