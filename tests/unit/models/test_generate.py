"""Generation: the same tokens as full passes, and samples that follow temperature, top-k and top-p."""

import math
from collections import Counter

import pytest
import torch

from epmoe.config import ModelConfig, MoEConfig
from epmoe.config_routers import GShardTop2Options
from epmoe.errors import ConfigError, NumericsError
from epmoe.models.decoder import Decoder
from epmoe.train.generate import choose, generate

V = 23
MODEL = ModelConfig(d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, init_std=0.4, dropout=0.5)
MOE = MoEConfig(num_experts=4, router=GShardTop2Options(jitter=0.1))


def decoder(moe: MoEConfig | None = MOE) -> Decoder:
    return Decoder(MODEL, moe, vocab_size=V, seed=1)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_greedy_is_the_argmax_of_full_passes(moe: MoEConfig | None) -> None:
    model = decoder(moe).double()
    got = list(generate(model, [3, 1, 4], max_tokens=20, temperature=0))
    tokens = [3, 1, 4]
    model.eval()
    for _ in range(20):
        logits_BSV, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits_BSV[0, -1].argmax()))
    assert got == tokens[3:]
    assert len(set(got)) > 2  # a constant answer would prove little


def test_same_seed_same_text() -> None:
    model = decoder()
    texts = [list(generate(model, [1], max_tokens=30, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_modes_are_restored_whenever_a_token_is_out() -> None:
    model = decoder().train()
    inside: list[bool] = []
    model.register_forward_hook(lambda module, *_: inside.extend([module.training, torch.is_grad_enabled()]))
    for token in generate(model, [1, 2], max_tokens=3):
        assert 0 <= token < V
        assert model.training
        assert model.blocks.training
        assert torch.is_grad_enabled()
    assert inside == [False] * 6


def test_stops_at_the_end_token_and_at_the_limit() -> None:
    model = decoder()
    text = list(generate(model, [2], max_tokens=12, temperature=0))
    assert len(text) == 12
    stop = text[5]
    assert list(generate(model, [2], max_tokens=12, temperature=0, eos_id=stop)) == text[: text.index(stop)]
    assert list(generate(model, [2], max_tokens=0)) == []


def test_padded_vocabulary_is_never_drawn() -> None:
    text = list(generate(decoder(), [2], max_tokens=100, temperature=5.0, vocab_size=7))
    assert len(text) == 100
    assert max(text) < 7


def draw(probs: list[float], n: int = 2500, **options: float) -> dict[int, float]:
    rng = torch.Generator().manual_seed(0)
    logits_V = torch.tensor([math.log(p) for p in probs])
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **options}
    counts = Counter(choose(logits_V, rng=rng, **settings) for _ in range(n))
    return {token: count / n for token, count in sorted(counts.items())}


PROBS = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"temperature": 0.5}, {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"temperature": 1e-30}, {1: 1.0}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 9}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"top_p": 0.65}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.75}, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        ({"top_p": 1e-6}, {1: 1.0}),
        ({"top_k": 3, "top_p": 0.7}, {1: 4 / 7, 3: 3 / 7}),
    ],
)
def test_choose_follows_the_law(options: dict[str, float], expected: dict[int, float]) -> None:
    assert draw(PROBS, **options) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([], {}, "no tokens"),
        ([V], {}, r"\[23, 23\]"),
        ([0], {"temperature": -1.0}, "temperature=-1.0"),
        ([0], {"top_k": 0}, "top_k=0"),
        ([0], {"top_p": 0.0}, "top_p=0.0"),
        ([0], {"vocab_size": V + 1}, "vocab_size=24"),
    ],
)
def test_wrong_arguments_fail_at_the_call(prompt: list[int], options: dict[str, float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        generate(decoder(None), prompt, max_tokens=1, **options)


def test_broken_weights_are_named() -> None:
    model = decoder(None)
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericsError, match="23 of 23 logits"):
        next(generate(model, [0], max_tokens=1))
