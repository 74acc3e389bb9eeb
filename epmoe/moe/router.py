"""The learned part of a router: tokens to logits. Which expert a logit chooses is a router family's business."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from epmoe.config import RouterOptions
from epmoe.moe.routers.common import missing_draws
from epmoe.ops import philox
from epmoe.types import Draws, RouterInputs, Routing, TokenContext, compute_dtype

RouteFunction = Callable[..., Routing]


class Router(nn.Module):
    """Linear router, float32 (float64 for float64 input) whatever the model's precision.

    Args:
        d_model: Width, D.
        num_experts: Experts over all ranks, E.
        top_k: Experts per token, K.
        route: Pure function ``(RouterInputs, options, top_k) -> Routing`` of the router family.
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
        route: RouteFunction,
        options: RouterOptions,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.top_k, self.route, self.options = top_k, route, options
        self.layer, self.seed = layer, seed
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_TD: Tensor, ctx: TokenContext, *, seq_len: int) -> Routing:
        """Logits of every token, and the family's decision.

        Args:
            x_TD: Tokens, sequence after sequence.
            seq_len: Tokens per sequence, S.

        Raises:
            ValueError: The policy draws random numbers and ``ctx.sample_B`` is None.
        """
        dtype = compute_dtype(x_TD.dtype)
        draws = None
        if ctx.sample_B is not None:
            position_S = torch.arange(seq_len, device=x_TD.device)
            draws = Draws(
                seed=self.seed,
                layer=self.layer,
                sample_T=ctx.sample_B.repeat_interleave(seq_len),
                position_T=position_S.repeat(ctx.sample_B.shape[0]),
            )
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = self._jitter(x_TD.to(dtype), draws)
            # A row that is not finite is left out of the product, whose backward would put 0 * NaN into the weight's
            # gradient; its logits are NaN, so that the token is seen and counted as broken.
            finite_T1 = x_TD.isfinite().all(-1, keepdim=True)
            x_TD = torch.where(finite_T1, x_TD, 0.0)
            logits_TE = (x_TD @ self.weight.to(dtype).t()).masked_fill(~finite_T1, torch.nan)
        valid_T = (
            torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
            if ctx.valid_BS is None
            else ctx.valid_BS.flatten()
        )
        inputs = RouterInputs(logits_TE=logits_TE, valid_T=valid_T, draws=draws, training=self.training)
        return self.route(inputs, self.options, self.top_k)

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
