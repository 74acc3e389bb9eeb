"""``torch.compile`` for the training passes of a decoder's blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epmoe.config import MoEConfig
from epmoe.errors import ConfigError
from epmoe.models.decoder import Block, BlockFunction, Decoder
from epmoe.moe.dispatch import PaddedDispatcher
from epmoe.moe.recompute import KEEP, Recompute
from epmoe.types import RouterReport

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def compile_blocks(model: Decoder, *, in_shards: bool = False, backend: str = "inductor") -> str:
    """Compiles every block for training, each piece without a graph break -> what is compiled, in one line.

    A block with experts is one graph where nothing in it waits for the device or for rows: padded dispatch with a
    capacity, without overlap, and a router that decides there. Otherwise, and where the decision is to be replayed
    (``recompute: full``) or weights are in shards, its dense parts are graphs and the experts among them run as they
    are. Nothing is compiled yet: the first training pass does that. Evaluation and generation, whose shapes differ,
    are not compiled.

    Args:
        model: With its dispatchers and ``recompute`` as they will be.
        in_shards: The experts' weights are gathered when they are called (engine fsdp), which no graph can hold.
        backend: Of ``torch.compile``.
    """
    compiler = _compiler(backend, len(model.blocks))
    whole = 0
    for block in model.blocks:
        assert isinstance(block, Block)
        in_one = _is_one_graph(block, in_shards)
        block.compiled = _whole(block, compiler) if in_one else _around_experts(block, compiler)
        whole += in_one
    parts = len(model.blocks) - whole
    said = [f"{whole} whole block(s)"] if whole else []
    return " and ".join(said + ([f"the dense parts of {parts}"] if parts else []))


def compiler_problem() -> ConfigError | None:
    """Why nothing can be compiled here; None where a C++ compiler is at hand, which every device needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return ConfigError(
            "train.compile=true needs a C++ compiler, and none works here",
            why=" ".join(str(error).split()),
            fix="install g++ (or name a compiler in CXX), or set train.compile=false",
        )
    return None


def _compiler(backend: str, num_blocks: int) -> Compiler:
    """Layers differ in numbers that graphs have built in (the key of their draws), so each has graphs of its own."""
    options: dict[str, Any] = {"fullgraph": True, "backend": backend}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    else:
        from torch._dynamo import config  # takes seconds to import

        config.recompile_limit = max(config.recompile_limit, 4 * num_blocks)
    return lambda function: torch.compile(function, **options)


def _is_one_graph(block: Block, in_shards: bool) -> bool:
    if block.moe is None:
        return True
    moe: MoEConfig = block.moe.moe
    static = moe.router.no_capacity is not None or moe.capacity_factor is not None
    dispatcher = block.moe.dispatcher
    padded = isinstance(dispatcher, PaddedDispatcher)  # and no overlap of one
    left_out = in_shards or moe.router.decides_on_host or block.recompute == "full"
    return static and padded and not left_out


def _whole(block: Block, compiler: Compiler) -> BlockFunction:
    compiled = compiler(block.run)

    def run(x_BSD: Tensor, inputs: Any, ctx: Any, *_: object) -> tuple[Tensor, RouterReport | None]:
        out: tuple[Tensor, RouterReport | None] = compiled(x_BSD, inputs, ctx)
        return out

    return run


def _around_experts(block: Block, compiler: Compiler) -> BlockFunction:
    attend, add, moe = compiler(block.attend), compiler(block.add), block.moe
    beside = None if block.shared is None else compiler(block.shared.forward)
    assert moe is not None

    def run(
        x_BSD: Tensor,
        inputs: Any,
        ctx: Any,
        cache: None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, RouterReport]:
        x_BSD, normed_BSD = attend(x_BSD, inputs, ctx)
        out_BSD, report = moe(normed_BSD, ctx, beside, recompute)
        return add(x_BSD, out_BSD, ctx), report

    return run
