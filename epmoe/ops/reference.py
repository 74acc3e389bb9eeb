"""Plain PyTorch twin of every operator: the meaning, and the default on any device.

Letters as in ``epmoe.types``. Integers are int64. Rows may have any floating dtype; weights and sums are in the
compute dtype (at least float32). What does not fit is a ``ValueError`` (``epmoe.ops.checks``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from epmoe.ops import checks, philox
from epmoe.types import compute_dtype

DROPLESS = -1
"""Capacity that drops nothing."""


def usable_rows(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Tokens that can be routed: real, no NaN or +inf logit, at least one finite logit -> bool ``[T]``."""
    broken_T = (logits_TE.isnan() | (logits_TE == torch.inf)).any(-1)
    return valid_T & ~broken_T & logits_TE.isfinite().any(-1)


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
            uniform_T = philox.uniform(seed, philox.SECOND_EXPERT, layer, sample_T, position_T, 1)[:, 0]
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
    chosen_logits_TK: Tensor,
    active_TK: Tensor,
    normalize: bool,
) -> Tensor:
    """Gradient of ``route_topk`` with respect to the logits; decisions are constants."""
    checks.route_topk_backward(d_probs_TE, d_weights_TK, probs_TE, topk_ids_TK, chosen_logits_TK, active_TK)
    checks.indices("route_topk_backward", topk_ids_TK, probs_TE.shape[1], "topk_ids")
    d_kept_TK = d_weights_TK * active_TK
    d_probs_TE = d_probs_TE if normalize else d_probs_TE.scatter_add(1, topk_ids_TK, d_kept_TK)
    d_logits_TE = probs_TE * (d_probs_TE - (d_probs_TE * probs_TE).sum(-1, keepdim=True))
    if not normalize:
        return d_logits_TE.contiguous()  # whatever the order in memory of the gradients that came
    share_TK = chosen_logits_TK.softmax(-1)
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
    """Row n of the result is row ``token_N[n]`` of x -> ``[N, D]``."""
    checks.permute(x_TD, token_N)
    try:
        return x_TD.index_select(0, token_N)
    except (IndexError, RuntimeError):  # the numbers are looked for only when there is something to tell
        checks.indices("permute", token_N, x_TD.shape[0], "token")
        raise


def combine(rows_ND: Tensor, weight_N: Tensor | None, token_N: Tensor, num_tokens: int) -> Tensor:
    """Each token's weighted sum of its rows (weight None = 1), zero where it has none -> ``[T, D]``.

    Sums in the compute dtype of the rows, in row order; the result has the rows' dtype.
    """
    checks.combine(rows_ND, weight_N, token_N, num_tokens)
    checks.indices("combine", token_N, num_tokens, "token")
    wide_ND = rows_ND.to(compute_dtype(rows_ND.dtype))
    if weight_N is not None:
        wide_ND = wide_ND * weight_N.unsqueeze(1).to(wide_ND.dtype)
    y_TD = wide_ND.new_zeros(num_tokens, rows_ND.shape[1]).index_add_(0, token_N, wide_ND)
    return y_TD.to(rows_ND.dtype)


def combine_backward(
    d_y_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``combine`` with respect to rows and weights."""
    checks.combine_backward(d_y_TD, rows_ND, weight_N, token_N)
    checks.indices("combine_backward", token_N, d_y_TD.shape[0], "token")
    d_y_ND = d_y_TD.index_select(0, token_N).to(compute_dtype(rows_ND.dtype))
    d_weight_N = (d_y_ND * rows_ND).sum(-1).to(weight_N.dtype)
    d_rows_ND = d_y_ND * weight_N.unsqueeze(1).to(d_y_ND.dtype)
    return d_rows_ND.to(rows_ND.dtype), d_weight_N


def grouped_gemm(rows_RD: Tensor, weight_LDF: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
    """Consecutive blocks of rows, each times its expert's matrix -> ``[R, F]``; rows beyond the counts give 0.

    Copies the counts to the host, which on CUDA waits for the device.
    """
    checks.grouped_gemm(rows_RD, weight_LDF, tokens_per_expert_L)
    counts = checks.blocks("grouped_gemm", tokens_per_expert_L, rows_RD.shape[0])  # a host sync on CUDA
    out_RF = rows_RD.new_empty(rows_RD.shape[0], weight_LDF.shape[2])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(rows_RD[start : start + count], weight_LDF[expert], out=out_RF[start : start + count])
        start += count
    out_RF[start:].zero_()
    return out_RF


def grouped_gemm_weight_grad(rows_RD: Tensor, d_out_RF: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
    """Gradient of ``grouped_gemm`` with respect to the weights -> ``[L, D, F]``; zero for experts without rows."""
    checks.grouped_gemm_weight_grad(rows_RD, d_out_RF, tokens_per_expert_L)
    counts = checks.blocks(
        "grouped_gemm_weight_grad", tokens_per_expert_L, rows_RD.shape[0]
    )  # a host sync on CUDA
    num_local = tokens_per_expert_L.shape[0]
    d_weight_LDF = rows_RD.new_empty(num_local, rows_RD.shape[1], d_out_RF.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            block = slice(start, start + count)
            torch.mm(rows_RD[block].t(), d_out_RF[block], out=d_weight_LDF[expert])
        else:
            d_weight_LDF[expert].zero_()
        start += count
    return d_weight_LDF
