"""The learned part of a router: tokens to logits. Which expert a logit chooses is a router family's business."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from epmoe.config_routers import RouterOptions
from epmoe.moe.inputs import NUM_SAMPLES, numbers_of_valid
from epmoe.moe.recompute import KEEP, Recompute, Remake, plain
from epmoe.moe.routers import common
from epmoe.moe.routers.family import Family, Init, RouterTensor, zeros
from epmoe.moe.smoothing import gate_noise
from epmoe.ops import DROPLESS, UNFILLED, permute, philox
from epmoe.types import Draws, Limits, RouterInputs, Routing, TokenContext, compute_dtype


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
        self.layer, self.seed, self.d_model = layer, seed, d_model
        self.parts = family.parts(options, num_experts)
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model)) if family.has_weight else None
        for part in self.parts:
            shape = (part.num_rows, d_model) if part.projects else (part.num_rows,)
            if part.update is None and part.dtype is None:
                self.register_parameter(part.name, nn.Parameter(torch.empty(shape)))
            else:
                dtype = part.dtype or compute_dtype(torch.get_default_dtype())
                self.register_buffer(part.name, torch.empty(shape, dtype=dtype))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes, for ``print(layer)``."""
        return f"{self.options.name}, {self.num_experts} experts, top_k={self.top_k}, layer={self.layer}"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {
            key: value for key, value in state.items() if key != "parts"
        }  # functions, which the family has

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.parts = self.family.parts(self.options, self.num_experts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """``to`` and the like leave buffers that an optimizer step updates at least float32: its steps are small."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now: Tensor = getattr(self, name)
            if now.is_floating_point() and now.dtype != (wide := compute_dtype(now.dtype)):
                setattr(self, name, buffer.to(now.device, wide))
        return self

    def initial_laws(self) -> dict[str, Init]:
        """How the tensors start that do not follow the model's law, by name."""
        laws = {part.name: part.init for part in self.parts}
        smoothing = self.options.smoothing
        weight_init = self.family.weight_init
        if smoothing is not None and smoothing.gate != "none":
            weight_init = zeros
        return laws if weight_init is None else laws | {"weight": weight_init}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The family's first values; N(0, 0.02) where it has none of its own. Nothing on the meta device."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        rng = np.random.default_rng(self.seed)
        for name, law in self.initial_laws().items():
            tensor: Tensor = getattr(self, name)
            if tensor.is_meta:
                return
            tensor.copy_(torch.from_numpy(law(rng, tuple(tensor.shape))))

    def forward(
        self,
        x_BSD: Tensor,
        ctx: TokenContext,
        limits: Limits | None = None,
        recompute: Recompute = KEEP,
    ) -> Routing:
        """Logits of every token, and the family's decision; in a second pass that of the first.

        Other arguments and errors are those of ``inputs``.
        """
        inputs = self.inputs(x_BSD, ctx, limits, recompute.remake)
        if recompute.routing is not None:
            return recompute.routing
        with recompute.kept():
            return self.decide(inputs)

    def decide(self, inputs: RouterInputs) -> Routing:
        """The family's decision."""
        with torch.autocast(inputs.logits_TE.device.type, enabled=False):
            return self.family.route(inputs, self.options, self.top_k)

    def inputs(
        self,
        x_BSD: Tensor,
        ctx: TokenContext,
        limits: Limits | None = None,
        remake: Remake = plain,
    ) -> RouterInputs:
        """Logits of every token, and all else that the family decides from.

        Args:
            x_BSD: Tokens, sequence after sequence.
            ctx: What is known about them.
            limits: For families whose choice depends on groups and capacity. None: all tokens are one group, and
                experts take as many as come.
            remake: Computes what need not be kept for the backward pass.

        Raises:
            ValueError: The policy draws random numbers and ``ctx.sample_B`` is None.
        """
        x_TD, seq_len = x_BSD.flatten(0, 1), x_BSD.shape[1]
        draws = self.draws(ctx, seq_len, x_TD.device)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = remake(self._own_copy, x_TD, draws)
            fields: dict[str, Any] = {p.field: self._field(p, x_TD) for p in self.parts if p.field}
            return RouterInputs(
                logits_TE=self._smooth(self._logits(x_TD), draws),
                valid_T=_valid(x_TD, ctx),
                draws=draws,
                training=self.training,
                group_size=0 if limits is None else limits.group_size,
                capacity=DROPLESS if limits is None else limits.capacity,
                seq_len=seq_len,
                token_T=None if ctx.token_BS is None else ctx.token_BS.flatten(),
                segment_T=_segments(ctx, seq_len),
                task_T=None if ctx.task_B is None else ctx.task_B.repeat_interleave(seq_len),
                **fields,
            )

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.weight is None:
            broken_T1 = ~x_TD.sum(-1, keepdim=True).isfinite()
            return x_TD.new_zeros(x_TD.shape[0], self.num_experts).masked_fill(broken_T1, torch.nan)
        return project(x_TD, self.weight.to(x_TD.dtype), broken=torch.nan)

    def _field(self, part: RouterTensor, x_TD: Tensor) -> Tensor:
        tensor: Tensor = getattr(self, part.name)
        if part.dtype is None:
            tensor = tensor.to(x_TD.dtype)
        return project(x_TD, tensor, broken=0.0) if part.projects else tensor

    @torch.no_grad()
    def after_step(self, demand_E: Tensor, step: int) -> None:
        """Updates the family's buffers; call it once after every optimizer step, on all ranks alike.

        Never from a forward pass: evaluation would count too, and recomputed activations would count twice. A router
        whose parameters are all frozen stays as it is.

        Args:
            demand_E: Assignments each expert was asked for in the step, over all ranks and micro-batches.
            step: Optimizer steps done before this one.
        """
        parameters = [*self.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            return
        for part in self.parts:
            if part.update is not None:
                buffer: Tensor = getattr(self, part.name)
                buffer.copy_(part.update(buffer, demand_E.to(buffer.device), self.options, step))

    def draws(self, ctx: TokenContext, seq_len: int, device: torch.device) -> Draws | None:
        """Counters of this layer's random numbers for the tokens; None when it is not known which samples they are."""
        if ctx.sample_B is None:
            return None
        real_B = (
            torch.ones_like(ctx.sample_B, dtype=torch.bool) if ctx.valid_BS is None else ctx.valid_BS.any(1)
        )
        numbers_of_valid("sample_B", ctx.sample_B, real_B, NUM_SAMPLES)
        return Draws(
            seed=self.seed,
            layer=self.layer,
            sample_T=ctx.sample_B.repeat_interleave(seq_len),
            position_T=torch.arange(seq_len, device=device).repeat(ctx.sample_B.shape[0]),
        )

    def _smooth(self, logits_TE: Tensor, draws: Draws | None) -> Tensor:
        options = self.options.smoothing
        if not self.training or options is None or options.gate == "none":
            return logits_TE
        if draws is None:
            raise common.missing_draws("smoothing")
        return logits_TE + gate_noise(options, draws, logits_TE.shape[1]).to(logits_TE.dtype)

    def _own_copy(self, x_TD: Tensor, draws: Draws | None) -> Tensor:
        """The tokens in the router's dtype; with jitter, times U[1-eps, 1+eps) (Switch, arXiv:2101.03961)."""
        x_TD = x_TD.to(compute_dtype(x_TD.dtype))
        eps = self.options.jitter
        if not self.training or eps == 0.0:
            return x_TD
        if draws is None:
            raise common.missing_draws("jitter")
        u_TD = philox.uniform(
            draws.seed, philox.JITTER, draws.layer, draws.sample_T, draws.position_T, x_TD.shape[1]
        )
        return x_TD * (1.0 - eps + 2.0 * eps * u_TD.to(x_TD.dtype))


class _Project(torch.autograd.Function):
    """``x @ weight.t()``, in which tokens that are not finite touch nothing but their own row of the result."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_XD: Tensor, broken: float) -> Tensor:
        out_TX = x_TD @ weight_XD.t()
        if common.at_hand(out_TX) and math.isfinite(out_TX.sum().item()):
            ctx.save_for_backward(x_TD, weight_XD)
            return out_TX
        # NaN and infinities survive both sums. So does what was finite in x and overflows here.
        broken_T1 = ~out_TX.sum(-1, keepdim=True).isfinite()
        ctx.save_for_backward(x_TD, weight_XD, broken_T1)
        return out_TX.masked_fill_(broken_T1, broken)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [d_out_TX] = grads
        x_TD, weight_XD, *masks = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        if masks:
            [broken_T1] = masks
            d_out_TX = d_out_TX.masked_fill(broken_T1, 0.0)
            if needs_weight:
                # Not only the gradient is 0 there: 0 * NaN would spoil that of the weight.
                kept_T = torch.arange(x_TD.shape[0], device=x_TD.device)
                x_TD = permute(x_TD, kept_T.masked_fill_(broken_T1.squeeze(1), UNFILLED))
        d_x_TD = d_out_TX @ weight_XD if needs_x else None
        d_weight_XD = d_out_TX.t() @ x_TD if needs_weight else None
        return d_x_TD, d_weight_XD, None


def project(x_TD: Tensor, weight_XD: Tensor, *, broken: float) -> Tensor:
    """``x @ weight.t()`` -> ``[T, X]``; rows of tokens that are not finite hold ``broken`` and have no gradient."""
    apply: Callable[..., Tensor] = _Project.apply
    return apply(x_TD, weight_XD, broken)


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
