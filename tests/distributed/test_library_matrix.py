"""The library in everyday uses: each trains the weights of one process, under every wrapper.

A step is SGD with momentum, so that what should rest and does not is seen; four steps of two ranks, each with its own
tokens.
"""

from __future__ import annotations

import copy
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import epmoe
from epmoe import ModuleExperts, MoEConfig, TokenContext, build_moe_layer, shard_experts
from epmoe.moe.experts import FFNExperts
from epmoe.moe.layer import MoELayer
from epmoe.moe.recompute import Replay
from epmoe.parallel import ddp, deepspeed, fsdp
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import ExpertMesh, build_mesh
from epmoe.process import runtime
from tests.distributed.harness import run_ranks
from tests.patience import HANGS_S

RANKS, STEPS, MOE = 2, 4, MoEConfig(num_experts=4, router="topk", losses={}, capacity_factor=None)
USES = (
    "nothing special",
    "frozen before",
    "frozen after",
    "frozen in between",
    "frozen at first",
    "tied",
    "zeroed in place",
    "optimizer before",
    "deep copy",
    "called twice",
    "recomputed",
    "loss mask",
    "clipped",
    "moved to a dtype and back",
)
TORCH_FORBIDS = {"fsdp": {"optimizer before", "tied"}}
"""FSDP2 makes parameters of its own, and cuts a module that shares one with another only together with it."""


class Net(nn.Module):
    """Its layers stand under names that could be taken for experts, and the other way round."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.router = nn.Linear(6, 8)
        self.experts = build_moe_layer(MOE, d_model=8, d_ff=12, layer=0)
        self.other = nn.ModuleDict({"experts": build_moe_layer(MOE, d_model=8, d_ff=12, layer=1)})
        self.w_in = nn.Linear(8, 3)
        if use == "tied":
            self.other["experts"].experts.w_in = self.experts.experts.w_in

    def forward(self, x_BSX: Tensor) -> Tensor:
        h_BSD = self.router(x_BSX)
        for layer in (
            self.experts,
            self.other["experts"],
            *([self.experts] if self.use == "called twice" else []),
        ):
            if self.use == "recomputed":
                y_BSD, _ = checkpoint(layer, h_BSD, None, recompute=Replay(), use_reentrant=False)
            else:
                y_BSD, _ = layer(h_BSD)
            h_BSD = h_BSD + y_BSD
        return self.w_in(h_BSD)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x_BSX = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return x_BSX, torch.rand(2, 5, generator=generator) < 0.3 + 0.5 * rank


def loss_of(model: nn.Module, use: str, step: int, rank: int) -> Tensor:
    """The rank's share of the objective: all shares together are it."""
    x_BSX, mask_BS = batch(step, rank)
    y_BS = model(x_BSX.to(next(model.parameters()).dtype)).square().sum(-1)
    if use != "loss mask":
        return y_BS.mean() / RANKS
    return (y_BS * mask_BS).sum() / sum(batch(step, r)[1].sum() for r in range(RANKS))


def freeze(model: Net, use: str, step: int) -> None:
    if use == "frozen in between":
        model.experts.router.requires_grad_(step != 2)
        model.experts.experts.requires_grad_(step != 2)
    if use == "frozen at first":
        model.other.requires_grad_(step > 0)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def alone(use: str) -> dict[str, Tensor]:
    """One process that has the tokens of all ranks."""
    model = Net(use).double()
    if use.startswith("frozen b") or use == "frozen after":
        model.experts.experts.requires_grad_(False)
    if use == "moved to a dtype and back":
        model.bfloat16().double()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        freeze(model, use, step)
        optimizer.zero_grad()
        for rank in range(RANKS):
            loss_of(model, use, step, rank).backward()
        if use == "clipped":
            norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            for parameter in model.parameters():
                parameter.grad *= min(1.0, 0.05 / norm)  # torch's own adds 1e-6 to the norm
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def prepared(use: str, wrapper: str, mesh: ExpertMesh) -> tuple[Net, nn.Module, torch.optim.Optimizer, Any]:
    """The model after the calls that its wrapper needs, what is called, the optimizer, ``Gradients`` if it is plain."""
    model = Net(use).double()
    if use == "frozen before":
        model.experts.experts.requires_grad_(False)
    early = optimizer_of(model) if use == "optimizer before" else None
    shard_experts(model, mesh)
    if use == "frozen after":
        model.experts.experts.requires_grad_(False)
    if use == "deep copy":
        model = copy.deepcopy(model)
    if use == "moved to a dtype and back":
        model.bfloat16().double()
    freeze(model, use, 0)
    wrapped, gradients = model, None
    if wrapper == "plain":
        gradients = Gradients(model, mesh)
    elif wrapper == "ddp":
        ddp.prepare(model, mesh)
        wrapped = DistributedDataParallel(model, find_unused_parameters=use == "frozen in between")
    elif wrapper == "ddp, prepared after":
        wrapped = DistributedDataParallel(model, find_unused_parameters=use == "frozen in between")
        ddp.prepare(model, mesh)
    else:
        fsdp.prepare(model, mesh)
        fully_shard(model)
    return model, wrapped, early or optimizer_of(model), gradients


