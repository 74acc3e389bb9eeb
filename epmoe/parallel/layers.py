"""The MoE layers of a model whose experts are spread over ranks: whose parameters are experts', and whether somebody
reduces their gradients. The layers are asked; a name says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from epmoe.comm.exchange import DISCONNECTED, Disconnected
from epmoe.moe.experts import ModuleExperts
from epmoe.moe.layer import MoELayer
from epmoe.parallel.mesh import ExpertMesh

UNREDUCED = (
    "the experts of this layer are spread over ranks, and nobody sums their gradients over the ranks that hold the "
    "same ones; call prepare(model, mesh) of epmoe.parallel.ddp, .fsdp or .deepspeed, or make "
    "epmoe.parallel.gradients.Gradients(model, mesh) and reduce with it"
)


def moe_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Names and MoE layers of a model."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MoELayer)]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of experts, by their names in the model; one that several layers share stands once."""
    ids = {id(parameter) for _, layer in moe_layers(model) for parameter in layer.experts.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}


def refuse_shared(model: nn.Module) -> None:
    """Experts are summed over some ranks and dense parameters over all: a parameter cannot be both. Nor can it be that
    of several experts that are modules: those on other ranks would have a copy that is trained apart.

    Raises:
        ValueError: One is.
    """
    number_of: dict[int, str] = {}
    for _, layer in moe_layers(model):
        for number, module in (
            layer.experts.experts.items() if isinstance(layer.experts, ModuleExperts) else ()
        ):
            for leaf, parameter in module.named_parameters():
                if number_of.setdefault(id(parameter), number) != number:
                    raise ValueError(
                        f"experts {number_of[id(parameter)]} and {number} share the parameter {leaf}, and experts on "
                        f"other ranks could not; give each its own, or use ep_size=1"
                    )
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    inside = {id(module) for _, layer in moe_layers(model) for module in layer.experts.modules()}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(module) not in inside and id(parameter) in experts:
                shared = f"{name}.{leaf}" if name else leaf
                raise ValueError(
                    f"{shared} is shared with an expert, which other ranks will not have; give one of them a parameter "
                    f"of its own before shard_experts"
                )


def spread_layers(model: nn.Module, mesh: ExpertMesh) -> list[tuple[str, MoELayer]]:
    """Names and MoE layers of a model after ``epmoe.shard_experts``.

    Raises:
        ValueError: A layer does not hold this rank's share of the experts.
    """
    layers = moe_layers(model)
    for name, layer in layers:
        held, wanted = getattr(layer.experts, "num_local", None), layer.moe.num_experts // mesh.ep_size
        if held != wanted:
            raise ValueError(
                f"{name or 'the layer'} holds {held} experts, but {layer.moe.num_experts} over {mesh.ep_size} ranks "
                f"are {wanted} on each; call epmoe.shard_experts(model, mesh) first"
            )
    return layers


def refuse_equal_numbers(model: nn.Module) -> None:
    """Raises where two MoE layers of a model would draw the same random numbers.

    Raises:
        ValueError: With the names of both.
    """
    seen: dict[int, str] = {}
    for name, layer in moe_layers(model):
        number = getattr(getattr(layer, "router", None), "layer", None)
        if number is None:  # a router of somebody else's
            continue
        if number in seen:
            raise ValueError(
                f"{seen[number]} and {name} are both layer {number}, so they draw the same random numbers; give each "
                f"MoE layer of a model its own: build_moe_layer(..., layer=1)"
            )
        seen[number] = name


def take_over(model: nn.Module, by: str) -> list[MoELayer]:
    """Lets the MoE layers of ``model`` train: whoever calls this reduces the gradients of their experts over the ranks
    that hold the same ones.

    Args:
        by: Who does.

    Returns:
        The layers with experts on several ranks that nobody had before.

    Raises:
        ValueError: Somebody else reduces those of a layer already, or two layers have the same number.
    """
    refuse_equal_numbers(model)
    spread = [(name, layer) for name, layer in moe_layers(model) if layer.before_training is not None]
    for name, layer in spread:
        if isinstance(layer.before_training, Reduced) and layer.before_training.by != by:
            raise ValueError(
                f"the gradients of {name or 'the layer'} are reduced by {layer.before_training.by} already, and {by} "
                f"would do it once more; use one of them, or a deepcopy of the model for the other"
            )
    fresh = [layer for _, layer in spread if not isinstance(layer.before_training, Reduced)]
    for layer in fresh:
        layer.before_training = Reduced(by)
    return fresh


def refuse_if_unreduced(layer: MoELayer) -> None:
    """Of a layer whose experts are spread over ranks, until somebody takes over.

    Raises:
        RuntimeError: Always; a layer from a file is told to join the ranks first.
    """
    exchange = getattr(layer.dispatcher, "exchange", None)
    raise RuntimeError(DISCONNECTED if isinstance(exchange, Disconnected) else UNREDUCED)


def _nobody() -> Callable[[MoELayer], None]:
    return refuse_if_unreduced


@dataclass(slots=True)
class Reduced:
    """Of a layer whose experts are spread over ranks, when somebody sums their gradients. Nobody does it for a copy,
    whose parameters are others: there this becomes ``refuse_if_unreduced``."""

    by: str
    looked: bool = False

    def __call__(self, layer: MoELayer) -> None:
        """Before every pass that will be differentiated; looks at the wrapper in the first."""
        if not self.looked and not torch.compiler.is_compiling():
            refuse_if_ddp_has_experts(layer)
            self.looked = True

    def __deepcopy__(self, _: object) -> Callable[[MoELayer], None]:
        return _nobody()

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()


def refuse_if_ddp_has_experts(layer: MoELayer) -> None:
    """Looks whether DDP was told to leave the layer's experts alone.

    Raises:
        RuntimeError: It was not: it has given every rank the experts of rank 0.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    experts = {id(parameter) for parameter in layer.experts.parameters()}
    for name, parameter in () if wrapper is None else wrapper.module.named_parameters():
        if id(parameter) in experts and name not in wrapper.parameters_to_ignore:
            raise RuntimeError(
                f"DDP treats {name} as though all ranks had the same experts, and has overwritten them with rank 0's; "
                f"wrap the module that shard_experts was given, after it, or give it the module that is wrapped"
            )
