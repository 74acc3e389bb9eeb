"""The silent errors that expert-parallel trainers have shipped, to be planted one at a time into the real code.

Every fault is a context manager that replaces a function of epmoe by one that makes the mistake. The self-test shows
that the proof sees each of them; a proof that cannot fail proves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from epmoe.checkpoint import store as checkpoint
from epmoe.config_routers import SoftOptions
from epmoe.engines import deepspeed
from epmoe.engines import native as engine
from epmoe.engines.native import NativeEngine
from epmoe.moe.layer import MoELayer
from epmoe.moe.recompute import Recompute
from epmoe.moe.router import Router
from epmoe.parallel.gradients import Gradients
from epmoe.parallel.mesh import is_expert
from epmoe.parallel.norm import sum_of_squares
from epmoe.train import build as setup
from epmoe.train import trainer as loop
from epmoe.train.trainer import Trainer
from epmoe.verify.small_config import Subject

Plant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One mistake."""

    name: str
    consequence: str
    """What it does to a run that nobody checks."""
    plant: Plant
    about_experts: bool = True
    """It needs experts that are spread over ranks."""
    about_decisions: bool = False
    """It needs a router that chooses experts; soft mixtures have none."""
    loss: str | None = None
    """The auxiliary loss it is about."""
    engine: str = "native"
    """The engine it is about."""

    def absent(self, subject: Subject, largest_ep: int) -> str | None:
        """Why it cannot happen with a configuration, or here; None if it can."""
        config = subject.config
        if self.engine == "deepspeed" and subject.no_deepspeed is not None:
            return f"engine: deepspeed cannot run here: {subject.no_deepspeed}"
        if self.about_experts and (config.moe is None or largest_ep == 1):
            return "no experts are spread over these ranks"
        if self.about_decisions and (config.moe is None or isinstance(config.moe.router, SoftOptions)):
            return "no router here chooses experts"
        if self.loss and (config.moe is None or self.loss not in config.moe.losses):
            return f"the configuration has no {self.loss} loss"
        return None


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, ``owner.name`` is ``make(original)``."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _then(owner: Any, name: str, more: Callable[..., None]) -> Plant:
    """After the original, ``more`` is called with the same arguments."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            more(*args, **kwargs)
            return result

        return both

    return lambda: replaced(owner, name, make)


def _around(owner: Any, name: str, instead: Callable[..., Any]) -> Plant:
    """``instead`` is called with the original and its arguments."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: instead(original, *args, **kwargs)

    return lambda: replaced(owner, name, make)


# ------------------------------------------------------------------------------------------- gradients
@torch.no_grad()
def _scale_gradients(native: NativeEngine, *, experts: bool, factor: float) -> None:
    for name, part in native.gradients().items():
        if is_expert(name) == experts:
            part.local.mul_(factor)


def _times_ep(native: NativeEngine) -> None:
    _scale_gradients(native, experts=True, factor=native._mesh.ep_size)


def _divided_by_edp(native: NativeEngine) -> None:
    _scale_gradients(native, experts=True, factor=1 / native._mesh.edp_size)


def _dense_averaged(native: NativeEngine) -> None:
    _scale_gradients(native, experts=False, factor=1 / native._mesh.world_size)


def _without_experts(original: Callable[[Gradients], None], gradients: Gradients) -> None:
    experts, gradients.experts = gradients.experts, []
    original(gradients)
    gradients.experts = experts


def _own_divisor(original: Any, module: FSDPModule, _: float) -> None:
    """Without a call FSDP2 divides by the size of the mesh of the shards."""
    module.set_force_sum_reduction_for_comms(False)


def _averaged(original: Any, zero_stage: int) -> Any:
    """Without a word about it DeepSpeed divides by the ranks."""
    raw = original(zero_stage)
    del raw["gradient_allreduce_op"]
    return raw


def _reduce_now(native: NativeEngine, _: Tensor) -> None:
    native.reduce()


# ------------------------------------------------------------------------------------------- norm
def _own_norm(dense: Any, experts: Any, device: torch.device) -> Tensor:
    return (sum_of_squares(dense, device) + sum_of_squares(experts, device)).sqrt()