def trained(use: str, wrapper: str, mesh: ExpertMesh, rank: int) -> dict[str, tuple[Tensor, int]]:
    """This rank's rows of every weight after the last step, and which of the whole is the first."""
    model, wrapped, optimizer, gradients = prepared(use, wrapper, mesh)
    for step in range(STEPS):
        freeze(model, use, step)
        optimizer.zero_grad(set_to_none=use != "zeroed in place")
        loss = loss_of(wrapped, use, step, rank)
        (loss if gradients else loss * RANKS).backward()  # wrappers divide by the number of ranks
        if gradients:
            gradients.reduce()
        if use == "clipped":
            epmoe.clip_grad_norm_(wrapped, mesh, 0.05)
        optimizer.step()
    owners = {
        id(p): layer
        for layer in model.modules()
        if isinstance(layer, MoELayer)
        for p in layer.experts.parameters()
    }
    found = {}
    for name, parameter in model.named_parameters():
        experts = owners[id(parameter)].experts if id(parameter) in owners else None
        first = 0 if experts is None else experts.first_expert
        if wrapper == "fsdp" and experts is None:
            first = rank * -(-parameter.shape[0] // RANKS)
        found[name] = (rows_here(parameter).clone(), first)
    return found


def all_uses(rank: int, wrapper: str) -> dict[str, dict[str, tuple[Tensor, int]]]:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), RANKS)
    uses = [use for use in USES if use not in TORCH_FORBIDS.get(wrapper, ())]
    if wrapper.startswith("ddp"):
        uses.remove("frozen at first")  # DDP itself never learns of what is trained later
    return {use: trained(use, wrapper, mesh, rank) for use in uses}


@pytest.mark.parametrize("wrapper", ["plain", "ddp", "ddp, prepared after", "fsdp"])
def test_every_use_trains_what_one_process_trains(wrapper: str, tmp_path: Path) -> None:
    ranks: list[dict[str, Any]] = run_ranks(RANKS, all_uses, tmp_path, wrapper)
    wrong = []
    for use in ranks[0]:
        whole = alone(use)
        for found in ranks:
            for name, (rows, first) in found[use].items():
                wanted = whole[name][first : first + rows.shape[0]]
                if not torch.allclose(rows, wanted, rtol=0, atol=1e-12):
                    wrong.append(f"{use}: {name} by {float((rows - wanted).abs().max()):.1e}")
    assert wrong == []


# ------------------------------------------------------------------------------------------- identity
def keep_identity(rank: int) -> None:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), RANKS)
    layer = build_moe_layer(MOE, d_model=8, d_ff=12)
    layer.experts.w_out.requires_grad_(False)
    before = dict(layer.named_parameters())
    touched: list[str] = []
    layer.experts.w_in.register_hook(lambda _: touched.append("hook"))
    layer.experts.w_in.note = "of the user"
    layer.experts.w_in.grad = torch.arange(4.0).view(4, 1, 1).expand_as(layer.experts.w_in).clone()
    shard_experts(layer, mesh)
    assert all(before[name] is parameter for name, parameter in layer.named_parameters())
    assert not layer.experts.w_out.requires_grad
    assert layer.experts.w_in.note == "of the user"
    assert layer.experts.w_in.grad[:, 0, 0].tolist() == [2.0 * rank, 2.0 * rank + 1]
    gradients = Gradients(layer, mesh)
    layer(torch.randn(1, 3, 8))[0].sum().backward()
    gradients.reduce()
    assert touched == ["hook"]


def test_parameters_stay_what_they_are(tmp_path: Path) -> None:
    run_ranks(RANKS, keep_identity, tmp_path)


