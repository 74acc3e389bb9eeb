"""The mixture-of-experts layer: the whole chain on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from epmoe.config import MoEConfig
from epmoe.moe.dispatcher import Dispatcher, LocalDispatcher
from epmoe.moe.plan import expert_capacity
from epmoe.moe.router import Router
from epmoe.types import DispatchPlan, RouterReport, Routing, TokenContext

LossFunction = Callable[[Routing, DispatchPlan], Tensor]


class MoELayer(nn.Module):
    """Sparse mixture of experts: ``y = sum over chosen experts of weight * expert(x)``; the caller adds the residual.

    Args:
        router: Tokens to assignments.
        experts: Module from ``ExpertBatch`` to rows, with ``num_experts``.
        moe: Groups, capacity and the names of the losses.
        losses: Name -> function of the routing and the plan.

    A token whose choices are all dropped gets y = 0.
    """

    def __init__(
        self, router: Router, experts: nn.Module, moe: MoEConfig, losses: Mapping[str, LossFunction]
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.dispatcher: Dispatcher = LocalDispatcher(weigh_rows=moe.save == "hidden")
        self.moe, self.losses = moe, dict(losses)

    def forward(self, x_BSD: Tensor, ctx: TokenContext | None = None) -> tuple[Tensor, RouterReport]:
        """Routes, dispatches, computes, combines.

        Args:
            x_BSD: Tokens, sequence after sequence; ``[B, S, D]``.
            ctx: Padding mask and sample numbers. None: all tokens are valid and nothing random can be drawn.

        Returns:
            y_BSD and the report with losses (differentiable sums) and metrics.

        Raises:
            ValueError: In training, a policy draws random numbers (the default router's second expert, jitter) and
                ``ctx.sample_B`` is missing.
        """
        num_sequences, seq_len = x_BSD.shape[:2]
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, ctx or TokenContext(), seq_len=seq_len)
        group_size = seq_len if self.moe.group == "sequence" else num_sequences * seq_len
        batch, plan = self.dispatcher.dispatch(
            x_TD,
            routing,
            num_experts=self.moe.num_experts,
            group_size=group_size,
            capacity=expert_capacity(self.moe, group_size, training=self.training),
        )
        y_TD = self.dispatcher.combine(self.experts(batch), routing, plan)
        return y_TD.to(x_BSD.dtype).view_as(x_BSD), self.report(routing, plan)

    def report(self, routing: Routing, plan: DispatchPlan) -> RouterReport:
        """Losses and metrics of one forward pass."""
        losses = {name: loss(routing, plan) for name, loss in self.losses.items()}
        return RouterReport(losses=losses, metrics=routing_metrics(routing, plan))


@torch.no_grad()
def routing_metrics(routing: Routing, plan: DispatchPlan) -> dict[str, Tensor]:
    """Sums over this rank's tokens from which drop rate, entropy and load are computed; no host sync.

    demand_E: active assignments before capacity. kept_E: after it. assignments: their number before. overflow_tokens:
    valid tokens without any kept choice. entropy: sum of the router's entropies in nats.
    """
    num_tokens = routing.valid_T.shape[0]
    kept_T = torch.zeros(num_tokens, dtype=torch.int64, device=plan.slot_A.device)
    kept_T.index_add_(0, routing.token_A, (plan.slot_A >= 0).long())
    entropy_TE = torch.special.entr(routing.probs_TE)
    return {
        "demand_E": plan.demand_GE.sum(0),
        "kept_E": plan.tokens_per_expert_E,
        "assignments": plan.demand_GE.sum(),
        "overflow_tokens": (routing.valid_T & (kept_T == 0)).sum(),
        "valid_tokens": routing.valid_T.sum(),
        "nonfinite_tokens": routing.nonfinite_tokens,
        "entropy": entropy_TE.sum(),
    }
