"""Gradient buffers, their reduction, the global norm and clipping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh, build_mesh
from epmoe.parallel.norm import clip_coefficient, global_norm, scale, sharded_norm, sum_of_squares
from epmoe.process.runtime import start
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import NUM_EXPERTS, BareLayer, draw, tiny_model

CPU = torch.device("cpu")


def _flats(gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    return [b.flat for b in gradients.dense], [b.flat for b in gradients.experts]


def _backward(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """A loss whose gradient with respect to each parameter is the given tensor."""
    loss = sum((p * weights[n]).sum() for n, p in model.named_parameters() if n in weights)
    assert isinstance(loss, Tensor)
    loss.backward()


# ------------------------------------------------------------------------------------------- reduction
def _reduce(rank: int) -> None:
    runtime = start("cpu", 20)
    for ep_size in [size for size in (1, 2, 4) if runtime.world_size % size == 0]:
        mesh = build_mesh(runtime, ep_size)
        for bucket_bytes in (1, 25 * 2**20):  # every parameter on its own; all in one
            _check_sums(rank, mesh, bucket_bytes)


def _check_sums(rank: int, mesh: ExpertMesh, bucket_bytes: int) -> None:
    model = tiny_model(mesh)
    gradients = Gradients(model, mesh, bucket_bytes=bucket_bytes)
    assert (len(gradients.dense) == 3) == (bucket_bytes == 1)

    def part(name: str, shape: torch.Size, of_rank: int) -> Tensor:
        return draw(f"{name} of {of_rank}", *shape)

    for _ in range(2):  # two micro-batches accumulate; head.weight is embed.weight
        _backward(model, {n: part(n, p.shape, rank) for n, p in model.named_parameters()})
    gradients.reduce()
    everybody = range(mesh.world_size)
    assert (mesh.dp_rank, mesh.dp_size) == (rank, len(everybody))
    same_experts = [r for r in everybody if r % mesh.ep_size == mesh.ep_rank]
    for name, parameter in model.named_parameters():
        peers = same_experts if ".experts." in f".{name}" else everybody
        wanted = 2 * sum(part(name, parameter.shape, r).double() for r in peers)
        assert parameter.grad is gradients.views[name]
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-5, atol=1e-6)
    gradients.zero()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dense_gradients_sum_over_the_world_and_expert_gradients_over_their_replicas(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(world_size, _reduce, tmp_path)


def _untouched(rank: int) -> None:
    mesh = build_mesh(start("cpu", 20), 1)
    model = tiny_model(mesh)
    model.temperature.requires_grad_(False)
    gradients = Gradients(model, mesh)
    _backward(model, {"norm": torch.ones(3)} if rank == 0 else {"norm": torch.zeros(3)})
    gradients.reduce()
    assert model.temperature.grad is None
    assert "temperature" not in gradients.views
    assert model.experts.w_in.grad is not None  # nobody touched it
    assert not model.experts.w_in.grad.any()
    assert torch.equal(model.norm.grad, torch.ones(3))
    starts = [view.storage_offset() % 32 for view in gradients.views.values()]
    assert starts == [0] * len(starts)


def test_untouched_parameters_have_zero_gradients_and_frozen_ones_none(tmp_path: Path) -> None:
    run_ranks(2, _untouched, tmp_path)


def _low_precision(rank: int, masters: bool) -> tuple[float, Any]:
    mesh = build_mesh(start("cpu", 20), 1)
    model = nn.Linear(4, 1, bias=False, dtype=torch.bfloat16)
    gradients = Gradients(model, mesh, masters=masters)
    for _ in range(257):  # in bfloat16 the sum of ones stops at 256
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    gradients.reduce()
    view = gradients.views["weight"]
    assert view.dtype == torch.float32
    return float(view[0, 0]), None if model.weight.grad is None else model.weight.grad.tolist()[0]


@pytest.mark.parametrize(("masters", "left"), [(True, None), (False, [512.0] * 4)])
def test_bfloat16_parameters_accumulate_in_float32(tmp_path: Path, masters: bool, left: Any) -> None:
    """514 rounded to bfloat16 is 512."""
    assert run_ranks(2, _low_precision, tmp_path, masters) == [(514.0, left)] * 2


# ------------------------------------------------------------------------------------------- norm
class OwnExperts(BareLayer):
    """Two experts of one number each per rank."""

    def __init__(self) -> None:
        super().__init__(nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, 1))}))


def _known_norm(rank: int) -> tuple[float, float, float]:
    mesh = build_mesh(start("cpu", 20), dist.get_world_size())
    gradients = Gradients(OwnExperts(), mesh)
    gradients.views["experts.w"].copy_(torch.tensor([[2.0], [4.0]]) + 4.0 * rank)
    dense, experts = _flats(gradients)
    norm = global_norm(dense, experts, mesh.ep_group, CPU)
    coefficient = clip_coefficient(norm, 1.0)
    scale(gradients.flats, coefficient)
    return float(norm), float(coefficient), float(global_norm(dense, experts, mesh.ep_group, CPU))


def test_norm_of_four_experts_on_two_ranks(tmp_path: Path) -> None:
    """Gradients 2 and 4 on rank 0, 6 and 8 on rank 1: sqrt(4 + 16 + 36 + 64). The mean of the ranks' own norms, the
    mistake several trainers have shipped, would be (sqrt(20) + 10) / 2 = 7.236068."""
    for norm, coefficient, clipped in run_ranks(2, _known_norm, tmp_path):
        assert norm == pytest.approx(10.954452, abs=1e-6)
        assert coefficient == 1.0 / math.sqrt(120.0)
        assert clipped == pytest.approx(1.0, abs=1e-6)


def _sharded_norms(rank: int) -> tuple[float, float, float]:
    group = start("cpu", 20).world_group
    experts = [torch.tensor([2.0, 4.0]) + 4.0 * rank]
    shard, empty = [torch.full((3,), 2.0)], [torch.zeros(0)]
    cut_over_both = sharded_norm(shard if rank else empty, experts, group, replicas=1)
    on_each = sharded_norm(shard, experts, group, replicas=2)
    damaged = sharded_norm([torch.tensor([math.nan])] if rank else shard, experts, group, replicas=2)
    return float(cut_over_both), float(on_each), float(damaged)


def test_norm_of_shards_counts_every_element_once(tmp_path: Path) -> None:
    """The same four expert gradients and dense ones whose squares add up to 12, on one rank or a copy on each."""
    ranks = run_ranks(2, _sharded_norms, tmp_path)
    for cut_over_both, on_each, damaged in ranks:
        assert cut_over_both == on_each == math.sqrt(132.0)
        assert math.isnan(damaged), "a copy that is damaged is seen by every rank"


def _random_norm(rank: int) -> list[tuple[str, str]]:
    runtime = start("cpu", 20)
    bits = []
    for ep_size in (1, 2, 4):
        mesh = build_mesh(runtime, ep_size)
        model = tiny_model(mesh)
        gradients = Gradients(model, mesh)
        _backward(model, {n: draw(f"{n} of {rank}", *p.shape) for n, p in model.named_parameters()})
        gradients.reduce()
        dense, experts = _flats(gradients)
        norm = global_norm(dense, experts, mesh.ep_group, CPU)
        bits.append((float(norm).hex(), float(clip_coefficient(norm, 0.5)).hex()))
        wanted = _norm_by_hand(gradients, mesh)
        assert float(norm) == pytest.approx(wanted, rel=1e-12)
        # A rank whose experts got nothing takes part like any other.
        lonely = global_norm(dense, experts if mesh.ep_rank else [], mesh.ep_group, CPU)
        bits.append((float(lonely).hex(), ""))
    return bits


def _norm_by_hand(gradients: Gradients, mesh: ExpertMesh) -> float:
    total = sum(
        float(v.double().square().sum()) for n, v in gradients.views.items() if not n.startswith("experts.")
    )
    for name in ("experts.w_in", "experts.bias"):
        mine = gradients.views[name].double().square().sum().view(1)
        parts = [torch.zeros(1, dtype=torch.float64) for _ in range(mesh.ep_size)]
        dist.all_gather(parts, mine, group=mesh.ep_group)
        total += sum(float(part) for part in parts)
    assert mesh.ep_size * gradients.views["experts.w_in"].shape[0] == NUM_EXPERTS
    return math.sqrt(total)


def test_norm_and_coefficient_have_the_same_bits_on_every_rank(tmp_path: Path) -> None:
    ranks = run_ranks(4, _random_norm, tmp_path)
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]


def _broken_norm(rank: int) -> list[float]:
    mesh = build_mesh(start("cpu", 20), 2)
    norms = []
    for poison in (math.nan, math.inf):
        gradients = Gradients(OwnExperts(), mesh)
        if rank == 1:
            gradients.views["experts.w"][0] = poison
        norms.append(float(global_norm(*_flats(gradients), mesh.ep_group, CPU)))
    return norms


def test_every_rank_sees_that_one_expert_gradient_is_not_finite(tmp_path: Path) -> None:
    for nan, inf in run_ranks(2, _broken_norm, tmp_path):
        assert math.isnan(nan)
        assert math.isinf(inf)


def test_squares_are_summed_in_float64() -> None:
    values = draw("squares", 300_000) * 1e3
    exact = math.fsum(float(v) ** 2 for v in values.tolist())
    assert float(sum_of_squares([values[:1000], values[1000:]], CPU)) == pytest.approx(exact, rel=1e-12)
    assert float(sum_of_squares([torch.zeros(0)], CPU)) == 0.0


def test_clip_coefficient_is_one_below_the_limit_without_a_limit_and_at_zero() -> None:
    def coefficient(norm: float, limit: float | None) -> float:
        return float(clip_coefficient(torch.tensor(norm, dtype=torch.float64), limit))

    assert coefficient(0.5, 1.0) == coefficient(7.0, None) == coefficient(0.0, 1.0) == 1.0
    assert coefficient(8.0, 2.0) == 0.25
    assert math.isnan(coefficient(math.nan, 1.0))
