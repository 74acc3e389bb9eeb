"""What is left and what is said when a run is over."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

import epmoe.train.run
from epmoe.config import Config
from epmoe.data.yardsticks import Yardsticks
from epmoe.errors import Preempted
from epmoe.train.evaluate import Evaluation
from epmoe.train.final_report import _verdict
from tests.distributed.harness import run_ranks
from tests.distributed.runs import End, attempt, finish, make_config, status


def test_the_results_of_a_run(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    [result] = summary["validation"]
    assert result["name"] == "words"
    assert result["num_tokens"] == 900
    assert result["drop_rate"] == 0.0
    last = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["loss"] == last["val"]["words"]
    assert 1 < result["bits_per_byte"] < 8
    assert all(1 < result["yardsticks"][name] < 8 for name in ("unigram", "xz", "xz_after_train"))
    [layer] = summary["router_health"]
    assert layer["layer"] == 1
    assert "busiest expert" in layer["sentence"]
    assert summary["sample"].startswith("def ")
    assert len(summary["sample"]) > 4
    svg = (reference / "router.svg").read_text()
    assert svg.startswith("<svg")
    assert "validation words" in svg


def test_the_verdict_says_better_or_worse_than_what() -> None:
    result = Evaluation(name="words", loss=0.5, num_tokens=1000, bits_per_byte=2.0, drop_rate=0.25)
    lines = _verdict(result, Yardsticks(unigram=4.0, xz=1.6, xz_after_train=None), sparse=True)
    assert (
        "0.5000 nats per token, perplexity 1.65, 2.0000 bits per byte (1,000 tokens, drop rate 25.0%)"
        in lines[0]
    )
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "50.0% below 4.0000, the unigram model of the same tokens",
        "25.0% above 1.6000, the xz -9e of the validation text",
    ]
    known = _verdict(result, Yardsticks(unigram=4.0, xz=None, xz_after_train=0.0), sparse=True)
    assert "inf% above 0.0000" in known[-1]
    sticks = Yardsticks(unigram=4.0, xz=None, xz_after_train=None, xz_left_out="too long")
    without = _verdict(result, sticks, sparse=False)
    assert "(1,000 tokens)" in without[0], "a dense model drops nothing"
    assert [line for line in without if "xz" in line] == [
        "  no comparison with xz of the validation text: too long"
    ]


def test_the_verdict_says_why_there_are_no_bits_per_byte() -> None:
    result = Evaluation(
        name="words", loss=0.5, num_tokens=9, bits_per_byte=None, drop_rate=0.0, bits_left_out="half is lost"
    )
    sticks = Yardsticks(unigram=None, xz=None, xz_after_train=None, xz_left_out="no text")
    first, why = _verdict(result, sticks, sparse=True)
    assert first.endswith("perplexity 1.65 (9 tokens, drop rate 0.0%)")
    assert why == "  no bits per byte: half is lost"


def test_the_last_evaluation_can_be_bounded_and_says_how_far_it_is(
    base: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = functools.partial(epmoe.train.run.plain_progress, every_s=0.0)
    monkeypatch.setattr("epmoe.train.run.plain_progress", at_once)
    overrides = ["train.final_eval_samples=9", "train.steps=1", "train.sample.tokens=0"]
    folder = finish(base, make_config(base, "bounded", *overrides), world_size=1)
    out, err = capfd.readouterr()
    assert (
        "evaluate: words 0 of 9 windows\nevaluate: words 4 of 9 windows\nevaluate: words 8 of 9 windows\n"
        in err
    )
    assert "no bits per byte: 9 of 57 windows were read" in out
    [result] = json.loads((folder / "summary.json").read_text())["validation"]
    assert result["bits_per_byte"] is None
    assert 0 < result["num_tokens"] <= 9 * 16


def test_a_run_may_leave_the_sample_out(base: Path) -> None:
    folder = finish(
        base, make_config(base, "no-sample", "train.steps=1", "train.sample.tokens=0"), world_size=1
    )
    assert json.loads((folder / "summary.json").read_text())["sample"] == ""


def _asked_to_stop_while_it_compresses(rank: int, config: Config) -> list[End]:
    import epmoe.train.final_report

    original = epmoe.train.final_report.yardsticks

    def interrupted(*_: object, **__: object) -> Yardsticks:
        raise Preempted("asked to stop")

    epmoe.train.final_report.yardsticks = interrupted
    first = attempt(rank, config)
    state = status(Path(config.out))["state"]
    epmoe.train.final_report.yardsticks = original
    return [first, End(0, state), attempt(rank, config)]


def test_a_signal_during_the_report_loses_only_the_report(base: Path) -> None:
    config = make_config(base, "report", "train.steps=2", "train.sample.tokens=0")
    [[first, state, second]] = run_ranks(1, _asked_to_stop_while_it_compresses, base, config)
    assert first.code == 75
    assert "stopped during the final report; training is done" in first.message
    assert state.message == "stopped"
    assert second == End(0)
    assert (Path(config.out) / "summary.json").exists()


def test_without_validation_text_it_says_so(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.sources.0.val_path=null", "train.steps=1", "train.sample.tokens=0"]
    folder = finish(base, make_config(base, "no-validation", *overrides), world_size=1)
    assert "no source has validation text" in capfd.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["validation"] == []
