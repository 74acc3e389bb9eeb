"""A checkpoint goes from layout to layout and from engine to engine without losing a bit, and training goes on alike.

The sizes divide badly on purpose: rows that do not divide over the ranks, ranks without a row, experts cut unevenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from epmoe.checkpoint.manifest import TrainingRecord, read_manifest
from epmoe.checkpoint.safetensors_writer import read_pieces
from epmoe.checkpoint.store import load_checkpoint, open_checkpoint, save_checkpoint
from epmoe.config import Config
from epmoe.config_file import override_config
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.status import CHECKPOINTS
from epmoe.train.trainer import Progress, Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import ENGINES, Samples, config, worst_error
from tests.patience import HANGS_S

VOCAB, WARM_UP_STEPS = 50, 2


@dataclass(frozen=True, kw_only=True)
class Chain:
    """All checkpoints of one precision."""

    precision: str
    folder: Path
    hops: list[list[dict[str, Any]]]
    """What every rank found, hop after hop."""


CHAIN = [
    (4, [(2, "native"), (2, "fsdp"), (1, "fsdp"), (2, "fsdp_hybrid")]),
    (3, [(3, "fsdp"), (3, "native"), (1, "fsdp_hybrid")]),
    (2, [(1, "native"), (2, "fsdp_hybrid"), (2, "native"), (1, "fsdp")]),
    (1, [(1, "native"), (1, "fsdp")]),
    (4, [(1, "fsdp")]),
]
"""Worlds, and the (ep_size, engine) that one after the other read what was written last."""
CHAINS = {"fp64": CHAIN, "bf16_params": [(2, CHAIN[2][1])]}
"""By precision: the second keeps float32 masters."""
REFERENCE = {"fp64": -3, "bf16_params": 0}
"""The hop whose first rank has whole gradients."""


def resized(engine: str, precision: str) -> Config:
    """AdamW, and a router with a bias that moves."""
    overrides = [
        *("moe.num_experts=6", "moe.router={name: deepseek, bias_rate: 0.02}", "moe.losses={}"),
        *("model.d_model=12", "model.d_ff=10", "moe.d_ff=10", "optimizer.name=adamw"),
        *("train.global_batch_size=12", "train.micro_batch_size=null", "train.steps=6"),
        *(f"parallel.{key}={value}" for key, value in ENGINES[engine].items()),
    ]
    return override_config(config("deepseek", precision, 1, 1), overrides)


def hops(
    rank: int, folder: Path, precision: str, first: int, layouts: list[tuple[int, str]]
) -> list[dict[str, Any]]:
    """Every layout reads the newest checkpoint, writes it again and takes a step; number 0 trains it first."""
    place = runtime.start("cpu", HANGS_S)
    return [
        hop(place, folder, number, ep_size, resized(engine, precision))
        for number, (ep_size, engine) in enumerate(layouts, start=first)
    ]


def hop(place: Any, folder: Path, number: int, ep_size: int, cfg: Config) -> dict[str, Any]:
    mesh = build_mesh(place, ep_size)
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    if number > 0:
        with torch.no_grad():  # nothing of what is read was there before
            for tensor in model.parameters():
                tensor.fill_(9.0)
    trainer = Trainer(cfg, place, mesh, model=model, data=Samples(), stop=StopFlag())  # type: ignore[arg-type]
    if number == 0:
        for _ in range(WARM_UP_STEPS):
            trainer.step()
    else:
        found = open_checkpoint(folder / f"step_{number:09d}")
        record = load_checkpoint(found, model=model, engine=trainer.engine, mesh=mesh)
        trainer.progress = Progress(step=WARM_UP_STEPS, samples=record.samples, tokens=record.tokens)
    record = TrainingRecord(
        step=number + 1,
        tokens=trainer.progress.tokens,
        samples=trainer.progress.samples,
        config={},
        data_fingerprint="data",
        tokenizer_hash="tokenizer",
        trainer={},
    )
    save_checkpoint(folder, model=model, engine=trainer.engine, mesh=mesh, record=record, keep=100)
    numbers = trainer.sample_numbers(0)
    result = trainer.step()
    parts = trainer.engine.gradients()
    return {
        "loss": float(result.sums.loss),
        "norm": result.grad_norm,
        "samples": numbers,
        "gradients": {name: part.local.clone() for name, part in parts.items()},
        "where": {name: (part.first_row, part.shape) for name, part in parts.items()},
    }


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, put together from its pieces."""
    manifest = read_manifest(folder)
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for name in manifest.files:
        tensors = safetensors.torch.load_file(folder / name)
        for key, piece in read_pieces(folder / name).items():
            start = piece.start[0] if piece.start else 0
            found.setdefault(key, []).append((start, tensors[key]))
    assert found.keys() == manifest.tensors.keys()
    made = {}
    for key, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        tensor = torch.cat([piece for _, piece in pieces]) if pieces[0][1].ndim else pieces[0][1]
        assert tuple(tensor.shape) == manifest.tensors[key].shape
        made[key] = tensor
    return made


@pytest.fixture(scope="module", params=CHAINS)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """What the hops of one precision wrote and found."""
    precision: str = request.param
    folder = tmp_path_factory.mktemp("chain") / CHECKPOINTS
    found: list[list[dict[str, Any]]] = []
    for world_size, layouts in CHAINS[precision]:
        ranks = run_ranks(world_size, hops, folder.parent, folder, precision, len(found), layouts)
        found += [list(hop_by_rank) for hop_by_rank in zip(*ranks, strict=True)]
    return Chain(precision=precision, folder=folder, hops=found)


def test_every_checkpoint_of_the_chain_holds_the_same_bits(chain: Chain) -> None:
    paths = sorted(chain.folder.glob("step_*"))
    assert len(paths) == len(chain.hops)
    first = whole(paths[0])
    kinds = {key.rpartition(".")[2] for key in first if key.startswith("optim.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
    assert any(key.endswith("router.bias") and tensor.any() for key, tensor in first.items())
    assert first["model.embed.weight"].dtype == (
        torch.float64 if chain.precision == "fp64" else torch.float32
    )
    for path in paths[1:]:
        again = whole(path)
        assert again.keys() == first.keys()
        different = [key for key in first if first[key].numpy().tobytes() != again[key].numpy().tobytes()]
        assert different == [], path.name


def test_every_layout_goes_on_with_the_same_samples_and_gradients(chain: Chain) -> None:
    reference = chain.hops[REFERENCE[chain.precision]][0]
    limit = 1e-9 if chain.precision == "fp64" else 2e-2
    for number, ranks in enumerate(chain.hops):
        used = sorted(sample for rank in ranks for sample in rank["samples"])
        assert used == list(range(12 * WARM_UP_STEPS, 12 * WARM_UP_STEPS + 12)), number
        assert {rank["norm"] for rank in ranks} == {ranks[0]["norm"]}
        for rank in ranks:
            assert rank["loss"] == pytest.approx(reference["loss"], rel=limit)
            error, name = worst_error("gradients", rank, reference)
            assert error <= limit, f"gradient of {name} after hop {number} is off by {error:.2e}"
