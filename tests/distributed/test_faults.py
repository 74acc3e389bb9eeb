"""Lost peers, requests to stop, numbers that are not finite, folders and texts that do not serve: how a run ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from epmoe.config import Config
from epmoe.errors import CommError, EpmoeError, Preempted
from epmoe.process import runtime
from epmoe.train.run_folder import close_run_folder, open_run_folder
from epmoe.train.status import read_status
from tests.distributed.harness import rank_outcomes, run_ranks
from tests.distributed.runs import (
    End,
    assert_same_run,
    attempt,
    attempts,
    checkpoints,
    different,
    ends,
    finish,
    history,
    launch,
    make_config,
    run,
    status,
    tensors,
    write_text,
)


# ------------------------------------------------------------------------------------------- lost peers
def test_a_peer_killed_inside_the_exchange_is_named_at_once(base: Path) -> None:
    config = make_config(base, "killed-peer")
    survivor, victim = launch(base, config, "point=dispatch.exchange,rank=1,action=kill")
    assert victim.exit_code == -signal.SIGKILL
    assert survivor.error is not None
    assert "rank 0 lost rank(s) [1] at step 1, phase training, layer 1: dead or stopped" in survivor.error
    assert survivor.ended_after_s - victim.ended_after_s < 60  # not the time-out; 0.7 on a quiet machine
    ended = status(Path(config.out))
    assert (ended["state"], ended["exit_code"]) == ("failed", 7)
    assert "lost rank(s) [1] at step 1" in ended["message"]


@pytest.mark.parametrize("start", [launch, run], ids=["the store dies with it", "the store lives on"])
def test_the_survivors_of_rank_zero_write_how_the_run_ended(base: Path, start: Any) -> None:
    """Not ``running`` for ever: the lowest rank that still answers writes in its place."""
    config = make_config(
        base, f"killed-rank-zero-{start.__name__}", "train.global_batch_size=6", "moe.num_experts=6"
    )
    victim, *survivors = start(
        base, config, "point=train.after_backward,rank=0,step=3,action=kill", world_size=3
    )
    assert victim.exit_code == -signal.SIGKILL
    ended = status(Path(config.out))
    assert (ended["state"], ended["exit_code"]) == ("failed", 7)
    if start is run:
        assert ended["message"] == f"CommError: {survivors[0].result.message}"
        assert "rank 1 lost rank(s) [0] at step" in ended["message"]
    else:
        assert "rank 0, or the launcher that hosts the store, has most likely died" in ended["message"]


def _killed_at_a_call(rank: int, config: Config, victim: int, call: int) -> End:
    """The victim dies when it is about to begin its n-th exchange."""
    all_to_all, calls = dist.all_to_all_single, iter(range(1, 10**6))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if rank == victim and next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = counted
    return attempt(rank, config)


BOTH = ("parallel.exchange=hierarchical", "parallel.ranks_per_node=2", "parallel.ep_size=4")


@pytest.mark.parametrize(
    ("name", "world_size", "victim", "call", "overrides"),
    [
        # Counts, two parts there and two home; then the gradients of two parts home and two there.
        ("forward", 2, 1, 4, ("parallel.overlap_chunks=2",)),
        ("backward", 2, 1, 8, ("parallel.overlap_chunks=2",)),
        ("two nodes", 4, 3, 4, (*BOTH, "train.global_batch_size=8")),
    ],
)
def test_a_peer_killed_while_rows_are_on_their_way(
    base: Path, name: str, world_size: int, victim: int, call: int, overrides: tuple[str, ...]
) -> None:
    config = make_config(base, f"killed-{name}", "parallel.timeout_s=600", *overrides)
    outcomes = rank_outcomes(world_size, _killed_at_a_call, base, config, victim, call)
    dead = outcomes.pop(victim)
    assert dead.exit_code == -signal.SIGKILL
    first = min(outcome.ended_after_s for outcome in outcomes)
    assert first - dead.ended_after_s < 60  # of 600; 0.7 on a quiet machine
    for outcome in outcomes:
        assert outcome.result.code == 7
        assert f"lost rank(s) [{victim}] at step 1, phase training, layer 1: dead" in outcome.result.message
    assert status(Path(config.out))["exit_code"] == 7


def test_a_stopped_peer_is_named_after_the_time_out(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    limit_s = 2.5
    config = make_config(base, "stopped-peer", f"parallel.timeout_s={limit_s}", "checkpoint.every=0")
    folder = Path(config.out)
    fault = "point=train.after_backward,rank=1,step=3,action=stop"
    survivor, victim = launch(base, config, fault, grace=0.2)
    assert victim.exit_code == -signal.SIGKILL  # by the test, long after it stopped answering
    assert survivor.error is not None
    assert "CommError: rank 0 lost rank(s) [1] at step 3, phase training" in survivor.error
    assert status(folder)["exit_code"] == 7
    # Step 2 was logged just before rank 1 stopped.
    waited = (folder / "run_status.json").stat().st_mtime - (folder / "metrics.jsonl").stat().st_mtime
    assert limit_s - 0.5 < waited < limit_s + 60
    stacks = capfd.readouterr().err
    assert "[rank 0] a collective failed at step 3, phase training; stacks of this process:" in stacks
    assert "in reduce" in stacks.partition("a collective failed")[2] or "in _steps" in stacks


def test_the_survivor_of_a_failed_rank_knows_why(base: Path) -> None:
    config = make_config(base, "failed-peer")
    first, second = run(base, config, "point=train.step_start,rank=1,step=2,action=exc")
    assert first.result.code == 1  # that of the first cause, everywhere
    ended = read_status(Path(config.out))
    assert ended is not None
    assert (ended.exit_code, ended.step, ended.rank) == (1, 1, 1)
    assert "which stopped at step 2, phase training: RuntimeError: injected exception" in first.result.message
    assert second.error is not None
    assert "RuntimeError: injected exception at train.step_start" in second.error


def test_a_rank_that_fails_while_the_run_is_set_up_is_named_too(base: Path) -> None:
    """Not only the loop is guarded: resuming communicates as well."""
    config = make_config(base, "failed-start", "train.steps=2")
    finish(base, config)
    longer = make_config(base, "failed-start", "train.steps=3")
    first, second = run_ranks(2, _fail_in_resume, base, longer)
    assert first.code == 1
    assert "which stopped at step 0, phase start-up: ZeroDivisionError: no luck" in first.message
    assert second == End(1, "ZeroDivisionError")


def _fail_in_resume(rank: int, config: Config) -> End:
    import epmoe.train.run

    def unlucky(*_: object) -> float:
        raise ZeroDivisionError("no luck")

    if rank == 1:
        epmoe.train.run.resume = unlucky  # type: ignore[assignment]
    try:
        [end] = attempts(rank, [(config, None)])
    except ZeroDivisionError:
        return End(1, "ZeroDivisionError")
    return end


def test_out_of_memory_says_what_to_lower(base: Path) -> None:
    config = make_config(base, "memory", "train.micro_batch_size=2")
    [end] = ends(base, config, "point=train.step_start,step=2,action=oom", world_size=1)
    assert end.code == 6
    assert "micro batches of 2 x 16 tokens" in end.message
    assert "train.micro_batch_size" in end.message
    assert status(Path(config.out))["exit_code"] == 6


def test_out_of_memory_on_any_rank_is_what_all_ranks_end_with(base: Path) -> None:
    config = make_config(base, "memory-elsewhere")
    fault = "point=train.step_start,rank=1,step=3,action=oom"
    assert [end.code for end in ends(base, config, fault)] == [6, 6]
    ended = read_status(Path(config.out))
    assert ended is not None
    assert (ended.exit_code, ended.step, ended.rank) == (6, 2, 1)
    assert "lost rank 1 at step 3" in ended.message


def test_the_same_failure_is_not_repeated_for_ever(base: Path) -> None:
    config = make_config(base, "stuck", "train.steps=3")
    fault = "point=train.step_start,rank=0,step=1,action=oom"
    codes = [ends(base, config, fault, world_size=1)[0].code for _ in range(4)]
    assert codes == [6, 6, 6, 93]
    assert status(Path(config.out))["exit_code"] == 93
    # Another configuration is another attempt.
    changed = make_config(base, "stuck", "train.steps=3", "train.micro_batch_size=1")
    assert ends(base, changed, world_size=1) == [End(0)]


# ------------------------------------------------------------------------------------------- asked to stop
STOPS = {
    # where the signal arrives -> (fault, step of the checkpoint)
    "before a step": ("point=train.step_start,rank=1,step=7,action=term", 6),
    "inside a step": ("point=train.after_backward,rank=0,step=7,action=term", 7),
    "while a checkpoint is written": ("point=ckpt.mid_shard,rank=1,step=5,action=term", 5),
    "while rank 0 finishes a checkpoint": ("point=ckpt.before_rename,step=5,action=term", 5),
    "once more while its own checkpoint is written": (
        "point=train.step_start,rank=1,step=9,action=term;point=ckpt.stage,step=8,action=term",
        8,
    ),
    "in an evaluation": ("point=train.eval,rank=1,action=term", 5),
}


UNTIL_TEN = "point=train.step_start,step=11,action=term"


def _stop_and_go_on(rank: int, base: Path) -> dict[str, dict[str, Any]]:
    """Stops a run at each place, looks at what is there, and goes on until step 10."""
    attempt(rank, make_config(base, "signal-none"), UNTIL_TEN)
    found = {}
    for where, (fault, _) in STOPS.items():
        config = make_config(base, f"signal-{where}", "train.eval_every=5", "train.eval_samples=8")
        folder = Path(config.out)
        end = attempt(rank, config, fault)
        found[where] = {
            "end": end,
            "checkpoints": checkpoints(folder),
            "state": status(folder)["state"],
            "steps": [line["step"] for line in history(folder)],
        }
        attempt(rank, config, UNTIL_TEN)
    return found


@pytest.fixture(scope="module")
def stopped(base: Path) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, _stop_and_go_on, base, base)


@pytest.mark.parametrize("where", STOPS)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    where: str, stopped: list[dict[str, dict[str, Any]]], base: Path
) -> None:
    saved = STOPS[where][1]
    for rank in (0, 1):
        assert stopped[rank][where]["end"].code == 75
        assert stopped[rank][where]["end"].message.startswith(f"stopped after step {saved} (")
    facts = stopped[0][where]
    assert facts["checkpoints"] == ([5] if saved == 5 else [5, saved])
    assert facts["state"] == "stopped"
    assert facts["steps"] == list(range(1, saved + 1))
    assert different(tensors(base / f"signal-{where}", 10), tensors(base / "signal-none", 10)) == []
    assert [line["loss"] for line in history(base / f"signal-{where}")] == [
        line["loss"] for line in history(base / "signal-none")
    ]


def test_a_signal_during_preparation_leaves_nothing_half_done(base: Path) -> None:
    config = make_config(base, "signal-prepare", f"data.cache={base}/other-cache")
    folder = Path(config.out)
    for end in ends(base, config, "point=data.prepare,rank=0,action=term"):
        assert end.code == 75
        assert "asked to stop" in end.message
    assert status(folder)["exit_code"] == 75
    assert not (folder / "ckpt").exists()
    assert not list((base / "other-cache").glob("[!.]*"))
    finish(base, make_config(base, "signal-prepare", f"data.cache={base}/other-cache", "train.steps=1"))


def _wait_for_rank_zero(rank: int) -> tuple[str, float]:
    """Rank 1 is asked to stop while rank 0 is busy; rank 0 never is."""
    place = runtime.start("cpu", 20.0)
    began = time.monotonic()
    try:
        with runtime.rank_zero_first(place, "something long", lambda: rank == 1) as should_stop:
            while not should_stop() and time.monotonic() < began + 10:
                time.sleep(0.01)
            if rank == 0:
                raise Preempted("asked to stop")
    except EpmoeError as error:
        return type(error).__name__, time.monotonic() - began
    return "went on", time.monotonic() - began


def test_rank_zero_hears_that_a_waiting_rank_is_asked_to_stop(base: Path) -> None:
    for outcome, seconds in run_ranks(2, _wait_for_rank_zero, base):
        assert outcome == "Preempted"
        assert seconds < 8


def _fail_first(rank: int) -> str:
    place = runtime.start("cpu", 20.0)
    try:
        with runtime.rank_zero_first(place, "something", lambda: False):
            raise ValueError("no")
    except CommError as error:
        return error.what
    except ValueError:
        return "its own error"


def test_the_others_hear_that_rank_zero_failed(base: Path) -> None:
    assert run_ranks(2, _fail_first, base) == ["its own error", "rank 0 failed: something"]


@pytest.mark.parametrize(
    ("rank", "point"), [(1, "ckpt.mid_shard"), (0, "ckpt.before_manifest"), (0, "ckpt.before_rename")]
)
def test_killed_while_it_saves_on_request(rank: int, point: str, base: Path, reference: Path) -> None:
    config = make_config(base, f"killed-{point}")
    folder = Path(config.out)
    fault = (
        f"point=train.step_start,rank={rank},step=8,action=term;point={point},rank={rank},step=7,action=kill"
    )
    outcomes = run(base, config, fault)
    assert outcomes[rank].exit_code == -signal.SIGKILL
    # The wish to stop was not the failure.
    assert f"lost rank(s) [{rank}] at step 7, phase checkpoint" in outcomes[1 - rank].result.message
    left = sorted(path.name for path in (folder / "ckpt").iterdir())
    assert [name for name in left if not name.startswith(".tmp-")] == ["latest.json", "step_000000005"]
    assert any(name.startswith(".tmp-step_000000007-") for name in left)
    finish(base, config)
    assert checkpoints(folder) == [15, 20]
    assert_same_run(folder, reference)


# ------------------------------------------------------------------------------------------- not finite
def test_a_broken_gradient_on_one_rank_skips_the_update_on_all(base: Path) -> None:
    config = make_config(base, "skips", "train.steps=6", "checkpoint.every=1", "checkpoint.keep=9")
    fault = "point=train.after_backward,rank=1,step={},action={}"
    both = ends(base, config, f"{fault.format(3, 'nan')};{fault.format(5, 'inf')}")
    assert both == [End(0), End(0)]
    folder = Path(config.out)
    stored = {step: tensors(folder, step) for step in range(1, 7)}
    for step in (3, 5):  # both ranks' experts are in these files
        assert different(stored[step - 1], stored[step]) == []
    for step in (2, 4, 6):
        assert len(different(stored[step - 1], stored[step])) > 50
    assert [line["skipped_steps"] for line in history(folder)] == [0, 0, 1, 1, 2, 2]
    assert [line["grad_norm"] is None for line in history(folder)] == [False, False, True, False, True, False]
    assert [line["samples"] for line in history(folder)] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize(("policy", "last"), [("skip", 3), ("stop", 1)])
def test_too_many_of_them_end_the_run_with_the_samples_named(policy: str, last: int, base: Path) -> None:
    overrides = [f"train.nonfinite={policy}", "train.max_nonfinite=3", "checkpoint.every=1"]
    config = make_config(base, f"nonfinite-{policy}", *overrides)
    for end in ends(base, config, "point=train.after_backward,rank=1,action=nan"):
        assert end.code == 5
        assert end.message.startswith(f"step {last} is not finite")
        assert f"samples {4 * last - 4} to {4 * last - 1}" in end.message
    assert status(Path(config.out))["exit_code"] == 5
    # What is on disk is the last step that was let through, not the one that ended the run.
    assert (
        json.loads((Path(config.out) / "ckpt" / "latest.json").read_text())["step"] == last - 1
        if last > 1
        else True
    )


def test_skipped_steps_in_a_row_are_counted_across_a_restart(base: Path) -> None:
    config = make_config(base, "row", "train.max_nonfinite=3", "checkpoint.every=0")
    nan = "point=train.after_backward,rank=1,action=nan"
    [first, _] = ends(base, config, f"point=train.step_start,step=3,action=term;{nan}")
    assert first.message.startswith("stopped after step 2")
    [again, _] = ends(base, config, nan)
    assert again.message.startswith("step 3 is not finite")
    assert "3 such step(s) in a row" in again.message


# ------------------------------------------------------------------------------------------- folders and texts
def test_a_folder_with_a_live_run_names_its_owner(base: Path, tmp_path: Path) -> None:
    config = make_config(base, "owned")
    owner = open_run_folder(Path(config.out))
    try:
        for end in ends(base, config):
            assert end.code == 2
            assert re.search(rf"is in use by process {os.getpid()} on \S+", end.message)
        assert not (Path(config.out) / "run_status.json").exists()
    finally:
        close_run_folder(owner)


def test_a_folder_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for end in ends(base, make_config(base, "x", f"out={tmp_path}/file/run")):
        assert end.code == 2
        assert f"out={tmp_path}/file/run cannot be written" in end.message


@pytest.mark.parametrize(
    ("size", "says"), [(0, "0 training tokens"), (10, "11 training tokens in 1 documents"), (16, None)]
)
def test_texts_that_are_too_short_and_one_that_is_just_enough(
    size: int, says: str | None, base: Path
) -> None:
    text = write_text(base / f"short-{size}", size)
    overrides = [f"data.sources.0.path={text}", "data.sources.0.val_path=null", "train.steps=2"]
    config = make_config(base, f"short-run-{size}", *overrides)
    for end in ends(base, config):
        assert end.code == (0 if says is None else 3)
        assert says is None or says in end.message
    assert status(Path(config.out))["exit_code"] == (0 if says is None else 3)
    if says is None:  # one window, four times per step, and no validation text
        assert [line["val"] for line in history(Path(config.out))] == [{}, {}]
        assert json.loads((Path(config.out) / "summary.json").read_text())["validation"] == []


def test_a_missing_text_is_an_error_on_all_ranks(base: Path) -> None:
    for end in ends(base, make_config(base, "no-text", f"data.sources.0.path={base}/nowhere")):
        assert end.code == 3
        assert "nowhere" in end.message


def test_a_full_disk_fails_the_save_and_keeps_the_older_checkpoint(base: Path, reference: Path) -> None:
    config = make_config(base, "full")
    fault = "point=ckpt.before_manifest,step=10,action=enospc"
    for end in ends(base, config, fault):
        assert end.code == 4
        assert "No space left on device" in end.message
    assert checkpoints(Path(config.out)) == [5]
    finish(base, config)
    assert_same_run(Path(config.out), reference)


def _with_closed_stdout(rank: int, config: Config) -> list[End]:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")
    return attempts(rank, [(config, None)])


def test_a_run_survives_the_reader_of_its_output(base: Path) -> None:
    config = make_config(base, "unread", "train.steps=2")
    assert run_ranks(1, _with_closed_stdout, base, config) == [[End(0)]]
    assert (Path(config.out) / "summary.json").exists()
    shutil.rmtree(config.out)
