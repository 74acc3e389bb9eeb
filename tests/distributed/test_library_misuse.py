"""What a user of the library may well do, and what used to train wrongly without a word: right now, or refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import epmoe
from epmoe import ModuleExperts, MoEConfig, build_moe_layer, shard_experts
from epmoe.moe.layer import MoELayer
from epmoe.parallel import ddp, fsdp
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh, build_mesh
from epmoe.process import runtime
from tests.distributed.harness import run_ranks

RANKS = 2
MOE = MoEConfig(num_experts=4, router="topk", losses={}, capacity_factor=None)
SOFT = {"router": "soft", "allow_non_causal": True, "capacity_factor": None, "losses": {}, "num_experts": 4}
PADDED = MOE.model_copy(update={"dispatcher": "padded", "capacity_factor": 1.0})


def start() -> ExpertMesh:
    return build_mesh(runtime.start("cpu", 20.0), RANKS)


def sharded(mesh: ExpertMesh, moe: MoEConfig = MOE) -> MoELayer:
    torch.manual_seed(0)
    layer = build_moe_layer(moe, d_model=8, d_ff=12)
    shard_experts(layer, mesh)
    return layer


def tokens(rank: int, seq_len: int = 6) -> Tensor:
    return torch.randn(2, seq_len, 8, generator=torch.Generator().manual_seed(rank))


# ------------------------------------------------------------------------------------------- who reduces
def copies(rank: int) -> None:
    mesh = start()
    layer = sharded(mesh)
    ddp.prepare(layer, mesh)
    layer(tokens(rank))[0].sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    shard_experts(loaded, mesh)
    for again in (copy.deepcopy(layer), loaded):
        with pytest.raises(RuntimeError, match="nobody sums their gradients"):
            again(tokens(rank))
        ddp.prepare(again, mesh)
        again(tokens(rank))[0].sum().backward()
        torch.testing.assert_close(again.experts.w_in.grad, layer.experts.w_in.grad, rtol=0, atol=0)


def twice(rank: int) -> None:
    mesh = start()
    once, again = sharded(mesh), sharded(mesh)
    for layer, calls in ((once, 1), (again, 2)):
        for _ in range(calls):
            ddp.prepare(layer, mesh)
        shard_experts(layer, mesh)
        layer(tokens(rank))[0].sum().backward()
    assert once.experts.w_in.grad.any()
    assert torch.equal(once.experts.w_in.grad, again.experts.w_in.grad)


def two_reducers(rank: int) -> None:
    mesh = start()
    layer = sharded(mesh)
    ddp.prepare(layer, mesh)
    with pytest.raises(ValueError, match="reduced by ddp already, and Gradients would do it once more"):
        Gradients(layer, mesh)
    with pytest.raises(ValueError, match="averages the gradients of this model already"):
        Gradients(DistributedDataParallel(layer), mesh)


def buffers_under_ddp(rank: int) -> None:
    mesh = start()
    experts = ModuleExperts([nn.BatchNorm1d(8) for _ in range(2)], num_experts=4, first_expert=2 * rank)
    layer = build_moe_layer(MOE, d_model=8, experts=experts)
    shard_experts(layer, mesh)
    ddp.prepare(layer, mesh)
    wrapped = DistributedDataParallel(layer)
    mean = experts.experts[str(2 * rank)].running_mean
    mean.fill_(100.0 * (1 + rank))
    for _ in range(2):  # DDP sends rank 0's buffers before every pass but the first
        wrapped(tokens(rank, 40))[0].sum().backward()
    assert float(mean[0]) == pytest.approx(81.0 * (1 + rank), abs=1.0)


# ------------------------------------------------------------------------------------------- what is shared or cut
def shared(rank: int) -> None:
    mesh = start()
    linear = nn.Linear(8, 8)
    modules = [nn.Sequential(linear, nn.ReLU()) for _ in range(2)]
    layer = build_moe_layer(
        MOE, d_model=8, experts=ModuleExperts(modules, num_experts=4, first_expert=2 * rank)
    )
    numbers = f"experts {2 * rank} and {2 * rank + 1} share the parameter 0.weight"
    with pytest.raises(ValueError, match=numbers):
        shard_experts(layer, mesh)


def late_for_fsdp(rank: int) -> None:
    mesh = start()
    model = nn.Sequential(sharded(mesh))
    fully_shard(model)
    with pytest.raises(ValueError, match=r"fully_shard has cut 0\.experts already"):
        fsdp.prepare(model, mesh)
    tied = nn.Sequential(sharded(mesh), sharded(mesh))
    tied[1].experts.w_in = tied[0].experts.w_in
    with pytest.raises(ValueError, match=r"1\.experts shares a parameter with 0\.experts"):
        fsdp.prepare(tied, mesh)


# ------------------------------------------------------------------------------------------- buffers of gradients
def low_precision(rank: int) -> None:
    mesh = start()
    for set_to_none in (True, False):
        layer = sharded(mesh).bfloat16()
        gradients, sums = Gradients(layer, mesh), []
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        for _ in range(3):
            layer(tokens(rank).bfloat16())[0].float().sum().backward()
            gradients.reduce()
            sums.append({name: view.clone() for name, view in gradients.views.items()})
            assert torch.equal(layer.experts.w_in.grad, sums[-1]["experts.w_in"].bfloat16())
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        for later in sums[1:]:
            for name, value in later.items():
                assert torch.equal(value, sums[0][name]), name
        gradients.reduce()  # of a step without a backward pass
        assert not any(view.any() for view in gradients.views.values())
        optimizer.param_groups[0]["lr"] = 1.0
        layer(tokens(rank).bfloat16())[0].float().sum().backward()
        gradients.reduce()
        wide = gradients.views["experts.w_in"].clone()
        norm = epmoe.clip_grad_norm_(layer, mesh, 0.5)
        clipped = layer.experts.w_in.grad.float()
        torch.testing.assert_close(clipped, wide * (0.5 / norm).float(), rtol=1e-2, atol=1e-6)
        before = layer.experts.w_in.detach().clone()
        optimizer.step()
        assert not torch.equal(before, layer.experts.w_in)


def changed_below_gradients(rank: int) -> None:
    mesh = start()

    def replace(layer: MoELayer) -> None:
        layer.router.weight = nn.Parameter(layer.router.weight.detach().clone())

    changes: tuple[Callable[[MoELayer], Any], ...] = (
        lambda layer: layer.double(),
        lambda layer: layer.bfloat16().float(),
        replace,
    )
    for change in changes:
        layer = sharded(mesh)
        gradients = Gradients(layer, mesh)
        layer(tokens(rank))[0].sum().backward()
        change(layer)
        for action in (gradients.reduce, gradients.zero):
            with pytest.raises(RuntimeError, match="converted, moved or replaced since Gradients was made"):
                action()


# ------------------------------------------------------------------------------------------- shapes
def later_shapes(rank: int, moe: MoEConfig) -> None:
    """The first pass agrees; then a size that only one of the ranks has not seen, and the old one again."""
    mesh = start()
    layer = sharded(mesh, moe)
    Gradients(layer, mesh)
    layer(tokens(rank, 4))
    with pytest.raises(ValueError, match=r"padded dispatch sends .* rows from this rank and .* or .* from"):
        layer(torch.randn(2 + 8 * rank, 4, 8))
    layer(tokens(rank, 4))


def padded(rank: int) -> None:
    later_shapes(rank, PADDED)


def soft(rank: int) -> None:
    later_shapes(rank, MoEConfig.model_validate(SOFT))


@pytest.mark.parametrize(
    "job",
    [
        copies,
        twice,
        two_reducers,
        buffers_under_ddp,
        shared,
        late_for_fsdp,
        low_precision,
        changed_below_gradients,
        padded,
        soft,
    ],
)
def test_right_or_refused(job: Callable[[int], None], tmp_path: Path) -> None:
    run_ranks(RANKS, job, tmp_path)


# ------------------------------------------------------------------------------------------- drawn anew
def modules(first: int, count: int) -> MoELayer:
    made = [nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 8)) for _ in range(count)]
    return build_moe_layer(MOE, d_model=8, experts=ModuleExperts(made, num_experts=4, first_expert=first))


def test_ranks_with_the_same_seed_have_different_modules_and_those_of_one_process() -> None:
    drawn = []
    for first, count in ((0, 4), (0, 2), (2, 2)):
        layer = modules(first, count).to_empty(device="cpu")
        torch.manual_seed(3)
        layer.reset_parameters()
        drawn.append(layer.state_dict())
    whole, *parts = drawn
    assert not torch.equal(whole["experts.experts.0.0.weight"], whole["experts.experts.1.0.weight"])
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name]), name


def test_an_expert_that_cannot_be_drawn_anew_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

    layer = build_moe_layer(MOE, d_model=8, experts=ModuleExperts(Scale() for _ in range(4)))
    with pytest.raises(ValueError, match="0 is a Scale with tensors and without reset_parameters"):
        layer.reset_parameters()


def other_files(rank: int) -> None:
    mesh = start()
    layer = build_moe_layer(MOE, d_model=8, d_ff=12)
    whole = copy.deepcopy(layer.state_dict())
    shard_experts(layer, mesh)
    for owner in range(RANKS):
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        sent: list[Any] = [file.getvalue() if rank == owner else None]
        dist.broadcast_object_list(sent, src=owner)
        loaded = torch.load(io.BytesIO(sent[0]))
        if owner == rank:
            layer.load_state_dict(loaded)
            continue
        with pytest.raises(
            RuntimeError, match=f"holds experts {2 * owner} to {2 * owner + 1} of 4, and this rank"
        ):
            layer.load_state_dict(loaded)
    with pytest.raises(RuntimeError, match="load all experts before shard_experts"):
        layer.load_state_dict(whole)
    fresh = build_moe_layer(MOE, d_model=8, d_ff=12)
    fresh.load_state_dict(whole)
    shard_experts(fresh, mesh)
    assert torch.equal(fresh.experts.w_in, layer.experts.w_in)
    with pytest.raises(TypeError, match="takes the model"):
        epmoe.clip_grad_norm_(layer.parameters(), mesh, 1.0)


def test_the_experts_of_another_rank_are_not_loaded(tmp_path: Path) -> None:
    run_ranks(RANKS, other_files, tmp_path)
