"""Experts over ranks: stacked ones are cut, modules are taken as they are when they are this rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epmoe import ModuleExperts, build_moe_layer, shard_experts
from epmoe.config import MoEConfig
from epmoe.moe.dispatch import AllToAllDispatcher, LocalDispatcher
from epmoe.moe.layer import MoELayer
from epmoe.parallel.layers import take_over
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from tests.distributed.harness import run_ranks
from tests.patience import HANGS_S

NUM_EXPERTS = 4
MOE = MoEConfig(num_experts=NUM_EXPERTS, top_k=2, router={"name": "topk"}, capacity_factor=None)
SOFT = MoEConfig.model_validate(
    {
        "num_experts": NUM_EXPERTS,
        "router": "soft",
        "allow_non_causal": True,
        "capacity_factor": None,
        "losses": {},
    }
)


def modules(first: int, count: int) -> list[nn.Module]:
    """Experts that know their number."""
    made: list[nn.Module] = [nn.Linear(3, 3).double() for _ in range(count)]
    for number, module in enumerate(made, start=first):
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def module_layer(first: int, count: int) -> MoELayer:
    experts = ModuleExperts(modules(first, count), num_experts=NUM_EXPERTS, first_expert=first)
    layer = build_moe_layer(MOE, d_model=3, experts=experts).double()
    weight_ED = torch.randn(NUM_EXPERTS, 3, generator=torch.Generator().manual_seed(9))
    layer.router.weight.data.copy_(weight_ED)
    return layer


def tokens(rank: int) -> Tensor:
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def share_modules(rank: int) -> dict[str, Any]:
    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, 2)
    layer = module_layer(2 * rank, 2)
    held = [id(parameter) for parameter in layer.parameters()]
    shard_experts(layer, mesh)
    with pytest.raises(RuntimeError, match="nobody sums their gradients"):
        layer(tokens(rank))
    take_over(layer, "test")
    soft = build_moe_layer(SOFT, d_model=3, d_ff=2).double()
    shard_experts(soft, mesh)
    with pytest.raises(RuntimeError, match="nobody sums their gradients"):
        soft(tokens(rank))
    y_BSD, _ = layer(tokens(rank))
    result: dict[str, Any] = {
        "output": y_BSD.detach(),
        "untouched": held == [id(parameter) for parameter in layer.parameters()],
    }
    for name, wrong in (("all", module_layer(0, 4)), ("other", module_layer(2 - 2 * rank, 2))):
        with pytest.raises(ValueError, match="ModuleExperts") as caught:
            shard_experts(wrong, mesh)
        result[name] = str(caught.value)
    stacked = build_moe_layer(MOE, d_model=3, d_ff=2)
    whole = stacked.experts.w_in.detach().clone()
    for _ in range(2):  # the second time they are this rank's already
        shard_experts(stacked, mesh)
        assert torch.equal(stacked.experts.w_in, whole[2 * rank : 2 * rank + 2])
        # In the words that stop DeepSpeed until it is told which ranks share them.
        assert (stacked.experts.w_in.allreduce, stacked.experts.w_in.group_name) == (False, "ep_size_2")
    assert isinstance(stacked.dispatcher, AllToAllDispatcher)
    with pytest.raises(ValueError, match="ep_size=2"):
        shard_experts(
            build_moe_layer(MOE.model_copy(update={"dispatcher": "local"}), d_model=3, d_ff=2), mesh
        )
    return result


def test_two_ranks(tmp_path: Path) -> None:
    whole = module_layer(0, NUM_EXPERTS)
    for rank, result in enumerate(run_ranks(2, share_modules, tmp_path)):
        wanted, _ = whole(tokens(rank))
        assert torch.allclose(result["output"], wanted, rtol=0, atol=1e-12)
        assert result["untouched"]
        assert (
            f"needs the 2 from number {2 * rank}, but its ModuleExperts has 4 from number 0" in result["all"]
        )
        assert f"has 2 from number {2 - 2 * rank}" in result["other"]
        assert f"num_experts=4, first_expert={2 * rank}) with 2 modules" in result["all"]


def one_rank(_: int) -> list[bool]:
    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, 1)
    found = []
    for name, kind in (
        ("auto", LocalDispatcher),
        ("local", LocalDispatcher),
        ("all_to_all", AllToAllDispatcher),
    ):
        layer = build_moe_layer(MOE.model_copy(update={"dispatcher": name}), d_model=3, d_ff=2)
        shard_experts(layer, mesh)
        found.append(isinstance(layer.dispatcher, kind))
    with pytest.raises(
        ValueError, match="needs the 4 from number 0, but its ModuleExperts has 2 from number 0"
    ):
        shard_experts(module_layer(0, 2), mesh)
    return found


def test_one_rank_takes_the_dispatcher_that_is_named(tmp_path: Path) -> None:
    assert run_ranks(1, one_rank, tmp_path) == [[True] * 3]
