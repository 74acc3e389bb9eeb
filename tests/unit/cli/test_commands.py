"""The commands that do something, from their arguments to what they print."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import epmoe.cli
from epmoe.cli.explain import explain
from epmoe.cli.generate import generate
from epmoe.config import Config
from epmoe.config_file import dump_config, load_config
from epmoe.data.tokenizer import JsonTokenizer, json_tokenizer, load_tokenizer
from epmoe.models.sizes import count_parameters
from tests.distributed.harness import rank_outcomes
from tests.distributed.runs import finish, make_config

PROMPT = "abc é "


@dataclass(frozen=True)
class Done:
    """A command that has run."""

    code: int
    out: str
    err: str


def _commands(rank: int, lines: dict[str, tuple[list[str], str]]) -> dict[str, Done]:
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {}
    for name, (arguments, typed) in lines.items():
        sys.stdin = io.StringIO(typed)
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            code: object = 0
            try:
                epmoe.cli.main(arguments)
            except SystemExit as end:
                code = end.code or 0
        found[name] = Done(int(code), out.getvalue(), err.getvalue())  # type: ignore[call-overload]
    return found


def run_commands(base: Path, lines: dict[str, tuple[list[str], str]]) -> dict[str, Done]:
    """Each command with what is typed into it, all in one forked process."""
    [outcome] = rank_outcomes(1, _commands, base, lines, join_group=False)
    assert outcome.error is None, outcome.error
    found: dict[str, Done] = outcome.result
    return found


@pytest.fixture(scope="module")
def precise(base: Path) -> Path:
    """A float64 run of two ranks, its validation with the training's capacity."""
    overrides = ["train.precision=fp64", "train.steps=3", "train.sample.tokens=0", "train.micro_batch_size=1"]
    return finish(base, make_config(base, "precise", *overrides))


@pytest.fixture(scope="module")
def done(base: Path, reference: Path, precise: Path) -> dict[str, Done]:
    file = base / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    (base / "marked.txt").write_text(PROMPT, encoding="utf-8-sig")
    (base / "latin.txt").write_text("naïve", encoding="latin-1")
    (base / "short").write_text("short")
    again = ["generate", str(reference), "--max-tokens", "4", "--prompt", "def "]
    likeliest = ["generate", str(reference), "--max-tokens", "6", "--temperature", "0"]
    config = base / "prepare.yaml"
    config.write_text(dump_config(make_config(base, "never")))
    lines = {
        "eval": ["eval", str(reference)],
        "eval json": ["eval", str(reference), "--json"],
        "eval precise": ["eval", str(precise), "--json"],
        "eval newest": ["eval", str(reference / "ckpt" / "step_000000020"), "--json"],
        "eval older": ["eval", str(reference / "ckpt" / "step_000000015"), "--json"],
        "eval other text": ["eval", str(reference), f"data.sources.0.val_path={base}/train", "--json"],
        "eval other tokenizer": ["eval", str(reference), "data.tokenizer=bpe", "data.vocab_size=300"],
        "eval nothing": ["eval", str(base / "val")],
        "eval other model": ["eval", str(reference), "moe.top_k=1", "data.seq_len=8", "model.d_model=3"],
        "eval no text": ["eval", str(reference), "data.sources.0.val_path=null"],
        "eval short": ["eval", str(precise), "--json", "data.cross_document=false", "data.seq_len=8"],
        "eval capacity": [
            "eval",
            str(reference),
            "--json",
            "moe.capacity_factor=4",
            "train.micro_batch_size=2",
        ],
        "eval little text": ["eval", str(reference), f"data.sources.0.path={base}/short"],
        "eval some": ["eval", str(reference), "--json", "train.final_eval_samples=7"],
        "eval half": ["eval", str(reference), "--json", "train.precision=bf16_params"],
        "sample": [*again, "--seed", "5"],
        "seed 1": [*again, "--seed", "1", "--temperature", "2"],
        "seed 1 again": [*again, "--seed", "1", "--temperature", "2"],
        "seed 2": [*again, "--seed", "2", "--temperature", "2"],
        "prompt": [*likeliest, "--prompt", PROMPT],
        "prompt file": [*likeliest, "--prompt-file", str(file)],
        "prompt stdin": [*likeliest, "--prompt-file", "-"],
        "prompt of the run": likeliest,
        "prompt marked": [*likeliest, "--prompt-file", str(base / "marked.txt")],
        "prompt latin file": [*likeliest, "--prompt-file", str(base / "latin.txt")],
        "prompt latin": [*likeliest, "--prompt", "caf\udce9"],
        "prompt ascii locale": [*likeliest, "--prompt", PROMPT.encode().decode("ascii", "surrogateescape")],
        "prompt empty": [*likeliest, "--prompt", ""],
        "prompt missing": [*likeliest, "--prompt-file", str(base / "none.txt")],
        "prepare": ["prepare", str(config)],
        "dry run": ["train", str(config), "moe.top_k=2", "--dry-run"],
        "too many": ["train", str(config), "moe.router=topk", "moe.top_k=5"],
    }
    return run_commands(base, {name: (line, PROMPT) for name, line in lines.items()})


