"""Compiled blocks train like the others: with and without experts in the graph, and together with recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epmoe.errors import ConfigError
from epmoe.models.compile import compile_blocks, compiler_problem
from epmoe.models.decoder import Block
from tests.unit.models.training import decoder, gradients, samples


def both(
    backend: str, said: str, *, precision: str, recompute: str = "none", num_layers: int = 1, **moe: Any
) -> tuple[dict[str, Tensor], ...]:
    """Gradients without and with compilation, of a model whose blocks are compiled as ``said``."""
    found = []
    for compiled in (False, True):
        model = decoder(recompute=recompute, precision=precision, num_layers=num_layers, every=1, **moe)
        if compiled:
            torch._dynamo.reset()
            assert compile_blocks(model, backend=backend) == said
        found.append(gradients(model))
    return tuple(found)


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(
        float((got[name] - value).abs().max() / value.abs().max())
        for name, value in wanted.items()
        if value.any()
    )


PARTS = "the dense parts of {}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_block_with_experts_has_the_same_gradients() -> None:
    plain, compiled = both("aot_eager", "1 whole block(s)", precision="fp64", dispatcher="padded")
    assert worst(compiled, plain) <= 1e-9


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("dispatcher", "recompute"), [("auto", "none"), ("padded", "full")])
def test_compiled_dense_parts_have_the_same_gradients(dispatcher: str, recompute: str) -> None:
    settings = {"precision": "fp64", "dispatcher": dispatcher, "recompute": recompute}
    plain, compiled = both("aot_eager", PARTS.format(1), **settings)
    assert worst(compiled, plain) <= 1e-9


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_layers_do_not_reach_a_limit_of_recompilations() -> None:
    plain, compiled = both("eager", PARTS.format(9), precision="fp64", num_layers=9)
    assert worst(compiled, plain) <= 1e-9


def test_evaluation_is_not_compiled() -> None:
    model = decoder()
    calls = []
    for block in model.blocks:
        assert isinstance(block, Block)
        block.compiled = lambda *inputs: calls.append(inputs)  # type: ignore[assignment, return-value, misc]
    token_BS = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        model.train()(*samples())
    model.eval()(token_BS)
    assert not calls


def test_no_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    problem = compiler_problem()
    assert isinstance(problem, ConfigError)
    assert "train.compile=false" in (problem.fix or "")
