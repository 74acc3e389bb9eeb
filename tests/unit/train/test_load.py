"""A trained model in one process is the model that was trained on several."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epmoe.checkpoint.manifest import read_manifest, write_manifest
from epmoe.config import Config
from epmoe.errors import CheckpointError
from epmoe.models.decoder import Decoder
from epmoe.parallel.mesh import is_expert
from epmoe.process.runtime import pick_device
from epmoe.train.load_trained import load_trained
from tests.distributed.harness import run_ranks
from tests.distributed.runs import End, attempt, make_config

CPU = torch.device("cpu")
PRECISIONS = {"fp32": 1e-5, "fp64": 1e-12, "bf16_params": 2e-2}
"""Largest relative difference of logits: rounding, as the experts' batches have other sizes."""


def some_logits(model: Decoder) -> Tensor:
    token_BS = torch.arange(48).view(2, 24) % 251
    with torch.no_grad():
        logits_BSV: Tensor = model.eval()(token_BS, None)[0]
    return logits_BSV.double()


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _train_and_look(rank: int, configs: list[Config]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Trains, and looks at the model while it is still spread over the ranks: logits and dense parameters."""
    import epmoe.train.run

    found = []
    original = epmoe.train.run.finish

    def finish(config: Config, folder: Path, prepared: Any, model: Decoder, *rest: Any, **more: Any) -> None:
        dense = {n: p.detach().clone() for n, p in model.named_parameters() if not is_expert(n)}
        found.append((some_logits(model), dense))
        original(config, folder, prepared, model, *rest, **more)

    epmoe.train.run.finish = finish
    assert all(attempt(rank, config) == End(0) for config in configs)
    return found


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, tuple[Path, Tensor]]:
    """Runs of two ranks with two of the four experts each, and their logits."""
    configs = [
        make_config(base, f"load-{p}", f"train.precision={p}", "train.steps=3", "train.sample.tokens=0")
        for p in PRECISIONS
    ]
    ranks = run_ranks(2, _train_and_look, base, configs)
    for precision, (logits, dense), (other_logits, other_dense) in zip(PRECISIONS, *ranks, strict=True):
        assert difference(other_logits, logits) < PRECISIONS[precision]
        assert all(torch.equal(dense[name], other_dense[name]) for name in dense), "the ranks drifted apart"
    return {p: (Path(c.out), found[0]) for p, c, found in zip(PRECISIONS, configs, ranks[0], strict=True)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_are_those_of_the_training_ranks(
    precision: str, trained: dict[str, tuple[Path, Tensor]]
) -> None:
    folder, wanted = trained[precision]
    loaded = load_trained(folder, device=CPU)
    assert not loaded.model.training
    assert loaded.checkpoint.manifest.ep_size == 2
    got = some_logits(loaded.model)
    assert difference(got, wanted) < PRECISIONS[precision]
    untrained = Decoder(loaded.config.model, loaded.config.moe, vocab_size=wanted.shape[-1], seed=5)
    assert difference(some_logits(untrained), wanted) > 0.1


def test_a_run_its_folder_of_checkpoints_and_a_checkpoint_are_the_same(
    trained: dict[str, tuple[Path, Tensor]],
) -> None:
    folder, _ = trained["fp32"]
    newest = folder / "ckpt" / "step_000000003"
    for path in (folder, folder / "ckpt", newest):
        loaded = load_trained(path, device=CPU)
        assert loaded.checkpoint.path == newest
        assert loaded.config.out == str(folder)
        assert loaded.tokenizer.name == "byte"


def test_a_checkpoint_named_from_inside_its_folder(
    trained: dict[str, tuple[Path, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = trained["fp64"]
    monkeypatch.chdir(folder / "ckpt")
    for name in ("step_000000003", "."):
        loaded = load_trained(Path(name), device=CPU)
        assert difference(some_logits(loaded.model), wanted) < PRECISIONS["fp64"]


def test_overrides_are_there_when_the_model_is_built(trained: dict[str, tuple[Path, Tensor]]) -> None:
    overrides = ["train.precision=bf16_params", "data.cross_document=false"]
    loaded = load_trained(trained["fp32"][0], device=CPU, overrides=overrides)
    assert loaded.model.embed.weight.dtype == torch.bfloat16
    assert not loaded.model.cross_document
    assert loaded.config.train.precision == "bf16_params"


@pytest.fixture
def copy(trained: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained["fp32"][0], tmp_path / "run"))


def test_a_checkpoint_without_its_tokenizer_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        load_trained(copy, device=CPU)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tokenizer_hash", "0" * 64, "was trained with 000000000000"),
        ("config", {"model": {"d_modle": 3}}, "does not understand"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(field: str, value: Any, says: str, copy: Path) -> None:
    checkpoint = copy / "ckpt" / "step_000000003"
    manifest = read_manifest(checkpoint)
    record = manifest.record.model_copy(update={field: value})
    write_manifest(checkpoint, manifest.model_copy(update={"record": record}))
    with pytest.raises(CheckpointError, match=says):
        load_trained(copy, device=CPU)


@pytest.mark.parametrize("shape", [None, []])
def test_a_manifest_without_an_embedding_is_refused(shape: Any, copy: Path) -> None:
    checkpoint = copy / "ckpt" / "step_000000003"
    manifest = read_manifest(checkpoint)
    tensors = dict(manifest.tensors)
    embedding = tensors.pop("model.embed.weight")
    if shape is not None:
        tensors["model.embed.weight"] = embedding.model_copy(update={"shape": tuple(shape)})
    write_manifest(checkpoint, manifest.model_copy(update={"tensors": tensors}))
    with pytest.raises(CheckpointError, match=r"model\.embed\.weight"):
        load_trained(copy, device=CPU)


def test_the_tokenizer_is_that_of_the_run_where_ckpt_is_a_link(copy: Path, tmp_path: Path) -> None:
    (copy / "ckpt").rename(tmp_path / "disk")
    (copy / "ckpt").symlink_to(tmp_path / "disk")
    for path in (copy, copy / "ckpt", copy / "ckpt" / "step_000000003"):
        assert load_trained(path, device=CPU).tokenizer.name == "byte"


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no usable checkpoint") as caught:
        load_trained(tmp_path, device=CPU)
    assert "step_" in str(caught.value)


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU
