"""The DeepSpeed engine, thin: DeepSpeed reduces and partitions, epmoe decides.

What DeepSpeed would do and must not: average gradients, count micro-batches, clip (at stage 0 it averages the norms of
ranks, at 1 and 2 the norms of experts), skip steps, schedule the learning rate, read files. So its configuration is
made here and says SUM, and this engine calls backward, reduction and update one by one.

Where gradients are between ``reduce`` and ``step``:

    stage 0       parameter.grad, whole
    stage 1, 2    DeepSpeedZeroOptimizer.averaged_gradients: pieces of flat groups, which its step reads next and this
                  rank alone has; dense groups are cut over all ranks, expert groups over those that hold the same ones
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from epmoe.config import OptimizerConfig
from epmoe.engines.optimizer import build_torch, fill_state, named_weights
from epmoe.engines.protocol import ParameterRows, expert_part
from epmoe.parallel.deepspeed import group_name, load_deepspeed, prepare
from epmoe.parallel.mesh import ExpertMesh, is_expert
from epmoe.parallel.norm import global_norm, scale, sharded_norm

BUCKET_ELEMENTS = 2**24
"""Gradients reduced at once."""


def deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration, all of it: what is not here has DeepSpeed's default.

    The batch sizes are ones because they only scale what is not used. Precision is not mentioned: DeepSpeed then leaves
    the parameters' dtypes alone, and its ZeRO optimizer keeps float32 masters and sums in float32 whatever they are.
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage:
        zero |= {
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "compute_grad_norm": False,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "sum",
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_optimization": zero,
    }


class DeepSpeedEngine:
    """Dense weights on every rank, experts on their owners; at ZeRO 1 and 2 optimizer state is in flat partitions.

    The last four methods are collectives here at ZeRO 1 and 2: they put whole tensors together.

    Args:
        config: The ``optimizer`` section.
        model: With this rank's experts; gets a marker module. Parameters are float32, at ZeRO 1 and 2 also bfloat16.
        mesh: Who shares experts with whom.
        zero_stage: 0 = nothing in partitions, 1 = optimizer state, 2 = reduced gradients too.
    """

    def __init__(
        self, config: OptimizerConfig, model: nn.Module, mesh: ExpertMesh, *, zero_stage: int
    ) -> None:
        deepspeed = load_deepspeed(mesh.device_mesh.device_type)
        prepare(model, mesh)
        self._model, self._mesh, self._stage = model, mesh, zero_stage
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._torch = build_torch(config, model, self._trained)
        self._group = _name_groups(self._torch, mesh, {id(p): name for name, p in self._trained.items()})
        """Index of each parameter's group."""
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self._torch, config=deepspeed_config(zero_stage)
        )
        updated = [tensor for group in self._torch.param_groups for tensor in group["params"]]
        if config.name != "sgd":
            fill_state(self._torch, updated)
        if self._stage:
            # At ZeRO 2 the buffer of gradients that travel has the dtype of the first parameter otherwise, and the
            # float32 gradients of routers would be rounded to bfloat16 in it.
            self._optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
            self._optimizer._lazy_init_hp_params_optimizer_state()
        self._copies: dict[tuple[str, str], Tensor] = {}
        """Whole tensors that ``weights`` and ``state`` handed out, by parameter and key of the state; "" = weight."""
        self.zero()

    # -------------------------------------------------------------------------------------- a step
    def zero(self) -> None:
        """Drops the gradients, also those of a step that was left out."""
        self._copies = {}
        self._engine.zero_grad()
        if self._stage:
            self._optimizer.zero_grad()
            for group in range(len(self._optimizer.bit16_groups)):
                self._optimizer.averaged_gradients[group] = None
                self._optimizer.all_grad_tensors[group] = None
        self._engine.set_gradient_accumulation_boundary(False)

    def backward(self, objective: Tensor) -> None:
        """Adds to the gradients. At ZeRO 2 a collective: they are reduced at once, and only this rank's pieces kept."""
        if self._stage:
            self._optimizer.clear_backward_seen_flag()  # DeepSpeed does so in its forward, which is not called
        self._engine.backward(objective, scale_wrt_gas=False)

    def reduce(self) -> None:
        """SUM over all ranks, of experts over those that hold the same ones; missing gradients are zero then."""
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage == 2:
            self._optimizer.finalize_gradient_accumulation_boundary()
        else:
            self._engine.allreduce_gradients()

    def norm(self) -> Tensor:
        """One small gather, and the squares are added here: what DeepSpeed computes is not the model's norm."""
        dense, experts = self._reduced()
        if self._stage:
            return sharded_norm(dense, experts, self._mesh.world_group, replicas=1)
        return global_norm(dense, experts, self._mesh.ep_group, next(self._model.parameters()).device)

    def clip(self, coefficient: Tensor) -> None:
        """Scales in place what DeepSpeed's step reads; the coefficient is no part of its loss scaling."""
        dense, experts = self._reduced()
        scale([*dense, *experts], coefficient)

    def step(self, lr: float) -> None:
        """AdamW or SGD on this rank's partitions, which are then gathered into the parameters. A collective."""
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._engine.step()

    def _reduced(self) -> tuple[list[Tensor], list[Tensor]]:
        """The reduced gradients or this rank's pieces of them: dense ones, experts."""
        dense: list[Tensor] = []
        experts: list[Tensor] = []
        if not self._stage:
            for name, parameter in self._trained.items():
                assert parameter.grad is not None  # made by the reduction where backward made none
                (experts if is_expert(name) else dense).append(parameter.grad)
            return dense, experts
        for index, group in enumerate(self._torch.param_groups):
            (experts if group["moe"] else dense).extend(self._optimizer.averaged_gradients[index])
        return dense, experts

    # -------------------------------------------------------------------------------------- by name
    def gradients(self) -> dict[str, ParameterRows]:
        """Between ``reduce`` and ``step``: in place at stage 0, copies at 1 and 2."""
        from deepspeed.utils import safe_get_full_grad

        return {
            name: expert_part(name, safe_get_full_grad(parameter), self._mesh)
            for name, parameter in self._trained.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """See ``Engine``. At ZeRO 1 and 2 float32 masters, put together from all ranks' partitions."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = named_weights(self._model)
        if self._stage:
            for name, parameter in self._trained.items():
                weights[name] = self._copies[name, ""] = safe_get_full_fp32_param(parameter)
        return weights

    def state(self) -> dict[str, Tensor]:
        """See ``Engine``. At ZeRO 1 and 2 put together from all ranks' partitions."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            for key, value in self._torch.state[self._updated(name)].items():
                if self._stage and value.ndim:  # the number of steps is the same in every partition
                    value = self._copies[name, key] = safe_get_full_optimizer_state(parameter, key)
                state[f"{name}.{key}"] = value
        return state

    def publish(self) -> None:
        """At ZeRO 1 and 2 takes this rank's partitions from the whole tensors, and gathers the parameters."""
        if not self._stage:
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for (name, key), whole in self._copies.items():
            if key:
                safe_set_full_optimizer_state(self._trained[name], whole, key)
            else:
                safe_set_full_fp32_param(self._trained[name], whole)
        self._copies = {}
        self._optimizer.update_lp_params()

    def _updated(self, name: str) -> Tensor:
        """What torch's optimizer updates for a parameter: itself, or its group's flat partition."""
        if not self._stage:
            return self._trained[name]
        flat: Tensor = self._torch.param_groups[self._group[name]]["params"][0]
        return flat


def _name_groups(optimizer: torch.optim.Optimizer, mesh: ExpertMesh, names: dict[int, str]) -> dict[str, int]:
    """Tells DeepSpeed which groups are experts -> the group of each parameter."""
    found: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = [names[id(parameter)] for parameter in group["params"]]
        group["moe"] = is_expert(members[0])
        group["name"] = group_name(mesh) if group["moe"] else "dense"
        found |= dict.fromkeys(members, index)
    return found
