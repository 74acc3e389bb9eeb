"""The learned part of a router: tokens to logits. Which expert a logit chooses is a router family's business."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epmoe.config_routers import RouterOptions
from epmoe.moe.recompute import Remake, plain
from epmoe.moe.routers.common import missing_draws
from epmoe.moe.routers.family import Family, Init, Part
from epmoe.ops import DROPLESS, philox
from epmoe.types import Draws, RouterInputs, Routing, TokenContext, compute_dtype


class Router(nn.Module):
    """Linear router, float32 (float64 for float64 input) whatever the model's precision.

    It holds ``weight`` [E, D], where its family has one, and the tensors the family asks for (``Family.parts``) under
    their own names.

    Args:
        d_model: Width, D.
        num_experts: Experts over all ranks, E.
        top_k: Experts per token, K.
        family: Decision and further tensors of the router family.
        options: The family's options.
        layer: Number of the layer, part of the key of every random draw.
        seed: Seed of the run, the other part.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int,
        family: Family,
        options: RouterOptions,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        options.check(num_experts=num_experts, top_k=top_k)
        self.top_k, self.family, self.options = top_k, family, options
        self.layer, self.seed = layer, seed
        self.parts = family.parts(options, num_experts)
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model)) if family.has_weight else None
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        for part in self.parts:
            shape = (part.num_rows, d_model) if part.projects else (part.num_rows,)
            if part.update is None and part.dtype is None:
                self.register_parameter(part.name, nn.Parameter(torch.empty(shape)))
            else:
                self.register_buffer(part.name, torch.empty(shape, dtype=part.dtype))
        self._initialise()

    def initial_laws(self) -> dict[str, Init]:
        """How the tensors start that do not follow the model's law, by name."""
        laws = {part.name: part.init for part in self.parts}
        return laws if self.family.weight_init is None else laws | {"weight": self.family.weight_init}

    @torch.no_grad()
    def _initialise(self) -> None:
        rng = np.random.default_rng(self.seed)
        for name, law in self.initial_laws().items():
            tensor: Tensor = getattr(self, name)
            if tensor.is_meta:
                return
            tensor.copy_(torch.from_numpy(law(rng, tuple(tensor.shape))))

    def forward(
        self,
        x_TD: Tensor,
        ctx: TokenContext,
        *,
        seq_len: int,
        group_size: int = 0,
        capacity: int = DROPLESS,
    ) -> Routing:
        """Logits of every token, and the family's decision; arguments and errors are those of ``project``."""
        return self.decide(self.project(x_TD, ctx, seq_len=seq_len, group_size=group_size, capacity=capacity))

    def decide(self, inputs: RouterInputs) -> Routing:
        """The family's decision."""
        with torch.autocast(inputs.logits_TE.device.type, enabled=False):
            return self.family.route(inputs, self.options, self.top_k)

    def project(
        self,
        x_TD: Tensor,
        ctx: TokenContext,
        *,
        seq_len: int,
        group_size: int = 0,
        capacity: int = DROPLESS,
        remake: Remake = plain,
    ) -> RouterInputs:
        """Logits of every token, and all else that the family decides from.

        Args:
            x_TD: Tokens, sequence after sequence.
            seq_len: Tokens per sequence, S.
            group_size: Tokens per capacity group; 0 = all of them.
            capacity: Slots per expert and group, for families whose choice depends on them.
            remake: Computes what need not be kept.

        Raises:
            ValueError: The policy draws random numbers and ``ctx.sample_B`` is None.
        """
        dtype = compute_dtype(x_TD.dtype)
        draws = self._draws(ctx, seq_len, x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = remake(self._jitter, x_TD.to(dtype), draws)
            # A row that is not finite is left out of the product, whose backward would put 0 * NaN into the weight's
            # gradient; its logits are NaN, so that the token is seen and counted as broken.
            # One pass: NaN and infinities survive a sum, and where finite numbers overflow it, the logits would too.
            finite_T1 = x_TD.detach().sum(-1, keepdim=True).isfinite()
            x_TD = remake(torch.where, finite_T1, x_TD, 0.0)
            fields: dict[str, Any] = {p.field: self._field(p, x_TD) for p in self.parts if p.field}
            return RouterInputs(
                logits_TE=self._logits(x_TD).masked_fill(~finite_T1, torch.nan),
                valid_T=_valid(x_TD, ctx),
                draws=draws,
                training=self.training,
                group_size=group_size,
                capacity=capacity,
                seq_len=seq_len,
                token_T=None if ctx.token_BS is None else ctx.token_BS.flatten(),
                segment_T=_segments(ctx, seq_len),
                task_T=None if ctx.task_B is None else ctx.task_B.repeat_interleave(seq_len),
                **fields,
            )

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.weight is None:
            return x_TD.new_zeros(x_TD.shape[0], self.num_experts)
        return x_TD @ self.weight.to(x_TD.dtype).t()

    def _field(self, part: Part, x_TD: Tensor) -> Tensor:
        tensor: Tensor = getattr(self, part.name)
        if part.dtype is None:
            tensor = tensor.to(x_TD.dtype)
        return x_TD @ tensor.t() if part.projects else tensor

    @torch.no_grad()
    def after_step(self, demand_E: Tensor, step: int) -> None:
        """Updates the family's buffers; call it once after every optimizer step, on all ranks alike.

        Never from a forward pass: evaluation would count too, and recomputed activations would count twice.

        Args:
            demand_E: Assignments each expert was asked for in the step, over all ranks and micro-batches.
            step: Optimizer steps done before this one.
        """
        for part in self.parts:
            if part.update is not None:
                buffer: Tensor = getattr(self, part.name)
                buffer.copy_(part.update(buffer, demand_E.to(buffer.device), self.options, step))

    def _draws(self, ctx: TokenContext, seq_len: int, device: torch.device) -> Draws | None:
        if ctx.sample_B is None:
            return None
        return Draws(
            seed=self.seed,
            layer=self.layer,
            sample_T=ctx.sample_B.repeat_interleave(seq_len),
            position_T=torch.arange(seq_len, device=device).repeat(ctx.sample_B.shape[0]),
        )

    def _jitter(self, x_TD: Tensor, draws: Draws | None) -> Tensor:
        """Multiplies the router's own copy of the input by U[1-eps, 1+eps) (Switch, arXiv:2101.03961)."""
        eps = self.options.jitter
        if not self.training or eps == 0.0:
            return x_TD
        if draws is None:
            raise missing_draws("jitter")
        u_TD = philox.uniform(
            draws.seed, philox.JITTER, draws.layer, draws.sample_T, draws.position_T, x_TD.shape[1]
        )
        return x_TD * (1.0 - eps + 2.0 * eps * u_TD.to(x_TD.dtype))


def _valid(x_TD: Tensor, ctx: TokenContext) -> Tensor:
    if ctx.valid_BS is None:
        return torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
    return ctx.valid_BS.flatten()


def _segments(ctx: TokenContext, seq_len: int) -> Tensor | None:
    """Documents of all sequences, numbered apart: a window of S tokens has at most S of them."""
    if ctx.segment_BS is None:
        return None
    first_B = torch.arange(ctx.segment_BS.shape[0], device=ctx.segment_BS.device) * seq_len
    return (ctx.segment_BS + first_B.unsqueeze(1)).flatten()
