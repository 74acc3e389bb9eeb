"""Recomputed blocks have the same gradients to the last bit, decide once, and keep less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from epmoe.config import MoEConfig
from epmoe.models.attention import attention_inputs
from epmoe.moe import dispatch, layer
from epmoe.moe.build import ROUTERS, build_moe_layer
from epmoe.moe.recompute import CheapTensors, Replay
from epmoe.moe.router import Router
from tests.unit.models.kept import Storages
from tests.unit.models.training import decoder, gradients, objective, samples
from tests.unit.moe.helpers import by_name

MODES = ("none", "selective", "full")


@pytest.mark.parametrize("router", ROUTERS)
def test_the_same_gradients_bit_for_bit(router: str) -> None:
    cases: list[dict[str, Any]] = [{}]
    if router == "gshard_top2":
        cases += [{"dispatcher": "padded"}, {"save": "hidden"}, {"capacity_factor": None}]
        cases += [{"smoothing": {"draws": 2, "sigma": 0.5, "reroute": reroute}} for reroute in (False, True)]
    for case in cases:
        wanted = gradients(decoder(router=router, **case))
        assert any(value.any() for name, value in wanted.items() if "moe" in name)
        for mode in MODES[1:]:
            got = gradients(decoder(router=router, recompute=mode, **case))
            assert got.keys() == wanted.keys()
            assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == [], mode


@pytest.mark.parametrize("precision", ["bf16_autocast", "fp16_autocast"])
def test_the_same_under_autocast(precision: str) -> None:
    dtype = {"bf16_autocast": torch.bfloat16, "fp16_autocast": torch.float16}[precision]
    found = []
    for mode in MODES:
        model = decoder(precision=precision, recompute=mode)
        with torch.autocast("cpu", dtype):
            loss = objective(model)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert [name for name, value in found[0].items() if not torch.equal(other[name], value)] == []


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls of what must happen once per layer and micro-batch."""
    calls: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        patched.setattr(owner, name, call)

    with monkeypatch.context() as patched:
        watch(Router, "decide")
        watch(Router, "inputs")
        watch(dispatch, "plan_slots")
        watch(dispatch, "plan_padded")
        watch(layer, "routing_metrics")
        yield calls


@pytest.mark.parametrize("way", ["local", "padded"])
def test_one_decision_in_two_passes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = "plan_padded" if way == "padded" else "plan_slots"
    for mode in MODES:
        model = decoder(recompute=mode, dispatcher=way)
        with counted(monkeypatch) as calls:
            objective(model).backward()
        passes = 2 if mode == "full" else 1
        assert calls == {"decide": 1, plan: 1, "routing_metrics": 1, "inputs": passes}


