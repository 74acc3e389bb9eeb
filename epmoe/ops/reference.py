"""Plain PyTorch twin of every operator: the meaning, and the default on any device.

Letters as in ``epmoe.types``. Integers are int64. Rows may have any floating dtype; weights and sums are in the
compute dtype (at least float32). What does not fit is a ``ValueError`` (``epmoe.ops.checks``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.ops import checks, philox
from epmoe.types import compute_dtype

DROPLESS = -1
"""Capacity that drops nothing."""

UNFILLED = -1
"""In a list of tokens: a row that belongs to none."""


def usable_rows(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Tokens that can be routed: real, no NaN or +inf logit, at least one finite logit -> bool ``[T]``."""
    broken_T = (logits_TE.isnan() | (logits_TE == torch.inf)).any(-1)
    return valid_T & ~broken_T & logits_TE.isfinite().any(-1)


def uniform(
    sample_T: Tensor, position_T: Tensor, seed: int, stream: int, layer: int, num_lanes: int, first_lane: int
) -> Tensor:
    """Draws in [0, 1) -> float32 ``[T, num_lanes]``; see ``epmoe.ops.philox.uniform``."""
    checks.uniform(sample_T, position_T, stream, layer, num_lanes, first_lane)
    first_block, mask = first_lane // 4, philox.MASK
    block_Q = torch.arange(first_block, first_block + (num_lanes + 3) // 4, device=sample_T.device)
    sample_T1, position_T1 = sample_T.unsqueeze(1), position_T.unsqueeze(1)
    place = (stream << 24) | (layer << 8)
    c0_TQ, c1_TQ, c2_TQ, c3_TQ = torch.broadcast_tensors(
        block_Q & mask, position_T1 & mask, sample_T1 & mask, ((sample_T1 >> 32) & 0xFF) | place
    )
    words = philox.philox4x32((c0_TQ, c1_TQ, c2_TQ, c3_TQ), (seed & mask, (seed >> 32) & mask))
    draws_TL = torch.stack(words, dim=-1).flatten(1)[:, :num_lanes]
    return (draws_TL >> 8).to(torch.float32) * 2.0**-24


def route_topk(
    logits_TE: Tensor,
    valid_T: Tensor,
    uniform_T: Tensor | None,
    sample_T: Tensor | None,
    position_T: Tensor | None,
    top_k: int,
    normalize: bool,
    second_policy: str,
    tau: float,
    seed: int,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax, top-k on the logits (ties: lowest expert), combine weights and the second-expert decision.

    Args:
        logits_TE: Router logits in the compute dtype. -inf = expert not available.
        valid_T: bool; other tokens, and rows that are not usable, are inactive with zero probabilities.
        uniform_T: Draws for ``second_policy="random"``; or None and ``sample_T``, ``position_T`` (with ``seed``
            and ``layer``) are the Philox counters of the draws. Never both.
        normalize: Weights are a softmax over the chosen logits; else raw probabilities.
        second_policy: ``all`` | ``random`` (active with probability min(1, a2/tau)) | ``threshold`` (a2 > tau) |
            ``none``, where a2 is the second choice's share of the two (GShard, arXiv:2006.16668 Algorithm 1).

    Returns:
        probs_TE, topk_ids_TK, topk_weights_TK (0 where inactive), active_TK. A row is usable where
        ``active_TK[:, 0]``.
    """
    checks.route_topk(logits_TE, valid_T, uniform_T, sample_T, position_T, top_k, second_policy, tau, layer)
    usable_T = usable_rows(logits_TE, valid_T)
    clean_TE = logits_TE.masked_fill(~usable_T.unsqueeze(1), 0.0)
    probs_TE = clean_TE.softmax(-1).masked_fill(~usable_T.unsqueeze(1), 0.0)
    ids_TK = clean_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen_TK = clean_TE.gather(1, ids_TK)
    active_TK = usable_T.unsqueeze(1) & chosen_TK.isfinite()
    if second_policy != "all":
        if second_policy == "random" and sample_T is not None and position_T is not None:
            uniform_T = uniform(sample_T, position_T, seed, philox.SECOND_EXPERT, layer, 1, 0)[:, 0]
        active_TK[:, 1] &= _second_active(chosen_TK, uniform_T, second_policy, tau)
    weights_TK = chosen_TK.softmax(-1) if normalize else probs_TE.gather(1, ids_TK)
    return probs_TE, ids_TK, weights_TK * active_TK, active_TK


def _second_active(chosen_TK: Tensor, uniform_T: Tensor | None, second_policy: str, tau: float) -> Tensor:
    """Whether each token's second expert is used. In float64, so that every device decides alike."""
    if second_policy == "none":
        return torch.zeros_like(chosen_TK[:, 0], dtype=torch.bool)
    gap_T = chosen_TK[:, 0].double() - chosen_TK[:, 1].double()
    twice_a2_T = 2.0 / (1.0 + gap_T.exp())
    if second_policy == "threshold":
        return twice_a2_T > 2.0 * tau
    assert uniform_T is not None
    return twice_a2_T * (0.5 / tau) > uniform_T.double()


def route_topk_backward(
    d_probs_TE: Tensor,
    d_weights_TK: Tensor,
    probs_TE: Tensor,
    topk_ids_TK: Tensor,
    active_TK: Tensor,
    normalize: bool,
) -> Tensor:
    """Gradient of ``route_topk`` with respect to the logits; decisions are constants."""
    checks.route_topk_backward(d_probs_TE, d_weights_TK, probs_TE, topk_ids_TK, active_TK)
    checks.indices("route_topk_backward", topk_ids_TK, probs_TE.shape[1], "topk_ids")
    d_kept_TK = d_weights_TK * active_TK
    d_probs_TE = d_probs_TE if normalize else d_probs_TE.scatter_add(1, topk_ids_TK, d_kept_TK)
    d_logits_TE = probs_TE * (d_probs_TE - (d_probs_TE * probs_TE).sum(-1, keepdim=True))
    if not normalize:
        return d_logits_TE.contiguous()  # whatever the order in memory of the gradients that came
    chosen_TK = probs_TE.gather(1, topk_ids_TK)
    total_T1 = chosen_TK.sum(-1, keepdim=True)  # 0 in a row that was not usable
    share_TK = chosen_TK / total_T1.where(total_T1 > 0, 1.0)
    d_chosen_TK = share_TK * (d_kept_TK - (d_kept_TK * share_TK).sum(-1, keepdim=True))
    return d_logits_TE.scatter_add(1, topk_ids_TK, d_chosen_TK)


def assign_slots(
    expert_A: Tensor, group_A: Tensor, active_A: Tensor, num_groups: int, num_experts: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """First come, first served in list order, per (group, expert); inactive entries take no slot.

    Args:
        capacity: Slots per expert and group; ``DROPLESS`` (-1) = no limit.

    Returns:
        slot_A: slot, or -1 when inactive or over capacity.
        demand_GE: active entries before capacity.
    """
    checks.assign_slots(expert_A, group_A, active_A, num_groups, num_experts, capacity)
    checks.indices("assign_slots", expert_A, num_experts, "expert", active_A)
    checks.indices("assign_slots", group_A, num_groups, "group", active_A)
    num_bins = num_groups * num_experts
    bin_A = torch.where(active_A, group_A * num_experts + expert_A, num_bins)
    sorted_bin_A, order_A = bin_A.sort(stable=True)
    demand_X = torch.zeros(num_bins + 1, dtype=torch.int64, device=expert_A.device)
    demand_X.scatter_add_(0, bin_A, torch.ones_like(bin_A))
    start_X = demand_X.cumsum(0) - demand_X
    rank_A = torch.arange(bin_A.numel(), device=bin_A.device) - start_X.gather(0, sorted_bin_A)
    slot_A = torch.empty_like(bin_A).scatter_(0, order_A, rank_A)
    dropped_A = ~active_A if capacity == DROPLESS else ~active_A | (slot_A >= capacity)
    return slot_A.masked_fill_(dropped_A, -1), demand_X[:num_bins].view(num_groups, num_experts)


def permute(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """Row n of the result is row ``token_N[n]`` of x, or zeros where that is ``UNFILLED`` -> ``[N, D]``."""
    checks.permute(x_TD, token_N)
    checks.indices("permute", token_N, x_TD.shape[0], "token", least=UNFILLED)
    return _rows_of(x_TD, token_N)


def _rows_of(x_TD: Tensor, token_N: Tensor) -> Tensor:
    unfilled_N1 = (token_N == UNFILLED).unsqueeze(1)
    if x_TD.shape[0] == 0:  # there is no row to stand in for the unfilled ones
        return x_TD.new_zeros(token_N.shape[0], x_TD.shape[1])
    return x_TD.index_select(0, token_N.masked_fill(unfilled_N1[:, 0], 0)).masked_fill_(unfilled_N1, 0.0)


def combine(rows_ND: Tensor, weight_N: Tensor | None, token_N: Tensor, num_tokens: int) -> Tensor:
    """Each token's weighted sum of its rows (weight None = 1), zero where it has none -> ``[T, D]``.

    Sums in the compute dtype of the rows, in row order; the result has the rows' dtype. Rows whose token is
    ``UNFILLED`` belong to nobody.
    """
    checks.combine(rows_ND, weight_N, token_N, num_tokens)
    checks.indices("combine", token_N, num_tokens, "token", least=UNFILLED)
    wide_ND = rows_ND.to(compute_dtype(rows_ND.dtype))
    if weight_N is not None:
        wide_ND = wide_ND * weight_N.unsqueeze(1).to(wide_ND.dtype)
    # One more token for the unfilled rows, and then without it.
    owner_N = torch.where(token_N == UNFILLED, num_tokens, token_N)
    y_XD = wide_ND.new_zeros(num_tokens + 1, rows_ND.shape[1]).index_add_(0, owner_N, wide_ND)
    return y_XD[:num_tokens].to(rows_ND.dtype, copy=True)


def combine_backward(
    d_y_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``combine`` with respect to rows and weights; zero for unfilled rows."""
    checks.combine_backward(d_y_TD, rows_ND, weight_N, token_N)
    checks.indices("combine_backward", token_N, d_y_TD.shape[0], "token", least=UNFILLED)
    d_y_ND = _rows_of(d_y_TD, token_N).to(compute_dtype(rows_ND.dtype))
    # An unfilled row may hold anything, and 0 * NaN is NaN.
    d_weight_N = (d_y_ND * rows_ND).sum(-1).masked_fill_(token_N == UNFILLED, 0.0).to(weight_N.dtype)
    d_rows_ND = d_y_ND * weight_N.unsqueeze(1).to(d_y_ND.dtype)
    d_rows_ND.masked_fill_((token_N == UNFILLED).unsqueeze(1), 0.0)
    return d_rows_ND.to(rows_ND.dtype), d_weight_N


def activate(hidden_RX: Tensor, weight_R: Tensor | None, kind: str) -> Tensor:
    """The activation between an expert's two matrices, times each row's weight (None = 1) -> ``[R, F]``.

    Args:
        hidden_RX: ``[R, 2F]`` for ``swiglu``, silu(first half) * second half; ``[R, F]`` for ``gelu`` (exact) and
            ``relu``.

    Computes in the compute dtype of the hidden rows; the result has their dtype.
    """
    checks.activate(hidden_RX, weight_R, kind)
    act_RF = _activation(hidden_RX.to(compute_dtype(hidden_RX.dtype)), kind)
    if weight_R is not None:
        act_RF = act_RF * weight_R.unsqueeze(1).to(act_RF.dtype)
    return act_RF.to(hidden_RX.dtype).contiguous()  # whatever the order in memory of the hidden rows


def _activation(hidden_RX: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        gate_RF, up_RF = hidden_RX.chunk(2, dim=-1)
        return F.silu(gate_RF) * up_RF
    return F.gelu(hidden_RX) if kind == "gelu" else F.relu(hidden_RX)


def activate_backward(
    d_act_RF: Tensor, hidden_RX: Tensor, weight_R: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``activate`` with respect to hidden rows and weights, and its result once more.

    Returns:
        d_hidden_RX, act_RF and d_weight_R (in the compute dtype).
    """
    checks.activate_backward(d_act_RF, hidden_RX, weight_R, kind)
    dtype = compute_dtype(hidden_RX.dtype)
    wide_RX, d_wide_RF = hidden_RX.to(dtype), d_act_RF.to(dtype)
    weight_R1 = 1.0 if weight_R is None else weight_R.unsqueeze(1).to(dtype)
    act_RF = _activation(wide_RX, kind)
    d_weight_R = (d_wide_RF * act_RF).sum(-1)
    d_wide_RF = d_wide_RF * weight_R1
    if kind == "swiglu":
        gate_RF, up_RF = wide_RX.chunk(2, dim=-1)
        share_RF = gate_RF.sigmoid()
        silu_RF = gate_RF * share_RF
        d_gate_RF = d_wide_RF * up_RF * (share_RF + silu_RF * (1.0 - share_RF))
        d_hidden_RX = torch.cat((d_gate_RF, d_wide_RF * silu_RF), dim=-1)
    elif kind == "gelu":
        d_hidden_RX = torch.ops.aten.gelu_backward(d_wide_RF, wide_RX)
    else:
        d_hidden_RX = d_wide_RF * (wide_RX > 0)
    d_hidden_RX = d_hidden_RX.to(hidden_RX.dtype).contiguous()
    return d_hidden_RX, (act_RF * weight_R1).to(hidden_RX.dtype).contiguous(), d_weight_R
