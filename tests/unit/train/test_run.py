"""A run in one process, and what it writes about itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import epmoe.train.run
from epmoe.config import Config
from epmoe.config_file import load_config, override_config
from epmoe.process.lost_peers import is_out_of_memory
from epmoe.train.run import _finished_at, _out_of_memory
from tests.distributed.harness import rank_outcomes
from tests.distributed.runs import End, attempt, checkpoints, history, make_config, status


def _alone(rank: int, config: Config) -> End:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return attempt(rank, config)


def test_one_process_without_a_launcher(base: Path) -> None:
    config = make_config(base, "alone", "train.steps=3", "checkpoint.every=1", "checkpoint.keep=2")
    [outcome] = rank_outcomes(1, _alone, base, config, join_group=False)
    assert outcome.result == End(0), outcome.error
    folder = Path(config.out)
    assert status(folder) == {"state": "done", "exit_code": 0, "step": 3, "message": ""}
    assert checkpoints(folder) == [2, 3]
    assert [line["step"] for line in history(folder)] == [1, 2, 3]
    assert load_config(folder / "config.yaml") == config
    description = json.loads((folder / "run.json").read_text())
    assert description["config"] == config.model_dump(mode="json")
    assert description["argv"] == ["epmoe", "train"]
    assert description["world_size"] == 1
    assert {"torch", "python", "epmoe"} <= description["versions"].keys()
    left = {path.name for path in folder.iterdir()}
    assert left == {
        *("ckpt", "config.yaml", "metrics.jsonl", "router.svg", "run.json", "run_status.json"),
        *("summary.json", "tensorboard", "tokenizer"),
    }


def _passes(rank: int, configs: list[Config]) -> list[tuple[int, End]]:
    sizes: list[int] = []
    real = epmoe.train.run.evaluate

    def noted(*args: Any, **named: Any) -> Any:
        sizes.append(named["batch_size"])
        return real(*args, **named)

    epmoe.train.run.evaluate = noted  # in this forked process only
    return [(sizes[-1], end) for config in configs for end in [_alone(rank, config)]]


def test_evaluations_have_a_batch_size_of_their_own(base: Path) -> None:
    few, many = ("train.steps=2", "train.global_batch_size=1"), ("train.eval_batch_size=7",)
    configs = [make_config(base, "eval-as-training", *few), make_config(base, "eval-batch", *few, *many)]
    [outcome] = rank_outcomes(1, _passes, base, configs, join_group=False)
    assert outcome.result == [(1, End(0)), (7, End(0))], outcome.error
    first, second = (history(Path(config.out))[-1]["val"] for config in configs)
    assert first == pytest.approx(second, rel=1e-6)


def _with_secrets(rank: int, config: Config) -> list[End]:
    os.environ["NCCL_AUTH"] = "c4n4ry"
    return [_alone(rank, override_config(config, [f"train.steps={steps}"])) for steps in (2, 3)]


def test_no_file_of_a_run_holds_a_secret_and_it_resumes_all_the_same(base: Path) -> None:
    config = make_config(base, "secrets", "checkpoint.every=1", f"data.sources.0.path={base}/sig=c4n4ry")
    (base / "sig=c4n4ry").symlink_to(base / "train")
    [outcome] = rank_outcomes(1, _with_secrets, base, config, join_group=False)
    assert outcome.result == [End(0), End(0)], outcome.error
    files = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"c4n4ry" in path.read_bytes()] == []
    assert "sig=<redacted>" in (Path(config.out) / "config.yaml").read_text()


def test_more_ranks_and_the_log_interval_do_not_change_what_is_learned(base: Path, reference: Path) -> None:
    config = make_config(base, "sparse-log", "train.log_every=3", "train.sample.tokens=0")
    [outcome] = rank_outcomes(1, attempt, base, config, "point=train.step_start,step=8,action=term")
    assert outcome.result.code == 75
    lines, every = history(Path(config.out)), history(reference)
    assert [line["step"] for line in lines] == [3, 5, 6, 7]  # 5: with the checkpoint
    for line, members in zip(lines, (every[:3], every[3:5], every[5:6], every[6:7]), strict=True):
        assert line["loss"] == pytest.approx(sum(m["loss"] for m in members) / len(members), rel=1e-5)
        layer = line["layers"]["1"]
        assert layer["demand_E"] == [
            sum(n) for n in zip(*(m["layers"]["1"]["demand_E"] for m in members), strict=True)
        ]
        assert layer["valid_tokens"] == sum(m["layers"]["1"]["valid_tokens"] for m in members)


def _write_questions(path: Path, answered_every: int) -> None:
    """Documents of seven windows; of some of them the last letters count in the loss."""
    with path.open("w") as lines:
        for number in range(60):
            text = f"question {number} " * 9
            ranges = [[len(text) - 6, len(text)]] if number % answered_every == 0 else []
            lines.write(json.dumps({"text": text, "ranges": ranges}) + "\n")


def test_steps_without_a_token_in_the_loss_are_null_counted_and_warned_about(
    base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _write_questions(base / "questions.jsonl", answered_every=3)
    source = {"name": "q", "path": str(base / "questions.jsonl"), "loss_field": "ranges"}
    config = make_config(base, "empty", "checkpoint.every=0", f"data.sources=[{json.dumps(source)}]")
    [outcome] = rank_outcomes(1, attempt, base, config)
    assert outcome.result == End(0), outcome.error
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    empty = [line for line in lines if line["loss_tokens"] == 0]
    assert 0 < len(empty) == lines[-1]["empty_steps"] < len(lines)
    for line in lines:
        assert (line["loss"] is None) == (line["loss_tokens"] == 0)
        assert 0.9 < line["aux"]["balance"] < 2.0  # not a hundred times as much
        valid = line["layers"]["1"]["valid_tokens"]
        assert line["tokens_per_second"] == pytest.approx(valid / line["seconds_per_step"])
    longer = override_config(config, ["train.steps=23"])
    [outcome] = rank_outcomes(1, attempt, base, longer)
    assert outcome.result == End(0), outcome.error
    assert history(Path(config.out))[-1]["empty_steps"] >= len(empty)  # counted over all attempts
    said = capfd.readouterr().out
    assert "the learning rate goes on at" in said
    assert said.count("had no token that counts in the loss") == 2  # once by each attempt
    assert "eta=?" not in said


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ('{"state": "done", "step": 12}', 12),
        ('{"state": "stopped", "step": 12}', 0),
        ('{"state": "done", "step": null}', 0),
        ('{"state": "done"', 0),
        ("[]", 0),
    ],
)
def test_when_a_run_counts_as_finished(text: str, step: int, tmp_path: Path) -> None:
    assert _finished_at(tmp_path) == 0
    (tmp_path / "run_status.json").write_text(text)
    assert _finished_at(tmp_path) == step


def test_out_of_memory_is_recognised_and_explained() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    for message in ("CUDA out of memory. Tried to allocate\nmore", ""):
        error = _out_of_memory(Config(), torch.OutOfMemoryError(message))
        assert error.exit_code == 6
        assert "256 tokens" in error.what
