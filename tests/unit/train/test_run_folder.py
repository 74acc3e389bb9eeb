"""The run folder: one owner at a time, what is recorded, and runs that do not get anywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epmoe import env
from epmoe.errors import CommError, ConfigError, NoProgress
from epmoe.train import lock
from epmoe.train.run_folder import (
    RunFolder,
    close_run_folder,
    describe_run,
    open_run_folder,
    record_failure,
    record_state,
)
from epmoe.train.status import (
    MAX_ATTEMPTS,
    Status,
    attempts_from,
    count_attempt,
    failed,
    forget_attempts,
    note_run,
    noted_exit,
    read_status,
    record_failed_start,
    refuse_if_stuck,
    write_status,
)

HOST = socket.gethostname()


def _child(fn: Any, *args: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=fn, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def _lock_and_die(path: Path) -> None:
    open_run_folder(path)
    os._exit(0)


# ------------------------------------------------------------------------------------------- lock
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    if kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    says = "is a link to .*nowhere" if kind == "link" else "is no file that can be read"
    with pytest.raises(ConfigError, match=says):
        open_run_folder(tmp_path)
    assert os.path.lexists(path)


def test_a_second_run_is_refused_and_told_who_owns_the_folder(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        open_run_folder(tmp_path / "out")
    assert f"in use by process {os.getpid()} on {HOST}" in str(caught.value)
    close_run_folder(run)
    close_run_folder(open_run_folder(tmp_path / "out"))
    assert not (tmp_path / "out" / ".lock").exists()


def test_the_lock_of_a_dead_process_is_reclaimed(tmp_path: Path) -> None:
    _child(_lock_and_die, tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"{HOST}:")
    run = open_run_folder(tmp_path)
    assert f":{os.getpid()}:" in (tmp_path / ".lock").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    close_run_folder(run)


@pytest.mark.parametrize(
    "owner",
    [f"{HOST}:{os.getpid()}:12345:", f"{HOST}:4194305:1:", "", "nonsense", f"{HOST}:pid:1:"],
    ids=["pid in use again", "no such pid", "empty", "damaged", "no number"],
)
def test_a_stale_or_damaged_lock_is_reclaimed(owner: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(owner)
    close_run_folder(open_run_folder(tmp_path))


def test_a_lock_from_another_machine_is_respected_unless_slurm_requeued_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for owner in ("elsewhere:1:1:", "elsewhere:1:1:42"):
        (tmp_path / ".lock").write_text(owner)
        with pytest.raises(ConfigError, match="process 1 on elsewhere"):
            open_run_folder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    close_run_folder(open_run_folder(tmp_path))


def test_a_lock_of_a_machine_that_has_been_silent_for_minutes_is_taken_over(tmp_path: Path) -> None:
    for silent_s, taken in ((lock.SILENT_S - 60, False), (lock.SILENT_S + 60, True)):
        (tmp_path / ".lock").write_text("elsewhere:1:1:")
        os.utime(tmp_path / ".lock", (0, time.time() - silent_s))
        if not taken:
            with pytest.raises(ConfigError, match="5 minutes after its last sign of life"):
                open_run_folder(tmp_path)
            continue
        close_run_folder(open_run_folder(tmp_path))


def test_an_owner_shows_that_it_lives_until_it_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    run = open_run_folder(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    deadline = time.monotonic() + 10
    while lock.age_s(tmp_path / ".lock") > 60 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.age_s(tmp_path / ".lock") < 60
    close_run_folder(run)
    assert run.closed.is_set()
    assert lock.age_s(tmp_path / ".lock") == float("inf")


def test_closing_leaves_a_lock_that_is_not_ours(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path)
    (tmp_path / ".lock").write_text("elsewhere:1:1:")
    close_run_folder(run)
    assert (tmp_path / ".lock").exists()


RACERS = 6


def _race(path: Path, go_at: float) -> None:
    time.sleep(max(0.0, go_at - time.time()))
    try:
        open_run_folder(path)
        (path / f"won-{os.getpid()}").touch()
        while len(list(path.glob("lost-*"))) < RACERS - 1 and time.time() < go_at + 30:
            time.sleep(0.02)  # alive while the others look
    except ConfigError:
        (path / f"lost-{os.getpid()}").touch()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(f"{HOST}:4194305:1:")
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(tmp_path, time.time() + 0.2)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(list(tmp_path.glob("won-*"))) == 1
    assert len(list(tmp_path.glob("lost-*"))) == RACERS - 1


@pytest.mark.parametrize("where", ["file/out", "/proc/epmoe"])
def test_a_folder_that_cannot_be_written_is_a_config_error(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_run_folder(tmp_path / where)


# ------------------------------------------------------------------------------------------- records
@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(path=tmp_path, attempt="here:1:2:", is_writer=True, closed=threading.Event())


def test_run_json_holds_what_is_needed_to_repeat_the_run_and_no_secrets(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "c4n4ry"
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SLURM_JWT_TOKEN", canary)
    monkeypatch.setenv("TORCH_URL", f"https://user:{canary}@host/x")
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("HOME_SWEET_HOME", canary)
    config = {"seed": 3, "data": {"sources": [{"path": f"s3://me:{canary}@bucket/x"}]}}
    describe_run(run, config, ["train", f"data.url=http://a:{canary}@b/c", f"api_key={canary}", "seed=3"])
    text = (run.path / "run.json").read_text()
    assert canary not in text
    described = json.loads(text)
    assert described["config"] == {"seed": 3, "data": {"sources": [{"path": "s3://<redacted>@bucket/x"}]}}
    assert described["argv"] == ["train", "data.url=http://<redacted>@b/c", "api_key=<redacted>", "seed=3"]
    assert described["environment"]["NCCL_DEBUG"] == "WARN"
    assert described["environment"]["SLURM_JWT_TOKEN"] == "<redacted>"
    assert {"HF_TOKEN", "HOME_SWEET_HOME"}.isdisjoint(described["environment"])
    assert set(described["versions"]) == {"epmoe", "python", "torch", "numpy", "cuda"}
    assert described["hardware"]["cores"] >= 1
    assert described["world_size"] == 1


def test_ordinary_settings_are_not_taken_for_secrets() -> None:
    for text in (
        "data.tokenizer=bpe",
        "data.eos_token=[SEP]",
        "train.sample.tokens=120",
        "a/b@c",
        "monkey=1",
        "design=2",
        "moe.router: unknown key: rooter",
        "author: a name",
    ):
        assert env.redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "WANDB_API_KEY=c4n4ry",
        "https://host/x?version=3&sig=c4n4ry&part=1",
        "https://host/x?X-Amz-Signature=c4n4ry",
        "https://me:c4n4ry@host/x",
        "Authorization: Bearer c4n4ry",
        "Cookie: c4n4ry; path=/",
        "x-api-key: c4n4ry",
        '{"password": "c4n4ry"}',
        "pwd=c4n4ry",
        "--hf-token=c4n4ry",
        "auth=c4n4ry",
        "jwt=c4n4ry",
    ],
)
def test_what_looks_like_a_secret_is_masked_in_any_text(text: str) -> None:
    assert "c4n4ry" not in env.redact(text)
    assert "<redacted>" in env.redact(text)


@pytest.mark.parametrize("prefix", env.RECORDED)
@pytest.mark.parametrize(
    "word",
    ["API_KEY", "TOKEN", "SECRET", "PASSWORD", "PWD", "CREDENTIAL", "JWT", "AUTH", "SIGNATURE", "COOKIE"],
)
def test_a_secret_variable_of_every_recorded_prefix_is_masked(
    prefix: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{prefix}{'' if prefix.endswith('_') else '_'}{word}"
    monkeypatch.setenv(name, "c4n4ry")
    assert env.recorded()[name] == "<redacted>"


def test_status_says_how_the_run_ended(run: RunFolder) -> None:
    record_state(run, "stopped", exit_code=75, step=12, message="SIGTERM with token=c4n4ry")
    status = json.loads((run.path / "run_status.json").read_text())
    assert status.pop("written")[:2] == "20"
    assert status == {
        **{"state": "stopped", "attempt": "here:1:2:", "exit_code": 75, "step": 12, "rank": None},
        **{"saved": None, "message": "SIGTERM with token=<redacted>", "earlier": None},
    }


def _place(rank: int, leads: bool) -> Any:
    return SimpleNamespace(rank=rank, responder=SimpleNamespace(leads=leads))


@pytest.mark.parametrize("before", ["running", "stopped", "failed", None])
def test_in_place_of_rank_0_another_rank_writes_what_it_has_not(run: RunFolder, before: str | None) -> None:
    if before is not None:
        record_state(run, before, exit_code=75)
    record_failure(
        replace(run, is_writer=False), CommError("lost rank 0"), step=3, place=_place(1, leads=True)
    )
    status = read_status(run.path)
    assert (status and status.exit_code) == {"running": 7, None: None}.get(before, 75)


def test_only_rank_0_writes(run: RunFolder) -> None:
    other = replace(run, is_writer=False)
    record_state(other, "running")
    record_failure(other, CommError("lost rank 2"), step=3, place=_place(1, leads=False))
    describe_run(other, {}, [])
    close_run_folder(other)
    assert list(run.path.iterdir()) == []


def test_a_failure_is_recorded_with_the_step_and_the_rank_where_it_began(run: RunFolder) -> None:
    lost = CommError("rank 0 lost rank 3")
    lost.rank, lost.exit_code = 3, 6
    record_failure(run, lost, step=8, place=_place(0, leads=True))
    status = read_status(run.path)
    assert status is not None
    assert (status.state, status.exit_code, status.step, status.rank) == ("failed", 6, 8, 3)
    record_failure(run, RuntimeError("a bug"), step=9, place=_place(0, leads=True))
    status = read_status(run.path)
    assert status is not None
    assert (status.exit_code, status.step, status.rank, status.message) == (1, 9, 0, "RuntimeError: a bug")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": 3}', '{"state": "done", "step": "12"}'])
def test_a_damaged_status_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "run_status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_a_full_disk_does_not_hide_what_is_recorded(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("epmoe.train.status.write_json", _full)
    record_failure(run, RuntimeError("a bug"), step=9, place=_place(0, leads=True))
    assert "No space left" in capsys.readouterr().err


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------------- restart budget
def test_the_same_step_may_fail_three_times(tmp_path: Path) -> None:
    assert [count_attempt(tmp_path, 5, {"lr": 1}) for _ in range(MAX_ATTEMPTS)] == [1, 2, 3]
    with pytest.raises(NoProgress, match="3 attempts from step 5 failed") as caught:
        count_attempt(tmp_path, 5, {"lr": 1})
    assert caught.value.exit_code == 93
    assert "attempts.json" in str(caught.value)


def test_progress_another_configuration_or_a_clean_end_starts_a_new_count(run: RunFolder) -> None:
    for _ in range(MAX_ATTEMPTS):
        count_attempt(run.path, 5, {"lr": 1})
    assert count_attempt(run.path, 6, {"lr": 1}) == 1
    assert count_attempt(run.path, 6, {"lr": 2}) == 1
    assert count_attempt(run.path, 6, {"lr": 2}) == 2
    record_state(run, "stopped", exit_code=75)
    assert count_attempt(run.path, 6, {"lr": 2}) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": 3}', '{"config": "x", "steps": {"5": "many"}}'])
def test_a_damaged_attempts_file_does_not_stop_a_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "attempts.json").write_text(text)
    assert count_attempt(tmp_path, 5, {}) == 1


def _used_up(path: Path, step: int) -> None:
    (path / "ckpt" / f"step_{step:09d}").mkdir(parents=True)
    for _ in range(MAX_ATTEMPTS):
        count_attempt(path, step, {})


def test_without_an_attempt_left_a_run_is_refused_at_once_and_the_first_cause_stays(tmp_path: Path) -> None:
    _used_up(tmp_path, 5)
    write_status(tmp_path, failed(CommError("lost rank 1"), step=6, rank=0, attempt="a", folder=tmp_path))
    for _ in range(2):
        with pytest.raises(NoProgress, match="exit code 7, CommError: lost rank 1"):
            refuse_if_stuck(tmp_path, {})
        status = read_status(tmp_path)
        assert status is not None
        assert status.exit_code == 93
        assert status.earlier is not None
        assert (status.earlier.exit_code, status.earlier.step, status.earlier.attempt) == (7, 6, "a")


def test_a_run_that_may_go_on_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_if_stuck(tmp_path, {})
    _used_up(tmp_path, 5)
    refuse_if_stuck(tmp_path, {"lr": 1})
    (tmp_path / ".lock").write_text(lock.identity())
    refuse_if_stuck(tmp_path, {})  # it runs: what stands there is not yet true
    (tmp_path / ".lock").unlink()
    (tmp_path / "ckpt" / "step_000000007").mkdir()
    refuse_if_stuck(tmp_path, {})
    assert attempts_from(tmp_path, 5, {}) == MAX_ATTEMPTS
    forget_attempts(tmp_path)
    assert read_status(tmp_path) is None


def test_an_end_before_the_run_had_its_folder_is_recorded_there(tmp_path: Path) -> None:
    record_failed_start(tmp_path / "none", CommError("nobody came"))
    assert not (tmp_path / "none").exists()
    write_status(tmp_path, Status(state="stopped", attempt="before", exit_code=75))
    (tmp_path / ".lock").write_text(lock.identity())  # alive: that is its business
    record_failed_start(tmp_path, CommError("nobody came"))
    assert _code(tmp_path) == 75
    (tmp_path / ".lock").unlink()
    record_failed_start(tmp_path, CommError("nobody came"))
    assert _code(tmp_path) == 7
    record_failed_start(tmp_path, ConfigError("later"))  # the first cause stays
    assert _code(tmp_path) == 7


def _code(folder: Path) -> int | None:
    status = read_status(folder)
    return status and status.exit_code


# ------------------------------------------------------------------------------------------- for the launcher above
def test_the_exit_code_is_that_of_this_attempt_and_not_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    out.mkdir()
    monkeypatch.setenv("EPMOE_LAUNCH_NOTES", str(notes))
    write_status(out, Status(state="stopped", attempt="first", exit_code=75))
    assert noted_exit(notes) is None
    (notes / "11.exit").write_text("0")
    (notes / "12.exit").write_text("7")
    note_run(out, "second")
    assert noted_exit(notes) == 7
    write_status(out, Status(state="running", attempt="second"))
    assert noted_exit(notes) == 7
    write_status(out, Status(state="failed", attempt="second", exit_code=6))
    assert noted_exit(notes) == 6