# ------------------------------------------------------------------------------------------- eval
@pytest.mark.parametrize(("name", "tolerance"), [("eval json", 1e-5), ("eval precise", 1e-9)])
def test_eval_finds_the_figure_the_run_ended_with(
    name: str, tolerance: float, done: dict[str, Done], reference: Path, precise: Path
) -> None:
    folder = reference if name == "eval json" else precise
    [wanted] = json.loads((folder / "summary.json").read_text())["validation"]
    modes = json.loads(done[name].out)
    assert list(modes) == ["dropless", "capacity factor 1.0"]
    [dropless], [capacity] = modes.values()
    assert dropless["loss"] == pytest.approx(wanted["loss"], rel=tolerance)
    assert dropless["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=tolerance)
    assert dropless["num_tokens"] == wanted["num_tokens"]
    assert (dropless["drop_rate"], wanted["drop_rate"]) == (0.0, 0.0)
    assert capacity["drop_rate"] > 0.05
    assert capacity["loss"] != dropless["loss"]


def test_eval_takes_a_run_or_one_of_its_checkpoints(done: dict[str, Done]) -> None:
    assert done["eval newest"].out == done["eval json"].out
    older, newest = (json.loads(done[f"eval {which}"].out)["dropless"][0] for which in ("older", "newest"))
    assert older["loss"] > newest["loss"]


def test_eval_prints_a_line_per_source_and_mode(done: dict[str, Done], reference: Path) -> None:
    path, dropless, capacity = done["eval"].out.splitlines()
    [figures] = json.loads(done["eval json"].out)["dropless"]
    assert path == str(reference / "ckpt" / "step_000000020")
    assert dropless.startswith(
        f"  words, dropless: {figures['bits_per_byte']:.4f} bits per byte, perplexity "
    )
    assert dropless.endswith("900 tokens, drop rate 0.00%")
    assert capacity.startswith("  words, capacity factor 1.0: ")


def test_eval_takes_other_text_but_no_other_tokenizer(done: dict[str, Done]) -> None:
    [figures] = json.loads(done["eval other text"].out)["dropless"]
    assert figures["num_tokens"] == 12_000
    assert done["eval other tokenizer"].code == 4
    assert "the model was trained with" in done["eval other tokenizer"].err
    assert done["eval nothing"].code == 4
    assert "holds no usable checkpoint" in done["eval nothing"].err


def test_eval_takes_what_it_uses_and_refuses_the_rest(done: dict[str, Done]) -> None:
    plain, half = (json.loads(done[f"eval {name}"].out)["dropless"][0]["loss"] for name in ("json", "half"))
    assert plain != half == pytest.approx(plain, rel=0.02)
    modes = json.loads(done["eval capacity"].out)
    assert list(modes) == ["dropless", "capacity factor 4.0"]
    assert modes["capacity factor 4.0"][0]["drop_rate"] == 0
    assert json.loads(done["eval short"].out)["dropless"][0]["num_tokens"] == 900
    refused = done["eval other model"]
    assert refused.code == 2
    assert "cannot change moe.top_k, model.d_model\n" in refused.err
    assert (
        "data.*, train.precision, train.micro_batch_size, train.final_eval_samples, moe.capacity_factor"
        in refused.err
    )


def test_eval_without_validation_text_says_why(done: dict[str, Done]) -> None:
    assert (done["eval no text"].code, done["eval no text"].out) == (3, "")
    assert "no source has validation text: words" in done["eval no text"].err
    assert "data.sources.0.val_path=PATH" in done["eval no text"].err


def test_eval_needs_no_training_text(done: dict[str, Done]) -> None:
    assert done["eval little text"].code == 0
    assert done["eval little text"].out == done["eval"].out


def test_eval_of_some_windows_has_no_bits_per_byte(done: dict[str, Done]) -> None:
    some, whole = (json.loads(done[name].out)["dropless"][0] for name in ("eval some", "eval json"))
    assert 0 < some["num_tokens"] < whole["num_tokens"]
    assert some["bits_per_byte"] is None
    assert some["bits_left_out"] == "7 of 57 windows were read"
    assert whole["bits_left_out"] is None


def test_eval_names_the_tokenizer_of_the_run(done: dict[str, Done], reference: Path) -> None:
    assert f"data.tokenizer={reference}/tokenizer uses the run's own" in done["eval other tokenizer"].err
    assert load_tokenizer(reference / "tokenizer").name == "byte"


# ------------------------------------------------------------------------------------------- generate
def metaspace() -> JsonTokenizer:
    """A tokenizer of whole words whose decoder leaves out the space before the first of them."""
    inner = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "▁one": 1, "▁two": 2, "▁three": 3}, "</s>"))
    inner.add_special_tokens(["</s>"])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return json_tokenizer(inner.to_str().encode(), name="words")