def _averaged_norm(_: Any, dense: Any, experts: Any, __: Any, device: torch.device) -> Tensor:
    norm = _own_norm(dense, experts, device)
    dist.all_reduce(norm)
    return norm / dist.get_world_size()


def _norm_per_rank(_: Any, dense: Any, experts: Any, __: Any, device: torch.device) -> Tensor:
    return _own_norm(dense, experts, device)


def _norm_of_dense(original: Any, dense: Any, _: Any, group: Any, device: torch.device) -> Any:
    return original(dense, [], group, device)


# ------------------------------------------------------------------------------------------- losses
def _last_rank_twice(original: Any, model: Any, batch: Any, *, num_tokens: float, **rest: Any) -> Any:
    last = dist.get_world_size() > 1 and dist.get_rank() == dist.get_world_size() - 1
    return original(model, batch, num_tokens=num_tokens / 2 if last else num_tokens, **rest)


def _own_mean(original: Any, model: Any, batch: Any, *, num_tokens: float, **rest: Any) -> Any:
    own = max(int(batch.loss_BS.sum()), 1)
    return original(model, batch, num_tokens=own * dist.get_world_size(), **rest)


def _auxiliary_per_loss_token(
    original: Any, *args: Any, num_tokens: float, num_routed: float, **rest: Any
) -> Any:
    return original(*args, num_tokens=num_tokens, num_routed=num_tokens, **rest)


def _balance_divided(original: Any, layer: MoELayer, *args: Any) -> Any:
    report = original(layer, *args)
    losses = dict(report.losses)
    if "balance" in losses:
        losses["balance"] = losses["balance"] / dist.get_world_size()
    return replace(report, losses=losses)


def _balance_constant(original: Any, layer: MoELayer, routing: Any, *args: Any) -> Any:
    """Every expert is credited with the same counts."""
    report = original(layer, routing, *args)
    losses = dict(report.losses)
    if "balance" in losses:
        losses["balance"] = routing.probs_TE.sum()
    return replace(report, losses=losses)


def _weights_cut_off(original: Any, router: Router, *args: Any, **kwargs: Any) -> Any:
    routing = original(router, *args, **kwargs)
    return replace(routing, weight_A=routing.weight_A.detach())


def _decided_again(
    original: Any, router: Router, x_BSD: Tensor, ctx: Any, limits: Any, recompute: Recompute
) -> Any:
    """The second pass has the rows of the first, and weights that came out otherwise."""
    routing = original(router, x_BSD, ctx, limits)
    again = recompute.routing is not None
    return replace(routing, weight_A=routing.weight_A * (1.1 if again else 1.0))


# ------------------------------------------------------------------------------------------- state
@torch.no_grad()
def _broadcast_everything(model: nn.Module, _: int) -> None:
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


def _without_expert_moments(original: Any, path: Any, entries: dict[str, Tensor]) -> None:
    original(path, {key: t for key, t in entries.items() if not (is_expert(key) and ".exp_avg" in key)})


@torch.no_grad()
def _next_expert(entries: dict[str, Any], *, moments: bool) -> None:
    for key, entry in entries.items():
        if is_expert(key) and (".exp_avg" in key if moments else key.startswith("model.")):
            local = entry.to_local() if hasattr(entry, "to_local") else entry
            local.copy_(local.roll(1, 0))


def _from_the_start(_: Any, trainer: Trainer, micro: int) -> list[int]:
    start = (micro * trainer.runtime.world_size + trainer.runtime.rank) * trainer.micro_batch
    return list(range(start, start + trainer.micro_batch))