def refuse(rank: int) -> None:
    place = runtime.start("cpu", HANGS_S)
    mesh = build_mesh(place, RANKS)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = build_moe_layer(MOE, d_model=8, d_ff=12)
            self.dense = FFNExperts(4, 8, 12)
            self.dense.w_in = self.moe.experts.w_in

    with pytest.raises(ValueError, match=r"dense\.w_in is shared with an expert"):
        shard_experts(Shared(), mesh)
    with pytest.raises(ValueError, match="shard_experts comes before DistributedDataParallel"):
        shard_experts(DistributedDataParallel(build_moe_layer(MOE, d_model=8, d_ff=12)), mesh)
    with pytest.raises(ValueError, match="ep_size=3 does not divide 2 ranks; valid values: 1, 2"):
        build_mesh(place, 3)
    odd = build_moe_layer(MOE.model_copy(update={"num_experts": 5}), d_model=8, d_ff=12)
    with pytest.raises(ValueError, match="must divide the world size 2 and num_experts=5"):
        shard_experts(odd, mesh)
    twins = nn.ModuleList(build_moe_layer(MOE, d_model=8, d_ff=12) for _ in range(2))
    with pytest.raises(ValueError, match="0 and 1 are both layer 0, so they draw the same random numbers"):
        shard_experts(twins, mesh)
    for twin in twins:
        shard_experts(twin, mesh)
    for reduce in (Gradients, ddp.prepare):
        with pytest.raises(ValueError, match="0 and 1 are both layer 0"):
            reduce(twins, mesh)
    inner = build_moe_layer(MOE, d_model=8, d_ff=12)
    shard_experts(inner, mesh)
    ddp.prepare(inner, mesh)
    outer = DistributedDataParallel(nn.ModuleDict({"inner": inner, "beside": nn.Linear(8, 8)}))
    outer.module.forward = lambda x: inner(outer.module["beside"](x))[0]
    with pytest.raises(
        RuntimeError, match=r"DDP treats inner\.experts\.w_in as though all ranks had the same"
    ):
        outer(torch.randn(1, 3, 8))
    norms = ModuleExperts([nn.BatchNorm1d(8) for _ in range(2)], num_experts=4, first_expert=2 * rank)
    padded = MOE.model_copy(update={"dispatcher": "padded", "capacity_factor": 1.0})
    with pytest.raises(ValueError, match="is a BatchNorm1d, and padded dispatch"):
        build_moe_layer(padded, d_model=8, experts=norms)


def test_what_would_train_wrongly_is_refused(tmp_path: Path) -> None:
    run_ranks(RANKS, refuse, tmp_path)


# ------------------------------------------------------------------------------------------- copies and files
def copies(rank: int) -> None:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), RANKS)
    layer = build_moe_layer(MOE, d_model=8, d_ff=12)
    x_BSD = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(rank))
    whole, _ = layer(x_BSD)
    shard_experts(layer, mesh)
    average = torch.optim.swa_utils.AveragedModel(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for again in (layer.eval(), copy.deepcopy(layer), average.module.eval()):
        torch.testing.assert_close(again(x_BSD)[0], whole)
    loaded.eval()
    with pytest.raises(RuntimeError, match=r"loaded from a file.*call epmoe\.shard_experts"):
        loaded(x_BSD)
    shard_experts(loaded, mesh)
    torch.testing.assert_close(loaded(x_BSD)[0], whole)


def test_a_sharded_layer_is_copied_averaged_saved_and_joined_again(tmp_path: Path) -> None:
    run_ranks(RANKS, copies, tmp_path)


# ------------------------------------------------------------------------------------------- recomputed random numbers
@pytest.mark.parametrize("preserve", [False, True])
def test_dropout_in_experts_is_the_same_when_it_is_recomputed(preserve: bool) -> None:
    def gradient(recompute: bool) -> Tensor:
        torch.manual_seed(0)
        modules = [nn.Sequential(nn.Linear(8, 9), nn.Dropout(0.5), nn.Linear(9, 8)) for _ in range(4)]
        layer = build_moe_layer(MOE, d_model=8, experts=ModuleExperts(m for m in modules))
        x_BSD = torch.randn(2, 6, 8, requires_grad=True)
        torch.manual_seed(1)
        again = {"recompute": Replay(), "use_reentrant": False, "preserve_rng_state": preserve}
        y_BSD, _ = checkpoint(layer, x_BSD, TokenContext(), **again) if recompute else layer(x_BSD)
        state = torch.get_rng_state()
        y_BSD.square().sum().backward()
        assert torch.equal(state, torch.get_rng_state())
        return x_BSD.grad

    assert torch.equal(gradient(False), gradient(True))


# ------------------------------------------------------------------------------------------- precision
def low_precision(rank: int) -> None:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), RANKS)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = Net("nothing special")
    shard_experts(model, mesh)
    fsdp.prepare(model, mesh, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    y_BSX = model(batch(0, rank)[0].float())
    assert y_BSX.dtype == torch.bfloat16
    y_BSX.float().sum().backward()
    assert model.experts.experts.w_in.grad.dtype == torch.float32
    norm = epmoe.clip_grad_norm_(model, mesh, 1e-3)
    assert norm > 1e-3
    assert float(epmoe.clip_grad_norm_(model, mesh, 1e-3)) == pytest.approx(1e-3, rel=1e-5)


def test_fsdp_in_mixed_precision(tmp_path: Path) -> None:
    run_ranks(RANKS, low_precision, tmp_path)


def replaced(rank: int) -> None:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), 1)
    model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    first, second = Gradients(model, mesh), Gradients(model, mesh)
    model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    second.reduce()
    assert second.views["weight"].tolist() == [[2.0, 2.0]]
    with pytest.raises(RuntimeError, match="another Gradients of this model was made later"):
        first.reduce()
    norm = epmoe.clip_grad_norm_(model, mesh, float("inf"))
    assert float(norm) == pytest.approx(8**0.5)


