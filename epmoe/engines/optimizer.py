"""AdamW (torch's or apex's) or SGD over gradients by name, float32 masters, learning rates by step.

State is reached by fully qualified parameter name, because that is what a checkpoint is keyed by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from epmoe.config import Config, OptimizerConfig
from epmoe.errors import ConfigError
from epmoe.models.accelerators import load_apex
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.mesh import is_expert, is_stacked


# ------------------------------------------------------------------------------------------- schedules
def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (the first is 0) of ``total_steps``.

    Linear warm-up that reaches the peak in its last step, then the schedule, whose last step runs at
    ``min_lr_ratio * lr``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        done = _progress(step, config.warmup_steps, total_steps)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    decay_steps = round(config.decay_fraction * total_steps)
    start = max(config.warmup_steps, total_steps - decay_steps)
    return config.lr * (1 - (1 - floor) * _progress(step, start, total_steps))


def scheduled_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step ``step`` of a run; the first is 0."""
    return learning_rate(config.optimizer, step, config.optimizer.schedule_steps or config.train.steps)


def _progress(step: int, start: int, end: int) -> float:
    """How far a stretch of steps is done when ``step`` runs: 0 before it, 1 in its last step."""
    return min(1.0, max(0.0, (step + 1 - start) / max(1, end - start)))


# ------------------------------------------------------------------------------------------- tensors by name
def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tensor with two names (tied embeddings) comes once."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def decays(name: str, parameter: Tensor, embeddings: set[int]) -> bool:
    """Whether weight decay applies: to matrices (each expert's own, where they are stacked) but embeddings."""
    return parameter.ndim - is_stacked(name, parameter) >= 2 and id(parameter) not in embeddings


class Optimizer:
    """torch's fused AdamW or SGD, or apex's FusedAdam, with state by name.

    Parameters in bfloat16 or float16 get a float32 master: the master is updated and checkpointed, the parameter is
    a rounded copy. State exists before the first step, so that a checkpoint can be read into it.

    Args:
        config: The ``optimizer`` section.
        model: Its parameters that require gradients are trained.
        gradients: Their gradients by name, in place; at least float32.
    """

    def __init__(self, config: OptimizerConfig, model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
        self._model = model
        self._masters: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            view = gradients[name]
            tensor: Tensor = rows_here(parameter) if isinstance(parameter, DTensor) else parameter
            if view.dtype != parameter.dtype:
                tensor = parameter.detach().to(view.dtype)
                self._masters[name], self._rounded[name] = tensor, parameter
            tensor.grad = view
            self._trained[name] = tensor
        self._torch = build_torch(config, model, self._trained)
        if config.name != "sgd":
            fill_state(self._torch, self._trained.values())

    def step(self, lr: float) -> None:
        """One update from the gradients, at the given learning rate."""
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        self.publish()

    def publish(self) -> None:
        """Rounds the masters into the model's parameters; also needed after masters were loaded."""
        if self._masters:
            with torch.no_grad():
                targets = [self._rounded[name] for name in self._masters]
                torch._foreach_copy_(targets, list(self._masters.values()))

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: masters where there are some, else parameters and buffers."""
        return {name: self._masters.get(name, tensor) for name, tensor in named_weights(self._model).items()}

    def state(self) -> dict[str, Tensor]:
        """Optimizer state as ``<parameter name>.exp_avg`` and so on, in place: reading into it sets it."""
        return {
            f"{name}.{key}": value
            for name, tensor in self._trained.items()
            for key, value in self._torch.state[tensor].items()
        }


def fill_state(optimizer: torch.optim.Optimizer, trained: Iterable[Tensor]) -> None:
    """Gives AdamW the state it would make in its first step."""
    for tensor in trained:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }


def build_torch(
    config: OptimizerConfig, model: nn.Module, trained: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """The configured optimizer of tensors by parameter name, one group per (decays or not, expert or not, dtype)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = dict(model.named_parameters())
    groups: dict[tuple[bool, bool, torch.dtype], list[Tensor]] = {}
    for name, tensor in trained.items():
        kind = (decays(name, parameters[name], embeddings), is_expert(name), tensor.dtype)
        groups.setdefault(kind, []).append(tensor)
    settings = [
        {"params": tensors, "weight_decay": config.weight_decay if decayed else 0.0}
        for (decayed, *_), tensors in groups.items()
    ]
    fused = all(map(_in_one_order, trained.values()))
    if config.name == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, fused=fused)
    if config.name == "apex_fused_adam":
        return _fused_adam(config, settings)
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _in_one_order(tensor: Tensor) -> bool:
    """Whether a parameter and its gradient lie in memory alike, without holes: a fused optimizer on a CPU takes the
    n-th number of one for that of the n-th of the other. Without a gradient yet, autograd's will lie as it does."""
    together = torch.empty_like(tensor, device="meta")
    orders = [_memory_order(one) for one in (together, tensor, tensor.grad) if one is not None]
    return all(order == orders[0] for order in orders)


def _memory_order(tensor: Tensor) -> list[int]:
    if tensor.numel() == 0:
        return []
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


# ------------------------------------------------------------------------------------------- apex
def load_fused_adam(device: torch.device, dtype: torch.dtype) -> Any:
    """The class ``apex.optimizers.FusedAdam``, tried out on one parameter.

    Args:
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ConfigError: It is not available.
    """
    asked, instead = "optimizer.name=apex_fused_adam", "optimizer.name=adamw"
    if dtype == torch.float64:
        raise ConfigError(
            f"{asked} is not available", why="NVIDIA apex has no kernel for float64", fix=instead
        )

    def example(kind: Any) -> None:
        weight = torch.ones(8, device=device)
        weight.grad = torch.ones_like(weight)
        kind([weight], lr=1e-3, adam_w_mode=True).step()
        float(weight.sum())  # waits for the kernel

    return load_apex("optimizers", "FusedAdam", example, device=device, asked=asked, instead=instead)


def _fused_adam(config: OptimizerConfig, settings: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """apex's FusedAdam with the state of torch's AdamW.

    Moments have the same names in both. The step is a number of the group in apex and a tensor of each parameter in
    AdamW, and in checkpoints; the two hooks translate.
    """
    first: Tensor = settings[0]["params"][0]
    kind = load_fused_adam(first.device, first.dtype)
    optimizer: torch.optim.Optimizer = kind(
        settings, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True
    )
    optimizer.register_step_pre_hook(_steps_to_groups)
    optimizer.register_step_post_hook(_count_steps)
    return optimizer


def _steps_to_groups(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        group["step"] = int(optimizer.state[group["params"][0]]["step"])  # one device-to-host sync per group


def _count_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    torch._foreach_add_([state["step"] for state in optimizer.state.values()], 1)
