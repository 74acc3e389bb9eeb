"""AdamW and SGD by name, float32 masters, weight decay groups, learning-rate schedules."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from epmoe.config import OptimizerConfig
from epmoe.engines.optimizer import Optimizer, decays, learning_rate, named_weights
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh
from tests.distributed.tiny import Tiny, draw

NO_GROUPS = cast(ExpertMesh, SimpleNamespace(world_group=None, edp_group=None))
DECAYED = {
    "embed.weight": False,
    "experts.w_in": True,
    "experts.bias": False,
    "norm": False,
    "temperature": False,
}


def _make(model: nn.Module, **settings: Any) -> tuple[Optimizer, Gradients]:
    gradients = Gradients(model, NO_GROUPS)
    return Optimizer(OptimizerConfig(**settings), model, gradients.views), gradients


def _fill(gradients: Gradients, step: int) -> dict[str, Tensor]:
    for name, view in gradients.views.items():
        view.copy_(draw(f"{step} {name}", *view.shape))
    return gradients.views


# ------------------------------------------------------------------------------------------- updates
def test_adamw_follows_its_formula_in_float64() -> None:
    model = Tiny(0, 4).double()
    optimizer, gradients = _make(model, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}
    mean = {n: torch.zeros_like(p) for n, p in wanted.items()}
    square = {n: torch.zeros_like(p) for n, p in wanted.items()}
    for step, lr in enumerate((0.1, 0.05, 0.2), start=1):
        grads = _fill(gradients, step)
        optimizer.step(lr)
        for name, weight in wanted.items():
            if DECAYED[name]:
                weight *= 1 - lr * 0.3
            mean[name] = 0.8 * mean[name] + 0.2 * grads[name]
            square[name] = 0.9 * square[name] + 0.1 * grads[name] ** 2
            unbiased = mean[name] / (1 - 0.8**step)
            weight -= lr * unbiased / ((square[name] / (1 - 0.9**step)).sqrt() + 1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state()[f"{name}.exp_avg"], mean[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            optimizer.state()[f"{name}.exp_avg_sq"], square[name], rtol=1e-12, atol=1e-12
        )
        assert float(optimizer.state()[f"{name}.step"]) == 3.0


def test_sgd_subtracts_the_gradient_and_has_no_state() -> None:
    model = Tiny(0, 4)
    optimizer, gradients = _make(model, name="sgd", weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = _fill(gradients, 0)
    optimizer.step(0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.5 * grads[name])
    assert optimizer.state() == {}


def test_weight_decay_leaves_norms_embeddings_and_scalars_alone() -> None:
    for name in ("adamw", "sgd"):
        model = Tiny(0, 4)
        optimizer, _ = _make(model, name=name, weight_decay=0.5)  # all gradients are zero
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step(0.1)
        shrunk = {n: bool((p.detach() != before[n]).any()) for n, p in model.named_parameters()}
        assert shrunk == DECAYED


def test_the_experts_of_a_module_list_are_matrices_of_their_own() -> None:
    assert decays("moe.experts.experts.3.weight", torch.zeros(2, 3), set())
    assert not decays("moe.experts.experts.3.bias", torch.zeros(2), set())
    assert decays("moe.shared_experts.w", torch.zeros(2, 3), set())


def test_a_loaded_state_is_used() -> None:
    """Reading a checkpoint writes into what ``state()`` returns."""
    ours, theirs = Tiny(0, 4), Tiny(0, 4)
    a, grad_a = _make(ours)
    b, grad_b = _make(theirs)
    for step in range(3):
        _fill(grad_a, step)
        a.step(0.1)
    for name, tensor in b.state().items():
        tensor.copy_(a.state()[name])
    for name, tensor in b.weights().items():
        tensor.detach().copy_(a.weights()[name])
    for optimizer, gradients in ((a, grad_a), (b, grad_b)):
        _fill(gradients, 3)
        optimizer.step(0.1)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------- masters
def test_bfloat16_parameters_are_rounded_copies_of_float32_masters() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer, gradients = _make(model, name="sgd", weight_decay=0.0)
    for _ in range(64):  # each step is an eighth of bfloat16's resolution at 1
        gradients.views["weight"].fill_(2.0**-10)
        optimizer.step(1.0)
    master = optimizer.weights()["weight"]
    assert master.dtype == torch.float32
    assert float(master) == 1.0 - 64 * 2.0**-10
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == master.bfloat16().item() == 0.9375


def test_a_model_may_mix_dtypes_and_masters_are_published_after_loading() -> None:
    model = nn.ModuleDict({"router": nn.Linear(2, 2), "ffn": nn.Linear(2, 2, dtype=torch.bfloat16)})
    optimizer, gradients = _make(model)
    _fill(gradients, 0)
    optimizer.step(0.1)
    dtypes = {name: tensor.dtype for name, tensor in optimizer.weights().items()}
    assert set(dtypes.values()) == {torch.float32}
    assert {s.dtype for s in optimizer.state().values()} == {torch.float32}
    optimizer.weights()["ffn.weight"].fill_(0.3)
    optimizer.publish()
    assert torch.equal(model["ffn"].weight, torch.full((2, 2), 0.3, dtype=torch.bfloat16))


def test_frozen_parameters_are_stored_but_not_trained() -> None:
    model = Tiny(0, 4)
    model.norm.requires_grad_(False)
    optimizer, _ = _make(model)
    assert "norm" in optimizer.weights()
    assert not any(name.startswith("norm.") for name in optimizer.state())


def test_weights_hold_tied_tensors_once_and_only_persistent_buffers() -> None:
    names = set(named_weights(Tiny(0, 4)))
    assert names == {*DECAYED, "steps_seen"}


# ------------------------------------------------------------------------------------------- schedules
def _rates(total: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(lr=2.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak_in_its_last_step(schedule: str) -> None:
    assert _rates(40, schedule=schedule, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert _rates(3, schedule=schedule, warmup_steps=6) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_decay_ends_at_the_floor_and_never_rises(schedule: str) -> None:
    rates = _rates(50, schedule=schedule, warmup_steps=10, min_lr_ratio=0.25)
    assert rates[-1] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=10, min_lr_ratio=0.25)
    assert learning_rate(config, 60, 50) == pytest.approx(0.5)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert _rates(40, schedule="cosine", warmup_steps=0, min_lr_ratio=0.0)[19] == pytest.approx(1.0)


def test_wsd_is_flat_and_then_falls_linearly() -> None:
    rates = _rates(20, schedule="wsd", warmup_steps=2, decay_fraction=0.25, min_lr_ratio=0.0)
    assert rates[1:15] == [2.0] * 14
    assert rates[15:] == pytest.approx([1.6, 1.2, 0.8, 0.4, 0.0])


def test_constant_stays_at_the_peak() -> None:
    assert _rates(9, schedule="constant", warmup_steps=0) == [2.0] * 9


# ------------------------------------------------------------------------------------------- memory order
class Transposed(nn.Module):
    """A matrix that lies in memory column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw("weight", 5, 3).t())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("gradients_as_it_lies", [True, False])
def test_a_parameter_in_another_memory_order_gets_its_own_gradient(
    name: str, gradients_as_it_lies: bool
) -> None:
    """A fused optimizer on a CPU reads parameter and gradient number by number as they lie in memory."""
    ours, plain = Transposed(), Transposed()
    plain.weight = nn.Parameter(plain.weight.detach().contiguous())
    for model in (ours, plain):
        views = Gradients(model, NO_GROUPS).views
        if not gradients_as_it_lies:
            views = {"weight": torch.zeros(3, 5)}
        optimizer = Optimizer(OptimizerConfig(name=name), model, views)  # type: ignore[arg-type]
        for step in range(3):
            views["weight"].copy_(draw(f"{step}", 3, 5))
            optimizer.step(0.1)
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-6, atol=1e-7)


def test_the_buffer_of_gradients_lies_in_memory_as_the_parameter_does() -> None:
    model = Transposed()
    [view] = Gradients(model, NO_GROUPS).views.values()
    assert view.stride() == model.weight.stride() == (1, 3)
    (model.weight * torch.arange(15.0).view(3, 5)).sum().backward()
    assert torch.equal(view, torch.arange(15.0).view(3, 5))
    assert model.weight.grad is view