def test_the_last_gradients_of_a_model_have_it_in_low_precision_too(tmp_path: Path) -> None:
    run_ranks(RANKS, replaced, tmp_path)


def different_shapes(rank: int) -> str:
    mesh = build_mesh(runtime.start("cpu", 20.0), RANKS)
    padded = MOE.model_copy(update={"dispatcher": "padded", "capacity_factor": 1.0})
    layer = build_moe_layer(padded, d_model=8, d_ff=12)
    shard_experts(layer, mesh)
    Gradients(layer, mesh)
    layer(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="fill up with TokenContext") as caught:
        layer(torch.randn(2, 40 + 20 * rank, 8))
    return str(caught.value)


def test_padded_dispatch_names_different_shapes(tmp_path: Path) -> None:
    for rank, told in enumerate(run_ranks(RANKS, different_shapes, tmp_path)):
        assert f"sends {(160, 240)[rank]} rows from this rank and 160 or 240 from those" in told


# ------------------------------------------------------------------------------------------- DeepSpeed
DEEPSPEED_USES = (
    *("nothing special", "frozen before", "frozen after", "tied", "optimizer before", "deep copy", "zeroed"),
    *("called twice", "recomputed", "loss mask", "moved to a dtype and back"),
)
"""DeepSpeed takes what is trained when it starts, so nothing is frozen later."""


def freeze_all_experts(model: Net) -> None:
    for layer in (model.experts, model.other["experts"]):
        layer.experts.requires_grad_(False)


def under_deepspeed(rank: int, stage: int) -> dict[str, dict[str, tuple[Tensor, int]]]:
    from deepspeed.utils import safe_get_full_grad

    mesh = build_mesh(runtime.start("cpu", HANGS_S), RANKS)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    found: dict[str, dict[str, tuple[Tensor, int]]] = {}
    for use in DEEPSPEED_USES:
        if use == "optimizer before" and stage:
            continue  # DeepSpeed says itself that it wants groups of parameters made for it
        model = Net(use)
        if use == "frozen before":
            freeze_all_experts(model)
        early = torch.optim.AdamW(model.parameters()) if use == "optimizer before" else None
        shard_experts(model, mesh)
        if use == "frozen after":
            freeze_all_experts(model)
        if use == "deep copy":
            model = copy.deepcopy(model)
        if use == "moved to a dtype and back":
            model.bfloat16().float()
        deepspeed.prepare(model, mesh)
        engine, *_ = deepspeed.load_deepspeed("cpu").initialize(model=model, optimizer=early, config=settings)
        if use == "zeroed":
            engine.backward(RANKS * loss_of(engine, use, 1, rank))
            engine.zero_grad()
            engine.optimizer.zero_grad()
        engine.backward(RANKS * loss_of(engine, use, 0, rank))
        found[use] = {
            name: (safe_get_full_grad(parameter), mesh.ep_rank * 2 if ".experts.w_" in f".{name}" else 0)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="make test-slow installs it")
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_has_the_gradients_of_one_process_in_every_use(stage: int, tmp_path: Path) -> None:
    deepspeed.load_deepspeed("cpu")  # once here instead of seconds in every child
    for found in run_ranks(RANKS, under_deepspeed, tmp_path, stage):
        for use, gradients in found.items():
            model = Net(use)
            if use == "moved to a dtype and back":
                model.bfloat16().float()
            for rank in range(RANKS):
                loss_of(model, use, 0, rank).backward()
            whole = {name: parameter.grad for name, parameter in model.named_parameters()}
            for name, (rows, first) in gradients.items():
                wanted = whole[name][first : first + rows.shape[0]]
                error = float((rows - wanted).abs().max() / wanted.abs().max())
                assert error <= 1e-6, f"{use}: {name} by {error:.1e}"
