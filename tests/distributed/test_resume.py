"""Going on: a run that was interrupted, however often and however rudely, ends as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epmoe.config import Config
from tests.distributed.harness import run_ranks
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
    make_config,
    run,
    status,
    tensors,
    write_text,
)
from tests.distributed.tiny import rewrite_manifest


# ------------------------------------------------------------------------------------------- bit for bit
def test_the_same_seed_is_the_same_run(base: Path, reference: Path) -> None:
    again = finish(base, make_config(base, "again"))
    assert_same_run(again, reference)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (again, reference)]
    assert summaries[0] == summaries[1]  # the sample of text among them
    other = finish(base, make_config(base, "other-seed", "seed=6", "train.steps=2"))
    assert history(other)[0]["loss"] != history(reference)[0]["loss"]


def test_three_kills_in_a_row(base: Path, reference: Path) -> None:
    config = make_config(base, "kills")
    folder = Path(config.out)
    for victim, step, saved in ((1, 7, [5]), (0, 12, [5, 10]), (1, 18, [10, 15])):
        outcomes = run(base, config, f"point=train.after_backward,rank={victim},step={step},action=kill")
        assert outcomes[victim].exit_code == -9
        assert outcomes[1 - victim].result.code == 7
        assert checkpoints(folder) == saved
    finish(base, config)
    assert_same_run(folder, reference)


def test_three_requests_to_stop_in_a_row(base: Path, reference: Path) -> None:
    config = make_config(base, "stops", "checkpoint.every=0")
    folder = Path(config.out)
    for step in (6, 11, 16):
        both = ends(base, config, f"point=train.step_start,rank=1,step={step},action=term")
        assert [end.code for end in both] == [75, 75]
        assert both[0].message.startswith(f"stopped after step {step - 1} (another rank was asked to)")
        assert both[1].message.startswith(f"stopped after step {step - 1} (SIGTERM)")
        assert checkpoints(folder)[-1] == step - 1
        assert status(folder)["state"] == "stopped"
    finish(base, config)
    assert_same_run(folder, reference)


VARIANTS = {
    "bf16_autocast": ["train.precision=bf16_autocast"],
    "bf16_params": ["train.precision=bf16_params"],
    "fp64": ["train.precision=fp64"],
    "sgd": ["optimizer.name=sgd", "optimizer.lr=0.1", "optimizer.schedule=wsd"],
    "accumulation": ["train.micro_batch_size=1"],
    "dense": ["moe=null"],
    "ep1": ["parallel.ep_size=1", "moe.router=switch", "moe.top_k=1", "moe.shared_experts=1"],
    "bias": ["train.precision=bf16_params", "moe.router={name: deepseek, bias_rate: 0.125}", "moe.losses={}"],
    "fsdp": ["parallel.engine=fsdp"],
    "fsdp_hybrid": [
        "parallel.engine=fsdp",
        "parallel.fsdp_shard=hybrid",
        "train.precision=bf16_params",
        "train.micro_batch_size=1",
    ],
    "noisy": [
        "moe.router=noisy_topk",
        "moe.losses={balance: 0.01, importance: 0.1, load: 0.1}",
        "moe.balance_scope=global",
        "train.micro_batch_size=1",
    ],
}


@pytest.fixture(scope="module")
def variants(base: Path) -> dict[str, tuple[Path, Path]]:
    """Every variant, undisturbed and stopped half-way; all on the same two ranks."""
    plan: list[tuple[Config, str | None]] = []
    folders = {}
    for name, overrides in VARIANTS.items():
        short = [*overrides, "train.steps=6", "checkpoint.every=0", "train.sample.tokens=0"]
        whole, broken = (make_config(base, f"{name}-{kind}", *short) for kind in ("whole", "broken"))
        plan += [(whole, None), (broken, "point=train.step_start,rank=0,step=4,action=term"), (broken, None)]
        folders[name] = (Path(whole.out), Path(broken.out))
    for found in run_ranks(2, attempts, base, plan):
        assert [end.code for end in found] == [0, 75, 0] * len(VARIANTS)
    return folders


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_bit_for_bit(name: str, variants: dict[str, tuple[Path, Path]]) -> None:
    whole, broken = variants[name]
    assert checkpoints(whole) == [6]
    assert checkpoints(broken) == [3, 6]
    assert_same_run(broken, whole, step=6)
    losses = [line["loss"] for line in history(whole)]
    assert losses[-1] < losses[0] - 0.1, "it did not learn"


def test_variants_are_what_their_names_say(variants: dict[str, tuple[Path, Path]]) -> None:
    stored = {name: tensors(whole, 6) for name, (whole, _) in variants.items()}
    weight = "shard_00000.safetensors:model.embed.weight"
    assert stored["fp64"][weight].dtype == torch.float64
    assert stored["bf16_params"][weight].dtype == torch.float32  # the master
    assert stored["bf16_autocast"][weight].dtype == torch.float32
    assert not any(":optim." in key for key in stored["sgd"])
    assert not any("experts" in key for key in stored["dense"])
    assert history(variants["dense"][0])[0]["layers"] == {}
    midway = tensors(variants["bias"][1], 3)  # after an odd number of steps up or down
    [bias_E] = [value for key, value in midway.items() if key.endswith(".moe.router.bias")]
    assert bias_E.dtype == torch.float32, "a buffer is as wide as the router"
    assert 0 < bias_E.abs().max() <= 3 * 0.125
    assert not (bias_E / 0.125).frac().any()
    assert [value.any() for key, value in stored["noisy"].items() if key.endswith(".router.noise_weight")]
    first = [history(variants[name][0])[0]["loss"] for name in ("fp64", "bf16_autocast", "bf16_params")]
    assert len(set(first)) == 3


def test_accumulation_is_the_same_training(variants: dict[str, tuple[Path, Path]], reference: Path) -> None:
    accumulated = [line["loss"] for line in history(variants["accumulation"][0])[:4]]
    # The schedules differ only after the warm-up, because the runs have other lengths.
    assert accumulated == pytest.approx([line["loss"] for line in history(reference)[:4]], rel=1e-5)


def test_on_another_number_of_ranks_it_goes_on_too(base: Path, reference: Path) -> None:
    config = make_config(base, "fewer-ranks")
    ends(base, config, "point=train.step_start,step=11,action=term")
    finish(base, config, world_size=1)
    losses, wanted = ([line["loss"] for line in history(folder)] for folder in (Path(config.out), reference))
    assert losses[:10] == wanted[:10]
    assert losses == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------------------------------- metrics
def test_records_after_a_crash_cover_the_same_steps(base: Path) -> None:
    often = ["train.steps=10", "train.log_every=4", "checkpoint.every=5", "train.sample.tokens=0"]
    whole, broken = (make_config(base, f"records-{kind}", *often) for kind in ("whole", "broken"))
    finish(base, whole)
    run(base, broken, "point=train.after_backward,rank=1,step=7,action=kill")
    finish(base, broken)
    assert [line["step"] for line in history(Path(broken.out))] == [4, 5, 8, 10]
    assert history(Path(broken.out)) == history(Path(whole.out))


def test_no_record_is_lost_to_a_crash_right_after_a_checkpoint(base: Path, reference: Path) -> None:
    config = make_config(base, "crash-after-rename")
    run(base, config, "point=ckpt.after_rename,rank=0,step=10,action=kill")
    finish(base, config)
    assert_same_run(Path(config.out), reference)


@pytest.mark.parametrize("action", ["term", "kill"])
def test_an_interrupted_final_evaluation_is_made_up_for(action: str, base: Path, reference: Path) -> None:
    config = make_config(base, f"final-{action}")
    outcomes = run(base, config, f"point=train.eval,rank=1,action={action}")
    assert outcomes[0].result.code == (75 if action == "term" else 7)
    assert checkpoints(Path(config.out)) == [15, 20]
    assert history(Path(config.out))[-1]["val"] == {}
    finish(base, config)
    assert_same_run(Path(config.out), reference)


# ------------------------------------------------------------------------------------------- damaged checkpoints
def copy_of(reference: Path, name: str, steps: list[int]) -> Config:
    """A run that is not finished, with these checkpoints of the reference in it."""
    folder = reference.parent / name
    (folder / "ckpt").mkdir(parents=True)
    for step in steps:
        shutil.copytree(reference / "ckpt" / f"step_{step:09d}", folder / "ckpt" / f"step_{step:09d}")
    shutil.copy(reference / "metrics.jsonl", folder)
    return make_config(reference.parent, name)


def damage(config: Config, step: int) -> None:
    """Flips one bit of a checkpoint."""
    path = Path(config.out) / "ckpt" / f"step_{step:09d}" / "shard_00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


def test_a_damaged_checkpoint_is_passed_over(
    base: Path, reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = copy_of(reference, "damaged", [15, 20])
    damage(config, 20)
    finish(base, config)
    printed = capfd.readouterr()
    assert "warning: passed over a checkpoint" in printed.err
    assert "shard_00001.safetensors has CRC-32" in printed.err
    assert "(step 15)" in printed.out
    assert_same_run(Path(config.out), reference)
    assert checkpoints(Path(config.out)) == [15, 20]


def test_a_run_does_not_begin_anew_over_damaged_checkpoints(base: Path, reference: Path) -> None:
    config = copy_of(reference, "all-damaged", [15, 20])
    damage(config, 15)
    damage(config, 20)
    before = (Path(config.out) / "metrics.jsonl").read_bytes()
    for end in ends(base, config):
        assert end.code == 4
        assert "none of the 2 checkpoint(s)" in end.message
        assert "step_000000015 is damaged" in end.message
    assert status(Path(config.out))["exit_code"] == 4
    assert (Path(config.out) / "metrics.jsonl").read_bytes() == before


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(base: Path, reference: Path) -> None:
    config = make_config(base, "unmounted")
    folder = Path(config.out)
    run(base, config, "point=train.step_start,rank=1,step=8,action=kill")
    before = (folder / "metrics.jsonl").read_bytes()
    (folder / "ckpt").rename(folder / "elsewhere")
    (folder / "ckpt").mkdir()
    for _ in range(2):  # the refusal does not forget it
        for end in ends(base, config):
            assert end.code == 4
            assert "step 5 was saved there" in end.message
            assert "is not mounted" in end.message
    assert (folder / "metrics.jsonl").read_bytes() == before
    (folder / "ckpt").rmdir()
    (folder / "elsewhere").rename(folder / "ckpt")
    finish(base, config)
    assert_same_run(folder, reference)


ODD_RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no counters": (lambda r: r.update(trainer={}), "record.trainer.seconds: Field required"),
    "none at all": (lambda r: r.pop("trainer"), "record.trainer.seconds: Field required"),
    "one more": (lambda r: r["trainer"].update(laps=3), "record.trainer.laps: Extra inputs"),
    "text": (lambda r: r["trainer"].update(seconds="long"), "record.trainer.seconds: Input should be"),
    "negative": (lambda r: r["trainer"].update(skipped=-1), "record.trainer.skipped: Input should be"),
    "no scale": (lambda r: r["trainer"].update(loss_scale=0), "record.trainer.loss_scale: Input should be"),
    "no configuration": (lambda r: r.update(config={}), "of another model or optimizer"),
    "other types": (lambda r: r["config"]["model"].update(d_model="x"), "model.d_model: x -> 16"),
    "a list": (lambda r: r["config"]["model"].update(num_heads=[2]), "model.num_heads: [2] -> 2"),
}
"""Manifests with a right checksum that no epmoe of this version writes: what is changed in the record, what is said."""


def test_a_record_that_cannot_be_used_is_one_message(base: Path, reference: Path) -> None:
    configs = []
    for number, (change, _) in enumerate(ODD_RECORDS.values()):
        configs.append(copy_of(reference, f"odd-{number}", [15]))
        checkpoint = Path(configs[-1].out) / "ckpt" / "step_000000015"
        rewrite_manifest(checkpoint, lambda manifest: change(manifest["record"]))  # noqa: B023 - called at once
    for ends_of_a_rank in run_ranks(2, attempts, base, [(config, None) for config in configs]):
        for end, (_, says) in zip(ends_of_a_rank, ODD_RECORDS.values(), strict=True):
            assert end.code == 4, says
            assert says in end.message
            assert "fix: " in end.message


# ------------------------------------------------------------------------------------------- changed configurations
@pytest.fixture(scope="module")
def changed(base: Path, reference: Path) -> dict[str, tuple[list[End], str]]:
    """What both ranks said to each change, one after the other, and the status afterwards."""
    plans = {
        "d_model": ["model.d_model=32"],
        "experts": ["moe.num_experts=8", "moe.shared_experts=1"],
        "seed": ["seed=9"],
        "seq_len": ["data.seq_len=24"],
        "optimizer": ["optimizer.name=sgd"],
        "allowed": ["seed=9", "checkpoint.allow_data_change=true", "train.steps=22"],
    }
    copy_of(reference, "changed", [20])
    configs = [make_config(base, "changed", *overrides) for overrides in plans.values()]
    ranks = run_ranks(2, _statuses, base, configs)
    return {name: ([rank[i][0] for rank in ranks], ranks[0][i][1]) for i, name in enumerate(plans)}


def _statuses(rank: int, configs: list[Config]) -> list[tuple[End, str]]:
    found = []
    for config in configs:
        end = attempt(rank, config)
        described = Path(config.out) / "config.yaml"
        found.append((end, described.read_text() if described.exists() else ""))
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("d_model", ["of another model or optimizer", "model.d_model: 16 -> 32"]),
        (
            "experts",
            ["of another model or optimizer", "moe.num_experts: 4 -> 8", "moe.shared_experts: 0 -> 1"],
        ),
        ("seed", ["the samples changed since step 20", "seed: 5 -> 9", "checkpoint.allow_data_change=true"]),
        ("seq_len", ["the samples changed since step 20", "data.seq_len: 16 -> 24"]),
        ("optimizer", ["of another model or optimizer", "optimizer.name: adamw -> sgd"]),
    ],
)
def test_changes_that_would_break_the_run_are_refused(
    change: str, says: list[str], changed: dict[str, tuple[list[End], str]]
) -> None:
    both, described = changed[change]
    for end in both:
        assert end.code == 4
        for words in says:
            assert words in end.message
    assert described == "", "a refused configuration was written down as that of the run"


def test_a_change_of_the_data_can_be_allowed(
    changed: dict[str, tuple[list[End], str]], base: Path, reference: Path
) -> None:
    both, described = changed["allowed"]
    assert both == [End(0), End(0)]
    assert "seed: 9" in described
    lines = history(base / "changed")
    assert lines[:20] == history(reference)
    assert lines[21]["samples"] == 22 * 4  # the count of samples goes on, their order is another


def test_a_new_learning_rate_is_used_and_said(
    base: Path, reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy_of(reference, "new-rate", [15])
    finish(base, make_config(base, "new-rate", "optimizer.lr=0.001", "optimizer.schedule=constant"))
    printed = capfd.readouterr().out
    assert "changed since: optimizer.lr: 0.005 -> 0.001" in printed
    assert "changed since: optimizer.schedule: cosine -> constant" in printed
    assert [line["lr"] for line in history(base / "new-rate")[15:]] == [0.001] * 5


# ------------------------------------------------------------------------------------------- other beginnings and ends
def test_a_finished_run_says_so(base: Path, reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def facts() -> dict[str, Any]:
        return {str(p): p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}

    before = facts()
    finish(base, make_config(base, "reference"))
    assert "is finished: 20 steps are done. Nothing to do." in capfd.readouterr().out
    assert facts() == before


def test_a_finished_run_is_not_taken_for_another_one(base: Path, reference: Path) -> None:
    for end in ends(base, make_config(base, "reference", "seed=1", "train.log_every=5")):
        assert end.code == 2
        assert (
            f"{reference} is finished, and it is another run than this one\n  why: seed: 5 -> 1\n"
            in end.message
        )


def _in_a_folder_of_its_own(rank: int, base: Path, config: Config) -> End:
    os.chdir(base / f"node{rank}")
    return attempt(rank, config)


def test_other_text_on_another_node_is_named_with_its_numbers(base: Path, tmp_path: Path) -> None:
    config = make_config(base, "other-text", "data.cache=cache", "data.sources.0.path=text")
    for rank in (0, 1):
        write_text(tmp_path / f"node{rank}" / "text", 6_000 + 1_000 * rank)
    for end in run_ranks(2, _in_a_folder_of_its_own, tmp_path, tmp_path, config):
        assert end.code == 2
        assert "the prepared data of rank(s) [1] differs from rank 0's" in end.message
        assert "words, train.tokens is 6001, and 7001" in end.message
        assert "put data.cache on a disk that all nodes share" in end.message


def test_a_finished_run_trains_on_when_it_gets_more_steps(base: Path, reference: Path) -> None:
    config = make_config(base, "longer", "train.steps=4")
    folder = finish(base, config)
    finish(base, make_config(base, "longer", "train.steps=6"))
    assert [line["step"] for line in history(folder)] == [1, 2, 3, 4, 5, 6]
    assert status(folder)["step"] == 6


def test_init_from_takes_the_weights_and_nothing_else(base: Path, reference: Path) -> None:
    # A learning rate that changes no float32 weight: what is stored after the first step is what was loaded.
    overrides = [
        f"train.init_from={reference}",
        "optimizer.lr=1.0e-30",
        "train.steps=1",
        "optimizer.warmup_steps=0",
    ]
    folder = finish(base, make_config(base, "from-weights", *overrides))
    old, new = tensors(reference), tensors(folder, 1)
    weights = [key for key in old if ":model." in key]
    assert different({k: old[k] for k in weights}, {k: new[k] for k in weights}) == []
    steps = [float(tensor) for key, tensor in new.items() if key.endswith(".step")]
    assert set(steps) == {1.0}
    assert all(key not in different(old, new) or ":optim." in key for key in old)
    [line] = history(folder)
    assert (line["step"], line["samples"]) == (1, 4)
    assert line["loss"] < history(reference)[0]["loss"] - 0.5  # the same samples, a trained model


def _whole_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors by name; experts lie in the order of the shards."""
    whole: dict[str, torch.Tensor] = {}
    for place, tensor in tensors(folder, step).items():
        key = place.partition(":")[2]
        if key.startswith("model."):
            whole[key] = torch.cat((whole[key], tensor)) if key in whole else tensor
    return whole