def test_the_second_pass_takes_the_routing_of_the_first() -> None:
    """Router weights that change in between would send other rows to the experts."""
    wanted = gradients_of_experts(decoder(), spoil=False)
    got = gradients_of_experts(decoder(recompute="full"), spoil=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def gradients_of_experts(model: Any, *, spoil: bool) -> list[Tensor]:
    loss = objective(model)
    experts = model.blocks[1].moe.experts
    if spoil:
        model.blocks[1].moe.router.weight.data.neg_()
    # Both lie behind the decision alone; what lies before it would see the gradient of the spoilt weight.
    return list(torch.autograd.grad(loss, [experts.w_in, experts.w_out]))


def test_a_decision_for_every_copy_that_is_routed_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for reroute, decisions in ((True, 3), (False, 1)):
        model = decoder(recompute="full", smoothing={"draws": 3, "sigma": 0.5, "reroute": reroute})
        with counted(monkeypatch) as calls:
            objective(model).backward()
        assert calls["decide"] == calls["plan_slots"] == decisions
        assert calls["inputs"] == 2 * decisions


def test_replay_holds_nothing_of_the_graph() -> None:
    moe = build_moe_layer(MoEConfig(num_experts=4, router="topk"), d_model=8, d_ff=8)  # type: ignore[arg-type]
    x_BSD = torch.randn(2, 6, 8, requires_grad=True)
    _, ctx = samples()
    replay = Replay()
    ctx = replace(ctx, valid_BS=None, token_BS=None, task_B=None, sample_B=torch.arange(2))
    y_BSD, report = checkpoint(
        moe, x_BSD, ctx, recompute=replay, use_reentrant=False, preserve_rng_state=False
    )
    assert replay.routing is not None
    assert replay.routing.weight_A.grad_fn is None
    assert replay.routing.weight_A.requires_grad
    (y_BSD.sum() + sum(report.losses.values())).backward()
    got = x_BSD.grad
    x_BSD.grad = None
    y_BSD, report = moe(x_BSD, ctx)
    (y_BSD.sum() + sum(report.losses.values())).backward()
    assert torch.equal(got, x_BSD.grad)


def test_a_replay_serves_one_call() -> None:
    moe = build_moe_layer(MoEConfig(num_experts=4, router="topk"), d_model=8, d_ff=8)  # type: ignore[arg-type]
    x_BSD, replay = torch.randn(2, 6, 8, requires_grad=True), Replay()
    y_BSD, _ = checkpoint(moe, x_BSD, None, recompute=replay, use_reentrant=False)
    y_BSD.sum().backward()
    with pytest.raises(ValueError, match="new Replay"):
        checkpoint(moe, x_BSD.detach() + 1, None, recompute=replay, use_reentrant=False)


def kept_per_token(mode: str) -> float:
    model = decoder(recompute=mode, precision="fp32", every=1, num_layers=1)
    token_BS, ctx = samples()
    x_BSD = model.embed(token_BS).detach().requires_grad_()
    inputs = attention_inputs(model.config, x_BSD)
    model.blocks[0](x_BSD, inputs, ctx, None)
    with Storages() as storages:
        out = model.blocks[0](x_BSD, inputs, ctx, None)
    known = [x_BSD, out[0], *out[1].losses.values(), *by_name(out[1].metrics).values()]
    return storages.alive(known) / token_BS.numel()


def test_each_mode_keeps_less() -> None:
    none, selective, full = map(kept_per_token, MODES)
    print(f"{none=} {selective=} {full=} bytes per token")
    assert full < 500, "only what belongs to the decision: some numbers per choice and per expert"
    # Two norms inside and out, and the activation of the shared expert: 4 * (4 * 16 + 2 * 24).
    assert full < selective <= none - 448


def test_evaluation_computes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(recompute="full").eval()
    with counted(monkeypatch) as calls:
        objective(model).backward()
    assert calls["inputs"] == calls["decide"] == 1


# ------------------------------------------------------------------------------------------- cheap tensors
def test_a_cheap_tensor_is_made_once_for_all_who_need_it() -> None:
    made = []

    def cheap(x: Tensor) -> Tensor:
        made.append(1)
        return x.exp() * x.sigmoid()

    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def loss(remake: Callable[..., Tensor]) -> Tensor:
        y = remake(cheap, x)
        z = remake(cheap, y @ w + y.t().contiguous().t())
        return (z @ w).square().sum() + (y[1:] * z[:3]).sum()

    wanted = torch.autograd.grad(loss(lambda fn, *inputs: fn(*inputs)), [x, w])
    with CheapTensors() as cheap_tensors:
        total = loss(cheap_tensors.remake)
    for passes in (1, 2):  # a second one through a graph that is kept
        made.clear()
        got = torch.autograd.grad(total, [x, w], retain_graph=passes == 1)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert len(made) == 2


@pytest.mark.parametrize("hooks", [CheapTensors, lambda: Replay().kept()])
def test_nothing_outlives_its_graph(hooks: Callable[[], Any]) -> None:
    """``exp`` keeps its result, which must not hold itself where no backward pass ever asks for it."""
    x = torch.randn(4, 3, requires_grad=True)
    with Storages() as storages:
        with hooks() as cheap_tensors:
            y = x.exp()
            z = cheap_tensors.remake(torch.exp, y.sigmoid()) if isinstance(cheap_tensors, CheapTensors) else y
        z.exp().sum().backward()
        with hooks():
            y = x.exp()
        del y, z, cheap_tensors
    assert storages.alive([x.grad]) == 0


def test_a_cheap_tensor_may_be_its_own_input_or_empty() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    empty = torch.empty(0, 3, requires_grad=True)
    with CheapTensors() as cheap_tensors:
        total = (
            cheap_tensors.remake(lambda t: t, x).square().sum()
            + cheap_tensors.remake(torch.exp, empty).square().sum()
        )
    total.backward()
    assert torch.equal(x.grad, 2 * x.detach())
    assert empty.grad is not None