FAULTS: tuple[Fault, ...] = (
    Fault(
        name="expert gradients times ep_size",
        consequence="experts learn ep_size times too fast; Adam hides it",
        plant=_then(NativeEngine, "reduce", _times_ep),
    ),
    Fault(
        name="expert gradients divided by edp_size",
        consequence="experts learn too slowly where several ranks hold them",
        plant=_then(NativeEngine, "reduce", _divided_by_edp),
    ),
    Fault(
        name="experts left out of the all-reduce",
        consequence="copies of an expert drift apart",
        plant=_around(Gradients, "reduce", _without_experts),
    ),
    Fault(
        name="dense gradients averaged",
        consequence="dense weights learn world size times too slowly",
        plant=_then(NativeEngine, "reduce", _dense_averaged),
        about_experts=False,
    ),
    Fault(
        name="shards averaged, as FSDP2 does by itself",
        consequence="experts and dense weights are divided by different numbers of ranks",
        plant=_around(FSDPModule, "set_gradient_divide_factor", _own_divisor),
        about_experts=False,
        engine="fsdp",
    ),
    Fault(
        name="averaged over ranks, as DeepSpeed does by itself",
        consequence="everything learns world size times too slowly",
        plant=_around(deepspeed, "deepspeed_config", _averaged),
        about_experts=False,
        engine="deepspeed",
    ),
    Fault(
        name="reduced after every micro-batch",
        consequence="early micro-batches are summed over the ranks again and again",
        plant=_then(NativeEngine, "backward", _reduce_now),
        about_experts=False,
    ),
    Fault(
        name="norm averaged over ranks",
        consequence="the clip is too weak, and depends on the layout",
        plant=_around(engine, "global_norm", _averaged_norm),
    ),
    Fault(
        name="experts left out of the norm",
        consequence="the clip does not see exploding experts",
        plant=_around(engine, "global_norm", _norm_of_dense),
    ),
    Fault(
        name="a norm of its own on every rank",
        consequence="each rank clips differently and dense weights drift apart",
        plant=_around(engine, "global_norm", _norm_per_rank),
    ),
    Fault(
        name="one rank's loss counts double",
        consequence="some tokens are learnt twice as much",
        plant=_around(loop, "micro_step", _last_rank_twice),
        about_experts=False,
    ),
    Fault(
        name="each rank divides by its own tokens",
        consequence="tokens of ranks with much padding weigh more",
        plant=_around(loop, "micro_step", _own_mean),
        about_experts=False,
    ),
    Fault(
        name="auxiliary losses divided by the tokens in the loss",
        consequence="the fewer tokens count, the more the router is trained by them alone",
        plant=_around(loop, "micro_step", _auxiliary_per_loss_token),
        about_experts=False,
        loss="balance",
    ),
    Fault(
        name="balance loss divided by the ranks",
        consequence="the more ranks, the weaker the balance",
        plant=_around(MoELayer, "report", _balance_divided),
        about_experts=False,
        loss="balance",
    ),
    Fault(
        name="balance loss that sees no counts",
        consequence="experts starve and the loss says 1.0",
        plant=_around(MoELayer, "report", _balance_constant),
        about_experts=False,
        loss="balance",
    ),
    Fault(
        name="combine weights cut off from the graph",
        consequence="the router learns from the balance loss alone",
        plant=_around(Router, "forward", _weights_cut_off),
    ),
    Fault(
        name="routed again under recomputation",
        consequence="gradients belong to other decisions than the loss",
        plant=_around(Router, "forward", _decided_again),
        about_experts=False,
        about_decisions=True,
    ),
    Fault(
        name="initial broadcast over the experts",
        consequence="every rank starts with the experts of rank 0",
        plant=_then(setup, "init_weights", _broadcast_everything),
    ),
    Fault(
        name="expert moments lost on a resize",
        consequence="the optimizer forgets the experts at every change of layout",
        plant=_around(checkpoint, "_read", _without_expert_moments),
    ),
    Fault(
        name="experts read in another order",
        consequence="a resumed run sends tokens to other experts",
        plant=_then(checkpoint, "_read", lambda _, entries: _next_expert(entries, moments=False)),
    ),
    Fault(
        name="moments of other experts after a resize",
        consequence="the optimizer moves each expert as its neighbour was to be moved",
        plant=_then(checkpoint, "_read", lambda _, entries: _next_expert(entries, moments=True)),
    ),
    Fault(
        name="data starts again on a resize",
        consequence="a resumed run reads the same samples twice",
        plant=_around(Trainer, "sample_numbers", _from_the_start),
        about_experts=False,
    ),
)