def test_a_new_router_of_another_family_starts_over_trained_experts(
    base: Path, reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    frozen = [f"optimizer.lr={1e-30!r}", "optimizer.warmup_steps=0", "train.steps=1"]
    frozen += ["moe.router={name: deepseek, bias_rate: 1.0e-30}"]
    start = [f"train.init_from={reference}", *frozen]
    for end in ends(base, make_config(base, "router-kept", *start)):
        assert end.code == 4
        assert "moe.router.bias is not in the checkpoint" in end.message
        assert "train.init_without" in end.message
    fresh = _whole_weights(finish(base, make_config(base, "router-alone", *frozen), world_size=1), 1)
    old = _whole_weights(reference, 20)
    for ranks in (1, 2):
        config = make_config(base, f"router-new-{ranks}", *start, "train.init_without=[router]")
        folder = finish(base, config, world_size=ranks)
        assert "step_000000020 without router, which is new" in capfd.readouterr().out
        new = _whole_weights(folder, 1)
        assert any(".router." in key for key in new)
        for key, tensor in new.items():
            want = (fresh if ".router." in key else old)[key]
            assert torch.allclose(tensor, want, rtol=0, atol=1e-20), key


def test_init_from_refuses_another_tokenizer(base: Path, reference: Path) -> None:
    overrides = [f"train.init_from={reference}", "data.tokenizer=bpe", "data.vocab_size=300"]
    for end in ends(base, make_config(base, "other-tokenizer", *overrides)):
        assert end.code == 4
        assert "was trained with tokenizer" in end.message


class _Clock:
    """``time`` for one rank: the limit passes when it has been read a few times."""

    def __init__(self, reads: int) -> None:
        self.reads, self.left = reads, reads

    def monotonic(self) -> float:
        self.left -= 1
        return 0.0 if self.left > 0 else 1e9


def _train_for_minutes(rank: int, config: Config) -> End:
    import epmoe.train.run

    epmoe.train.run.time = _Clock(5 if rank == 1 else 10**6)  # type: ignore[attr-defined]
    return attempt(rank, config)


def test_max_minutes_ends_the_run_on_all_ranks_with_everything_in_place(base: Path) -> None:
    config = make_config(base, "minutes", "train.max_minutes=1.0", "train.steps=6")
    assert run_ranks(2, _train_for_minutes, base, config) == [End(0), End(0)]
    folder = Path(config.out)
    assert status(folder) == {"state": "done", "exit_code": 0, "step": 3, "message": ""}
    assert checkpoints(folder) == [3]
    assert history(folder)[-1]["val"].keys() == {"words"}
    assert json.loads((folder / "summary.json").read_text())["validation"][0]["num_tokens"] > 800
    assert history(folder)[-1]["lr"] == pytest.approx(5e-3 * 3 / 4)  # the schedule still counts all steps
    finish(base, config.model_copy(update={"train": config.train.model_copy(update={"max_minutes": None})}))
    assert status(folder)["step"] == 6


@pytest.mark.parametrize("steps", ["2-3", "2-9"], ids=["whole", "cut short"])
def test_profile_steps_writes_a_trace_per_rank(steps: str, base: Path) -> None:
    overrides = [f"profile.steps={steps}", "train.steps=3", "train.sample.tokens=0"]
    folder = finish(base, make_config(base, f"profiled-{steps}", *overrides))
    for rank in range(2):
        events = json.loads((folder / f"trace_rank{rank}.json").read_text())["traceEvents"]
        assert any("all_to_all" in event.get("name", "") for event in events)
