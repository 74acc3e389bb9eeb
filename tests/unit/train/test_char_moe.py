"""configs/char-moe.yaml: the values it promises, and that a lone text file is enough for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import epmoe
from epmoe.config_file import load_config
from tests.distributed.runs import finish, history

CHAR = Path(epmoe.__file__).parents[1] / "configs" / "char-moe.yaml"


def test_the_values() -> None:
    config = load_config(CHAR)
    model, moe = config.model, config.moe
    assert (model.num_layers, model.num_heads, model.d_model, model.dropout) == (8, 8, 128, 0.1)
    assert (model.init, config.data.seq_len, config.data.tokenizer) == ("kaiming", 32, "byte")
    assert moe is not None
    assert (moe.router.name, moe.num_experts, moe.top_k, moe.every, moe.first_dense) == (
        "noisy_topk",
        8,
        2,
        1,
        0,
    )
    assert moe.losses == {"importance": 0.1, "load": 0.1}
    assert moe.capacity_factor is None


@pytest.mark.slow
def test_a_lone_text_file_is_trained_and_validated(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"It was the {i}th of many days, and nobody knew it.\n" for i in range(60)))
    overrides = {
        "out": tmp_path / "run",
        "data.cache": tmp_path / "cache",
        "data.sources.0.name": "book",
        "data.sources.0.path": book,
        "data.num_workers": 1,
        "train.steps": 2,
        "train.global_batch_size": 2,
        "train.device": "cpu",
        "train.log_every": 1,
        "train.sample.tokens": 2,
    }
    config = load_config(CHAR, [f"{key}={value}" for key, value in overrides.items()])
    folder = finish(tmp_path, config, world_size=1)
    entries = history(folder)
    assert [entry["step"] for entry in entries if "aux" in entry] == [1, 2]
    [result] = json.loads((folder / "summary.json").read_text())["validation"]
    assert (result["name"], result["num_tokens"]) == ("book", 150)
    assert 5 < result["loss"] < 8, "of the held-out end, by an untrained model"