def test_the_space_between_prompt_and_continuation_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = metaspace()
    trained = types.SimpleNamespace(tokenizer=tokenizer, model=None)
    monkeypatch.setattr("epmoe.cli.generate.load_trained", lambda *_, **__: trained)
    monkeypatch.setattr("epmoe.cli.generate.generate_tokens", lambda *_, **__: iter([2, 3]))
    trained.config = Config()
    for prompt, shown in (
        ("one", "one two three\n"),
        ("one  two", "one  two two three\n"),
        ("", "two three\n"),
    ):
        generate(Path("run"), prompt, None, 2, 0.0, None, 1.0, 0)
        assert capsys.readouterr().out == shown


def test_generate_repeats_the_sample_of_the_run(done: dict[str, Done], reference: Path) -> None:
    sample = json.loads((reference / "summary.json").read_text())["sample"]
    assert done["sample"].out == sample + "\n"


def test_the_seed_decides(done: dict[str, Done]) -> None:
    assert done["seed 1"] == done["seed 1 again"]
    assert done["seed 1"].out != done["seed 2"].out
    assert done["seed 1"].out.startswith("def ")


def test_the_prompt_may_come_from_anywhere(done: dict[str, Done]) -> None:
    assert done["prompt"].out.startswith(PROMPT)
    assert len(done["prompt"].out) > len(PROMPT) + 1
    assert done["prompt"] == done["prompt file"] == done["prompt stdin"]
    assert done["prompt"] == done["prompt marked"] == done["prompt ascii locale"]
    for name in ("prompt latin", "prompt latin file"):
        assert done[name].code == 2
        assert "prompt" in done[name].err
    assert "the prompt is not UTF-8" in done["prompt latin"].err
    assert done["prompt of the run"].out.startswith("def ")
    assert done["prompt empty"].code == 0
    assert done["prompt missing"].code == 2
    assert "cannot read the prompt" in done["prompt missing"].err


# ------------------------------------------------------------------------------------------- prepare and train
def test_prepare_counts_the_text(done: dict[str, Done]) -> None:
    rows = [line.split() for line in done["prepare"].out.splitlines()]
    # Tokens are bytes here, and one end-of-text.
    assert ["words", "train", "1", "12,001", "12,000", "1.00", "0", "0"] in rows
    assert ["words", "val", "1", "901", "900", "1.00", "0", "0"] in rows


