"""Which changes of a configuration a run survives."""

from __future__ import annotations

from typing import Any

import pytest

from epmoe.checkpoint.manifest import TrainingRecord
from epmoe.config import Config
from epmoe.engines.optimizer import scheduled_rate
from epmoe.errors import CheckpointError
from epmoe.train.resume import changed_keys, check_resumable, flatten, rate_change


def record(config: Config, **changes: Any) -> TrainingRecord:
    return TrainingRecord(
        step=7,
        tokens=70,
        samples=28,
        config=config.model_dump(mode="json"),
        **{"data_fingerprint": "same", "tokenizer_hash": "same", **changes},
    )


def changed(**sections: Any) -> Config:
    return Config.model_validate(sections)


def lines(new: Config, old: Config | None = None, **changes: Any) -> list[str]:
    return check_resumable(
        record(old or Config(), **changes), new, data_fingerprint="same", tokenizer_hash="same"
    )


def test_keys_are_dotted() -> None:
    assert flatten({"a": 1, "b": {"c": [1, 2], "d": {"e": None}}}) == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_nothing_changed() -> None:
    assert lines(Config()) == []


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr: 0.001 -> 0.5"),
        ({"train": {"steps": 2000}}, "train.steps: 1000 -> 2000"),
        ({"out": "elsewhere"}, "out: runs/default -> elsewhere"),
        ({"model": {"dropout": 0.1}}, "model.dropout: 0.0 -> 0.1"),
        ({"model": {"init_std": 0.1}}, "model.init_std: 0.02 -> 0.1"),
        ({"model": {"attention": "flash"}}, "model.attention: auto -> flash"),
        ({"model": {"norm": "apex"}}, "model.norm: torch -> apex"),
        ({"optimizer": {"name": "apex_fused_adam"}}, "optimizer.name: adamw -> apex_fused_adam"),
        ({"moe": {"capacity_factor": None}}, "moe.capacity_factor: 1.25 -> None"),
        ({"moe": {"losses": {"z": 0.001}}}, "moe.losses.balance: 0.01 -> None"),
        ({"parallel": {"ep_size": 2}}, "parallel.ep_size: auto -> 2"),
    ],
)
def test_harmless_changes_are_listed(sections: dict[str, Any], line: str) -> None:
    assert lines(changed(**sections)) == [line]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"d_model": 512}}, "model.d_model: 256 -> 512"),
        ({"model": {"norm_eps": 1e-6}}, "model.norm_eps: 1e-05 -> 1e-06"),
        ({"model": {"qk_norm": True}}, "model.qk_norm: False -> True"),
        ({"model": {"tie_embeddings": False}}, "model.tie_embeddings: True -> False"),
        ({"moe": {"num_experts": 16}}, "moe.num_experts: 8 -> 16"),
        ({"moe": {"every": 1}}, "moe.every: 2 -> 1"),
        ({"moe": {"first_dense": 2}}, "moe.first_dense: 0 -> 2"),
        ({"moe": {"d_ff": 3}}, "moe.d_ff: 1024 -> 3"),
        ({"moe": {"activation": "gelu"}}, "moe.activation: swiglu -> gelu"),
        ({"moe": {"shared_experts": 1}}, "moe.shared_experts: 0 -> 1"),
        ({"moe": None}, "moe.num_experts: 8 -> None"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name: adamw -> sgd"),
    ],
)
def test_another_model_or_optimizer_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match="another model or optimizer") as caught:
        lines(changed(**sections))
    assert says in str(caught.value)
    assert "choose another out=" in str(caught.value)


def test_sizes_spelled_out_are_the_same_model() -> None:
    spelled = {"model": {"num_kv_heads": 4, "head_dim": 64}, "moe": {"d_ff": 1024}}
    assert lines(changed(**spelled)) == lines(Config(), changed(**spelled)) == []
    with pytest.raises(CheckpointError, match=r"model\.num_kv_heads: 4 -> 2"):
        lines(changed(model={"num_kv_heads": 2}))


def test_a_resume_says_what_it_does_to_the_learning_rate() -> None:
    old = Config().model_dump(mode="json")
    longer = changed(train={"steps": 2000})
    said = rate_change(old, longer, 999)
    assert said is not None
    assert "goes on at 0.000587 instead of 0.0001" in said
    assert "optimizer.schedule_steps" in said
    assert rate_change(old, Config(), 999) is None
    kept = changed(train={"steps": 2000}, optimizer={"schedule_steps": 1000})
    assert rate_change(old, kept, 999) is None
    assert scheduled_rate(kept, 1500) == pytest.approx(1e-4)
    assert rate_change({"optimizer": "of another version"}, Config(), 999) is None


def test_a_dense_checkpoint_does_not_become_sparse() -> None:
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        lines(Config(), changed(moe=None))


def test_other_samples_need_permission() -> None:
    with pytest.raises(CheckpointError, match="the samples changed since step 7") as caught:
        lines(changed(seed=3), data_fingerprint="other")
    assert "seed: 0 -> 3" in str(caught.value)
    with pytest.raises(CheckpointError, match="the text changed"):
        lines(Config(), data_fingerprint="other")
    allowed = changed(seed=3, checkpoint={"allow_data_change": True})
    assert "seed: 0 -> 3" in lines(allowed, data_fingerprint="other")


def test_another_tokenizer_is_refused_even_with_permission() -> None:
    allowed = changed(checkpoint={"allow_data_change": True})
    with pytest.raises(CheckpointError, match="trained with tokenizer other"):
        lines(allowed, tokenizer_hash="other")


def test_settings_of_another_version_count_as_changes() -> None:
    stored = Config().model_dump(mode="json")
    stored["train"]["forgotten"] = 3
    del stored["train"]["log_every"]
    assert changed_keys(stored, Config()) == ["train.forgotten: 3 -> None", "train.log_every: None -> 10"]
