"""Rotary positions, grouped-query attention, masks and the cache against loops in float64."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from epmoe.config import ModelConfig
from epmoe.errors import EpmoeError
from epmoe.models.attention import Attention, KVCache, apply_rotary, attention_inputs, rotary_table

F64 = torch.float64


def config_with(**changes: object) -> ModelConfig:
    return ModelConfig(**{"d_model": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, **changes})


def attention_with(config: ModelConfig, seed: int = 0) -> Attention:
    attention = Attention(config, layer=0).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return attention


def tokens(batch: int, length: int, width: int = 12, seed: int = 9) -> Tensor:
    return torch.randn(batch, length, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def turn(vector: list[float], position: int, theta: float) -> list[float]:
    """RoPE on one head: channels (i, i + P/2) are a complex number that turns."""
    half = len(vector) // 2
    turned = [
        complex(vector[i], vector[i + half]) * cmath.exp(1j * position * theta ** (-i / half))
        for i in range(half)
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


@torch.no_grad()
def loop_attention(
    attention: Attention, config: ModelConfig, x_SD: Tensor, segment_S: list[int] | None = None
) -> Tensor:
    """One sequence, one head, one query and one key at a time."""

    def heads(weight_XD: Tensor, norm_P: Tensor | None, rotary: bool) -> list[list[list[float]]]:
        rows = (x_SD @ weight_XD.T).unflatten(-1, (-1, config.head_size)).tolist()
        for s, row in enumerate(rows):
            for h, head in enumerate(row):
                if norm_P is not None:
                    scale = math.sqrt(sum(v * v for v in head) / len(head) + config.norm_eps)
                    head = [v / scale * float(w) for v, w in zip(head, norm_P, strict=True)]
                row[h] = turn(head, s, config.rope_theta) if rotary else head
        return rows

    weights_of = dict(attention.named_parameters())
    queries = heads(weights_of["q_proj.weight"], weights_of.get("q_norm.weight"), True)
    keys = heads(weights_of["k_proj.weight"], weights_of.get("k_norm.weight"), True)
    values = heads(weights_of["v_proj.weight"], None, False)
    share = config.num_heads // config.kv_heads
    rows: list[list[float]] = []
    for s in range(len(x_SD)):
        row: list[float] = []
        for h in range(config.num_heads):
            seen = [m for m in range(s + 1) if segment_S is None or segment_S[m] == segment_S[s]]
            scores = [
                sum(a * b for a, b in zip(queries[s][h], keys[m][h // share], strict=True))
                / math.sqrt(config.head_size)
                for m in seen
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            row += [
                sum(w * values[m][h // share][p] for w, m in zip(weights, seen, strict=True)) / sum(weights)
                for p in range(config.head_size)
            ]
        rows.append(row)
    return torch.tensor(rows, dtype=F64) @ attention.o_proj.weight.T


@pytest.mark.parametrize("start", [0, 5])
def test_rotary_turns_the_halves_of_a_head(start: int) -> None:
    x_BHQP = torch.randn(1, 1, 3, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    cos_QP, sin_QP = rotary_table(3, 6, 100.0, start=start, dtype=F64, device=x_BHQP.device)
    expected = [turn(x_BHQP[0, 0, q].tolist(), start + q, 100.0) for q in range(3)]
    torch.testing.assert_close(apply_rotary(x_BHQP, cos_QP, sin_QP)[0, 0], torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_is_the_loop(heads: int, kv_heads: int, qk_norm: bool) -> None:
    config = config_with(num_heads=heads, num_kv_heads=kv_heads, qk_norm=qk_norm)
    attention, x_BSD = attention_with(config), tokens(2, 7)
    got_BSD = attention(x_BSD, attention_inputs(config, x_BSD))
    for b in range(2):
        torch.testing.assert_close(got_BSD[b], loop_attention(attention, config, x_BSD[b]))


def test_attention_stays_inside_a_document() -> None:
    config = config_with()
    attention, x_BSD = attention_with(config), tokens(2, 6)
    segments = [[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, 3]]
    inputs = attention_inputs(config, x_BSD, segment_BS=torch.tensor(segments))
    got_BSD = attention(x_BSD, inputs)
    for b in range(2):
        torch.testing.assert_close(got_BSD[b], loop_attention(attention, config, x_BSD[b], segments[b]))


def test_grouped_heads_are_repeated_heads() -> None:
    grouped_config, full_config = config_with(), config_with(num_kv_heads=4)
    grouped, full = attention_with(grouped_config), attention_with(full_config)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x_BSD = tokens(2, 5)
    inputs = attention_inputs(grouped_config, x_BSD)
    torch.testing.assert_close(grouped(x_BSD, inputs), full(x_BSD, inputs))


def test_gradients_of_attention() -> None:
    config = config_with(qk_norm=True)
    attention, x_BSD = attention_with(config), tokens(1, 3).requires_grad_()
    inputs = attention_inputs(config, x_BSD)
    assert torch.autograd.gradcheck(lambda x: attention(x, inputs), (x_BSD,))


def test_softmax_of_half_precision_attention_is_wide() -> None:
    # 512 keys of equal score: a bfloat16 sum of 512 ones would stop at 256 and double the result.
    config = config_with(num_heads=1, num_kv_heads=1)
    attention = Attention(config, layer=0).bfloat16()
    for parameter in attention.parameters():
        torch.nn.init.ones_(parameter)
    torch.nn.init.zeros_(attention.q_proj.weight)
    x_BSD = torch.full((1, 512, 12), 0.25, dtype=torch.bfloat16)
    out_BSD = attention(x_BSD, attention_inputs(config, x_BSD))
    torch.testing.assert_close(out_BSD, torch.full_like(out_BSD, 12.0), rtol=2**-7, atol=0)


@pytest.mark.parametrize("pieces", [[6], [1] * 6, [3, 3], [2, 1, 3]])
def test_cache_equals_one_pass(pieces: list[int]) -> None:
    config = config_with(num_layers=1)
    attention, x_BSD = attention_with(config), tokens(2, 6)
    expected_BSD = attention(x_BSD, attention_inputs(config, x_BSD))
    cache, parts = KVCache(config, 8), []
    with torch.no_grad():
        for piece_BSD in x_BSD.split(pieces, dim=1):
            cache.check_room(piece_BSD.size(1))
            inputs = attention_inputs(config, piece_BSD, start=cache.length)
            parts.append(attention(piece_BSD, inputs, cache))
            cache.advance(piece_BSD.size(1))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BSD)


def test_cache_refuses_more_than_it_holds() -> None:
    cache = KVCache(config_with(), 4)
    cache.advance(3)
    cache.check_room(1)
    with pytest.raises(EpmoeError, match=r"holds 4 tokens, got 3 \+ 2"):
        cache.check_room(2)