def test_a_dry_run_shows_the_whole_configuration_and_makes_nothing(
    done: dict[str, Done], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = done["dry run"].out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_config(tmp_path / "shown.yaml") == make_config(base, "never")
    facts = dict(line[2:].split(": ", 1) for line in shown.splitlines() if line.startswith("# "))
    # embedding 320x16; per layer attention 4x16x16, norms 2x16; dense FFN 3x16x24; 4 experts of it and a router 4x16
    total = 320 * 16 + 2 * (4 * 16 * 16 + 2 * 16) + 16 + 5 * (3 * 16 * 24) + 4 * 16
    assert facts["parameters"].startswith(f"{total:,} in all, {total - 2 * 3 * 16 * 24:,} active per token")
    assert facts["ranks"].startswith("1, ep_size 1")
    assert facts["tokens"] == "64 per step, 1,280 in 20 steps"
    assert not (base / "never").exists()


def test_a_dry_run_knows_what_shards_leave_on_a_rank() -> None:
    def memory(engine: dict[str, object], precision: str) -> int:
        values = {"parallel": {"ep_size": 2, **engine}, "train": {"precision": precision}}
        [line] = [
            text for text in explain(Config.model_validate(values), 8).splitlines() if "# memory" in text
        ]
        return int(line.split()[2].replace(",", ""))

    hybrid: dict[str, object] = {"engine": "fsdp", "fsdp_shard": "hybrid"}
    native, full, half = (memory(engine, "fp32") for engine in ({}, {"engine": "fsdp"}, hybrid))
    assert native > half > full
    # Dense weights, gradients and moments over 8 ranks instead of each, experts over 8 instead of 2.
    counts = count_parameters(Config().model, Config().moe, 4096)
    assert full == round(16 * counts.total / 8 / 2**20)
    assert native == round(16 * (counts.dense + counts.expert / 2) / 2**20)
    assert memory({"engine": "fsdp"}, "bf16_params") == full  # masters alone
    # Partitions over 8 ranks: masters and moments, at stage 2 gradients too; parameters stay where they are.
    stage_0, stage_1, stage_2 = (
        memory({"engine": "deepspeed", "zero_stage": stage}, "fp32") for stage in (0, 1, 2)
    )
    local = counts.dense + counts.expert / 2
    assert stage_0 == native
    assert stage_1 == round((8 * local + 12 * counts.total / 8) / 2**20)
    assert stage_2 == round((4 * local + 16 * counts.total / 8) / 2**20)


def test_a_dry_run_says_what_attention_within_documents_takes() -> None:
    data = {"sources": [{"path": "stdlib", "name": "code"}], "seq_len": 2048}
    train = {"global_batch_size": 8, "micro_batch_size": 2}
    for cross, wanted in (
        (True, []),
        (False, ["# attention masks: 8 MiB per rank while a batch is computed"]),
    ):
        config = Config.model_validate({"data": data | {"cross_document": cross}, "train": train})
        lines = [line for line in explain(config, 2).splitlines() if line.startswith("# attention masks")]
        assert [line.partition(", and")[0] for line in lines] == wanted


def test_a_dry_run_counts_the_entries_of_a_tokenizer_file(tmp_path: Path) -> None:
    metaspace().save(tmp_path)

    def vocabulary(**data: object) -> str:
        [line] = [
            line
            for line in explain(Config.model_validate({"data": data}), 1).splitlines()
            if "# vocabulary" in line
        ]
        return line

    file = str(tmp_path / "tokenizer.json")
    assert vocabulary(tokenizer=file, vocab_multiple=8).endswith("8, which is 4 entries and padding")
    assert "320, which is 257 entries" in vocabulary(tokenizer="byte")
    assert "4,096, which is 4,096 entries" in vocabulary(tokenizer="bpe")
    assert "the real number is not known" in vocabulary(tokenizer=str(tmp_path / "missing.json"))


def test_more_choices_than_experts_are_refused(done: dict[str, Done], base: Path) -> None:
    assert done["too many"].code == 2
    assert "top_k=5 is larger than num_experts=4" in done["too many"].err
    assert not (base / "never").exists()
