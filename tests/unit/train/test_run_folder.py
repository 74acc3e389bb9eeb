"""The run folder: one owner at a time, what is recorded, and runs that do not get anywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from epmoe import env
from epmoe.errors import ConfigError, NoProgress
from epmoe.train.run_folder import (
    MAX_ATTEMPTS,
    RunFolder,
    begin_attempt,
    close_run_folder,
    describe_run,
    end_attempt,
    open_run_folder,
    read_status,
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
def test_a_second_run_is_refused_and_told_who_owns_the_folder(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        open_run_folder(tmp_path / "out")
    assert f"in use by process {os.getpid()} on {HOST}" in str(caught.value)
    assert ".lock" in str(caught.value)
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
    return RunFolder(path=tmp_path, is_writer=True)


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
    write_status(run, "stopped", exit_code=75, step=12, message="SIGTERM")
    status = json.loads((run.path / "run_status.json").read_text())
    assert status == {"state": "stopped", "exit_code": 75, "step": 12, "message": "SIGTERM"}


@pytest.mark.parametrize("before", ["running", "stopped", "failed", None])
def test_in_place_of_rank_0_another_rank_writes_what_it_has_not(run: RunFolder, before: str | None) -> None:
    if before is not None:
        write_status(run, before, exit_code=75)
    other = RunFolder(path=run.path, is_writer=False)
    write_status(other, "failed", exit_code=7, in_place_of_rank_zero=True)
    wanted = {} if before is None else {"exit_code": 7 if before == "running" else 75}
    assert wanted.items() <= read_status(run.path).items()
    assert (read_status(run.path) == {}) == (before is None)


def test_only_rank_0_writes(tmp_path: Path) -> None:
    other = RunFolder(path=tmp_path, is_writer=False)
    write_status(other, "running")
    describe_run(other, {}, [])
    end_attempt(other)
    close_run_folder(other)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- restart budget
def test_the_same_step_may_fail_three_times(run: RunFolder) -> None:
    assert [begin_attempt(run, 5, {"lr": 1}) for _ in range(MAX_ATTEMPTS)] == [1, 2, 3]
    with pytest.raises(NoProgress, match="3 attempts from step 5 failed") as caught:
        begin_attempt(run, 5, {"lr": 1})
    assert caught.value.exit_code == 93
    assert "attempts.json" in str(caught.value)


def test_progress_another_configuration_or_a_clean_end_starts_a_new_count(run: RunFolder) -> None:
    for _ in range(MAX_ATTEMPTS):
        begin_attempt(run, 5, {"lr": 1})
    assert begin_attempt(run, 6, {"lr": 1}) == 1
    assert begin_attempt(run, 6, {"lr": 2}) == 1
    assert begin_attempt(run, 6, {"lr": 2}) == 2
    end_attempt(run)
    assert begin_attempt(run, 6, {"lr": 2}) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": 3}', '{"config": "x", "steps": {"5": "many"}}'])
def test_a_damaged_attempts_file_does_not_stop_a_run(text: str, run: RunFolder) -> None:
    (run.path / "attempts.json").write_text(text)
    assert begin_attempt(run, 5, {}) == 1
