"""Evaluation: every token once, whoever reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from epmoe.config import Config
from epmoe.data.loader import ValidationData, validation_sets
from epmoe.data.prepare import prepare
from epmoe.models.decoder import Decoder
from epmoe.train.build import build_model
from epmoe.train.evaluate import Evaluation, evaluate
from tests.distributed.harness import run_ranks
from tests.distributed.runs import make_config

CPU = torch.device("cpu")


class Stop(Exception):
    """Raised by a poll."""


@pytest.fixture(scope="module")
def config(base: Path) -> Config:
    return make_config(
        base, "unused", "train.precision=fp64", "moe.capacity_factor_eval=1.0", "model.init_std=0.5"
    )


def model_and_data(config: Config) -> tuple[Decoder, ValidationData]:
    prepared = prepare(config.data)
    model = build_model(config, prepared.padded_vocab_size, device=CPU)
    return model, validation_sets(prepared, config.data)[0]


def _evaluations(rank: int, config: Config, world_size: int) -> list[Any]:
    model, data = model_and_data(config)
    model.train()
    found: list[Any] = []
    for batch_size in (1, 5):
        for max_windows in (None, 7):
            polls = 0

            def poll(done: int, total: int) -> None:
                nonlocal polls
                assert polls <= done < total
                polls += 1

            place = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "device": CPU}
            result = evaluate(model, data, precision="fp64", max_windows=max_windows, poll=poll, **place)  # type: ignore[arg-type]
            found.append((result, polls, model.training))
    return found


@pytest.fixture(scope="module")
def by_world(base: Path, config: Config) -> dict[int, list[list[Any]]]:
    prepare(config.data)
    return {n: run_ranks(n, _evaluations, base, config, n) for n in (1, 2, 3)}


def one_by_one(model: Decoder, data: ValidationData, windows: list[int]) -> tuple[float, int]:
    """Summed loss and tokens, by the definition."""
    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            batch = data.batch([window])
            logits_BSV, _ = model(batch.token_BS, batch.context)
            nats = -logits_BSV[0].log_softmax(-1)
            for position in range(batch.token_BS.shape[1]):
                if batch.loss_BS[0, position]:
                    total += float(nats[position, batch.target_BS[0, position]])
                    tokens += 1
    return total, tokens


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_layout_and_no_batch_size_changes_the_figure(
    world_size: int, by_world: dict[int, list[list[Any]]], config: Config
) -> None:
    model, data = model_and_data(config)
    everything = list(range(data.num_windows))
    assert len(everything) % 5, "the last pass should not be full"
    spread = [i * data.num_windows // 7 for i in range(7)]
    wanted = {None: one_by_one(model, data, everything), 7: one_by_one(model, data, spread)}
    cells = [(batch_size, max_windows) for batch_size in (1, 5) for max_windows in (None, 7)]
    for rank in by_world[world_size]:
        for (batch_size, max_windows), (got, polls, training) in zip(cells, rank, strict=True):
            nats, tokens = wanted[max_windows]
            assert got.num_tokens == tokens
            assert got.loss == pytest.approx(nats / tokens, rel=1e-12)
            assert got.perplexity == pytest.approx(math.exp(nats / tokens))
            if max_windows is None:
                assert tokens == 900  # 900 bytes, the first of which nothing predicts, and an end-of-text
                assert got.bits_per_byte == pytest.approx(nats / math.log(2) / 900, rel=1e-12)
            else:
                assert got.bits_per_byte is None
                assert got.bits_left_out == f"7 of {len(everything)} windows were read"
            assert 0.05 < got.drop_rate < 0.5
            windows = len(everything) if max_windows is None else 7
            assert polls == math.ceil(windows / (batch_size * world_size))
            assert training


def test_all_ranks_report_the_same_bits(by_world: dict[int, list[list[Any]]]) -> None:
    for ranks in by_world.values():
        assert all(rank == ranks[0] for rank in ranks)


def test_dropless_drops_nothing_and_the_modes_differ(base: Path, config: Config) -> None:
    assert config.moe is not None
    dropless = config.model_copy(update={"moe": config.moe.model_copy(update={"capacity_factor_eval": None})})
    [results] = run_ranks(1, _evaluations, base, dropless, 1)
    assert [result.drop_rate for result, _, _ in results] == [0.0] * 4


def test_a_poll_may_end_it(config: Config) -> None:
    model, data = model_and_data(config)

    def poll(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        evaluate(model, data, rank=0, world_size=1, batch_size=2, precision="fp64", device=CPU, poll=poll)


def test_perplexity_of_a_model_that_diverged_is_a_number() -> None:
    lost = Evaluation(name="x", loss=1e6, num_tokens=1, bits_per_byte=None, drop_rate=0.0)
    assert math.isfinite(lost.perplexity)
