"""Soft MoE, arXiv:2308.00951: every slot of an expert gets a mixture of all tokens, every token one of all results.

Nothing is chosen or dropped, so this is a layer of its own beside ``MoELayer``; it shares the experts with it, and the
blocks in which rows travel to experts on other ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from epmoe.config_routers import SoftOptions
from epmoe.moe.dispatch import PaddedDispatcher
from epmoe.moe.layer import Beside, MoELayer
from epmoe.moe.overlap import OverlapDispatcher
from epmoe.moe.recompute import KEEP, Recompute
from epmoe.moe.routers.family import Family, FloatArray, RouterTensor
from epmoe.types import (
    LayerSums,
    RouterInputs,
    RouterReport,
    Routing,
    TokenContext,
    compute_dtype,
)

NORM_EPS = 1e-6
"""Added to the squared length that a vector is divided by the root of."""


def mixing_weights(x_GSD: Tensor, phi_XD: Tensor, scale: Tensor, usable_GS: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each token goes into each slot, and of each slot's result into each token -> two ``[G, S, X]``.

    Both come from ``scale * cos(x, phi)``: a softmax over the tokens of the group, and one over the slots (the paper's
    D and C). Tokens that are not usable are in no mixture and get none.

    Args:
        x_GSD: Tokens by group, finite.
        phi_XD: A vector for each of X slots.
        scale: ``[1]``.
        usable_GS: bool.
    """
    logits_GSX = scale * (_unit(x_GSD) @ _unit(phi_XD).t())
    unusable_GS1 = ~usable_GS.unsqueeze(2)
    # Where a group has no token, the softmax of zeros stands in for that of nothing; it is not used.
    closed_GS1 = unusable_GS1 & usable_GS.any(1).view(-1, 1, 1)
    dispatch_GSX = logits_GSX.masked_fill(closed_GS1, -torch.inf).softmax(1).masked_fill(unusable_GS1, 0.0)
    combine_GSX = logits_GSX.softmax(2).masked_fill(unusable_GS1, 0.0)
    return dispatch_GSX, combine_GSX


