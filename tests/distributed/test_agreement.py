"""What only one rank can see ends all ranks alike: damaged data, other data, another disk, nothing in the loss."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epmoe.config import Config
from epmoe.config_file import override_config
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.runs import End, attempt, ends, finish, make_config, status, write_text
from tests.distributed.test_parity import VOCAB, Samples
from tests.distributed.test_parity import config as parity_config


def test_a_damaged_token_ends_all_ranks_with_its_name(base: Path) -> None:
    config = make_config(base, "damaged-token", f"data.cache={base / 'damaged-cache'}")
    finish(base, override_config(config, [f"out={base / 'undamaged'}"]))
    [tokens] = (base / "damaged-cache").rglob("words.train.bin")
    stored = np.memmap(tokens, dtype=np.uint16, mode="r+")
    stored[stored.size // 2] = 9999
    stored.flush()
    first, second = ends(base, override_config(config, ["train.steps=200", "checkpoint.every=0"]))
    assert (first.code, second.code) == (3, 3)
    assert "9999" in first.message
    assert "9999" in second.message
    assert status(Path(config.out))["exit_code"] == 3


def with_its_own_config(rank: int, configs: list[Config]) -> End:
    return attempt(rank, configs[rank])


def test_ranks_with_other_configurations_do_not_train(base: Path) -> None:
    config = make_config(base, "other-config")
    configs = [config, override_config(config, ["optimizer.lr=0.25", "moe.d_ff=8"])]
    for end in run_ranks(2, with_its_own_config, base, configs):
        assert end.code == 2
        assert "the configuration of rank(s) [1] differs from rank 0's" in end.message
        assert "optimizer.lr is 0.005, and 0.25" in end.message
        assert "moe.d_ff is null, and 8" in end.message
    assert not Path(config.out).exists()


def on_its_own_disk(rank: int, config: Config, base: Path) -> End:
    """An attempt in a folder that is this rank's alone."""
    os.chdir(base / f"node{rank}")
    return attempt(rank, config)


def own_disks(base: Path, texts_differ: bool) -> None:
    for rank in range(2):
        if not (base / f"node{rank}").exists():
            write_text(base / f"node{rank}" / "train", 12_000, seed=rank if texts_differ else 0)
            write_text(base / f"node{rank}" / "val", 900, seed=1)


def test_ranks_with_other_text_do_not_train(tmp_path: Path) -> None:
    own_disks(tmp_path, texts_differ=True)
    places = ["data.sources.0.path=train", "data.sources.0.val_path=val", "data.cache=cache"]
    config = make_config(tmp_path, "other-text", *places)
    for end in run_ranks(2, on_its_own_disk, tmp_path, config, tmp_path):
        assert end.code == 2
        assert "prepared data of rank(s) [1] differs from rank 0's" in end.message


def test_an_output_folder_that_is_not_shared_is_refused_at_the_start(tmp_path: Path) -> None:
    own_disks(tmp_path, texts_differ=False)
    config = override_config(make_config(tmp_path, "x"), ["out=run"])
    for end in run_ranks(2, on_its_own_disk, tmp_path, config, tmp_path):
        assert end.code == 2
        assert "not the same folder on every rank: rank(s) [1]" in end.message


class Uncounted(Samples):
    """Real tokens of which none counts in the loss."""

    def batch(self, numbers: list[int]) -> Any:
        batch = super().batch(numbers)
        return replace(batch, loss_BS=torch.zeros_like(batch.loss_BS))


def train_uncounted(rank: int) -> tuple[bool, int, int]:
    place = runtime.start("cpu", 30.0)
    cfg = parity_config("gshard_top2", "fp32", 1, place.world_size)
    mesh = build_mesh(place, 2)
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = Trainer(cfg, place, mesh, model=model, data=Uncounted(), stop=StopFlag())  # type: ignore[arg-type]
    result = trainer.step()
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return same, result.num_tokens, trainer.progress.step


def test_a_step_without_a_token_in_the_loss_moves_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, train_uncounted, tmp_path) == [(True, 0, 1)] * 2