def _unit(x_XD: Tensor) -> Tensor:
    return x_XD * (x_XD.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()


class SoftMoELayer(MoELayer):
    """Soft mixture of experts; arguments, results and report are those of ``MoELayer``.

    The report counts every slot of a group with tokens as one assignment; probabilities are the shares of the experts
    in a token's result. With experts on several ranks all of them need the same number of groups.
    """

    def forward(
        self,
        x_BSD: Tensor,
        ctx: TokenContext | None = None,
        beside: Callable[[Tensor], Tensor] | None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, RouterReport]:
        """Mixes tokens into slots, computes, mixes results back.

        Args:
            x_BSD: Tokens, sequence after sequence; ``[B, S, D]``.
            ctx: Padding mask. None: all tokens are valid.
            beside, recompute: As in ``MoELayer``; nothing is decided here that a second pass could decide otherwise.

        Raises:
            RuntimeError: As in ``MoELayer``.
        """
        self.check_pass(x_BSD, ctx)
        num_tokens, width = x_BSD.shape[0] * x_BSD.shape[1], x_BSD.shape[2]
        size = self.limits(x_BSD).group_size
        num_groups = num_tokens // max(size, 1)
        with torch.autocast(x_BSD.device.type, enabled=False):
            x_GSD = x_BSD.reshape(num_groups, size, width).to(compute_dtype(x_BSD.dtype))
            finite_GS = x_GSD.detach().sum(-1).isfinite()
            valid_GS = torch.ones_like(finite_GS)
            if ctx is not None and ctx.valid_BS is not None:
                valid_GS = ctx.valid_BS.reshape(num_groups, size)
            x_GSD = recompute.remake(torch.where, finite_GS.unsqueeze(2), x_GSD, 0.0)
            phi_XD, scale = (getattr(self.router, name).to(x_GSD.dtype) for name in ("phi", "scale"))
            dispatch_GSX, combine_GSX = mixing_weights(x_GSD, phi_XD, scale, valid_GS & finite_GS)
            slot_GXD = dispatch_GSX.transpose(1, 2) @ x_GSD
        shared = Beside(beside, x_BSD)
        result_GXD = self._through_experts(slot_GXD.to(x_BSD.dtype), shared)
        with torch.autocast(x_BSD.device.type, enabled=False):
            y_GSD = combine_GSX @ result_GXD.to(combine_GSX.dtype)
        report = RouterReport(losses={}, metrics=self._metrics(combine_GSX, valid_GS, finite_GS))
        return shared.added_to(y_GSD.to(x_BSD.dtype).view_as(x_BSD)), report

    def _through_experts(self, slot_GXD: Tensor, meanwhile: Callable[[], None]) -> Tensor:
        """Every slot through its expert: slots of all groups together, expert after expert."""
        num_groups, num_slots, width = slot_GXD.shape
        num_experts, spread = self.moe.num_experts, self.dispatcher.spread
        slot_EGPD = slot_GXD.reshape(num_groups, num_experts, num_slots // num_experts, width).transpose(0, 1)
        position_E = spread.send_position(torch.arange(num_experts, device=slot_GXD.device), num_experts)
        if spread.num_parts > 1:
            slot_EGPD = slot_EGPD.index_select(0, position_E.argsort())
        rows_ND = slot_EGPD.reshape(-1, width)
        parts = self._padded.parts(num_experts, rows_ND)
        back_ND = self.dispatcher.carry(rows_ND, None, parts, self.experts, meanwhile)
        back_EGPD = back_ND.view(num_experts, num_groups, num_slots // num_experts, width)
        if spread.num_parts > 1:
            back_EGPD = back_EGPD.index_select(0, position_E)
        return back_EGPD.transpose(0, 1).reshape(num_groups, num_slots, width)

    @property
    def _padded(self) -> PaddedDispatcher:
        dispatcher = self.dispatcher
        inner = dispatcher.inner if isinstance(dispatcher, OverlapDispatcher) else dispatcher
        assert isinstance(inner, PaddedDispatcher)  # build sees to it
        return inner

    @torch.no_grad()
    def _metrics(self, combine_GSX: Tensor, valid_GS: Tensor, finite_GS: Tensor) -> LayerSums:
        num_groups, size, num_slots = combine_GSX.shape
        num_experts = self.moe.num_experts
        usable_GS = valid_GS & finite_GS
        slots_per_expert = usable_GS.any(1).sum() * (num_slots // num_experts)
        demand_E = slots_per_expert.expand(num_experts).clone()
        share_GSE = combine_GSX.view(num_groups, size, num_experts, num_slots // num_experts).sum(3)
        return LayerSums(
            demand_E=demand_E,
            kept_E=demand_E,
            assignments=demand_E.sum(),
            overflow_tokens=torch.zeros_like(slots_per_expert),
            valid_tokens=usable_GS.sum(),
            nonfinite_tokens=(valid_GS & ~finite_GS).sum(),
            entropy=torch.special.entr(share_GSE).sum(),
        )


def _no_list(inputs: RouterInputs, options: SoftOptions, top_k: int) -> Routing:
    raise TypeError("router soft mixes tokens and makes no list of assignments: it needs a SoftMoELayer")


def _unit_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """N(0, 1/D); only the directions matter."""
    return np.float32(shape[-1] ** -0.5) * rng.standard_normal(shape, dtype=np.float32)


def _one(_: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    return np.ones(shape, dtype=np.float32)


def _parts(options: SoftOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    phi = RouterTensor(
        name="phi", field=None, num_rows=num_experts * options.slots, projects=True, init=_unit_normal
    )
    return phi, RouterTensor(name="scale", field=None, num_rows=1, projects=False, init=_one)


FAMILY = Family(route=_no_list, parts=_parts, has_weight=False)
