"""The contenders of the operator benchmark: native, reference and plain PyTorch, and the bytes that must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.ops import DROPLESS, ffn, reference
from epmoe.ops.registration import ops

Outputs = Tensor | tuple[Tensor, ...]
INDEX_BYTES = 8
PROLOGUE = "routing prologue"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpShape:
    """Sizes of a case; letters as in ``epmoe.types``."""

    num_tokens: int
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    dtype: torch.dtype

    def name(self) -> str:
        """All sizes in one line."""
        return (
            f"T={self.num_tokens} E={self.num_experts} K={self.top_k} D={self.d_model} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """One random routing and the rows that follow it."""

    shape: OpShape
    logits_TE: Tensor
    valid_T: Tensor
    d_probs_TE: Tensor
    d_weights_TK: Tensor
    expert_A: Tensor
    group_A: Tensor
    active_A: Tensor
    token_N: Tensor
    weight_N: Tensor
    counts_E: Tensor
    x_TD: Tensor
    rows_ND: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCase:
    """An operator with everything that computes it."""

    name: str
    contenders: dict[str, Callable[[], Outputs]]
    """``native`` is whatever serves epmoe here, ``reference`` its plain twin, others are plain PyTorch."""
    bound_bytes: int
    """What has to be read and written once; 0 where arithmetic is the bound."""
    bound: Callable[[], object] | None = None
    """For experts: the balanced products of equal arithmetic, with the activation between them."""


def make_inputs(shape: OpShape, device: torch.device) -> Inputs:
    """Random everywhere; assignments choice by choice, as the routers list them."""
    T, E, K, D = shape.num_tokens, shape.num_experts, shape.top_k, shape.d_model
    logits_TE = torch.randn(T, E, device=device)
    valid_T = torch.ones(T, dtype=torch.bool, device=device)
    _, id_TK, weight_TK, active_TK = reference.route_topk(
        logits_TE, valid_T, None, None, None, K, True, "all", 0.5, 0, 0
    )
    expert_A = id_TK.t().reshape(-1)
    order_N = expert_A.argsort(stable=True)
    return Inputs(
        shape=shape,
        logits_TE=logits_TE,
        valid_T=valid_T,
        d_probs_TE=torch.randn(T, E, device=device),
        d_weights_TK=torch.randn(T, K, device=device),
        expert_A=expert_A,
        group_A=torch.zeros_like(expert_A),
        active_A=active_TK.t().reshape(-1),
        token_N=torch.arange(T, device=device).repeat(K)[order_N],
        weight_N=weight_TK.t().reshape(-1)[order_N],
        counts_E=expert_A.bincount(minlength=E),
        x_TD=torch.randn(T, D, device=device).to(shape.dtype),
        rows_ND=torch.randn(T * K, D, device=device).to(shape.dtype),
    )


def twins(name: str, *values: Any) -> dict[str, Callable[[], Outputs]]:
    """The operator as it is served, and its reference kernel."""
    served = getattr(ops, name)
    plain = getattr(ffn if name.startswith("expert_ffn") else reference, name)
    return {"native": lambda: served(*values), "reference": lambda: plain(*values)}


# ----------------------------------------------------------------------------------------------- routing
def route_topk(inputs: Inputs) -> OpCase:
    """Logits to probabilities, ids and weights."""
    shape, logits_TE = inputs.shape, inputs.logits_TE

    def torch_topk() -> Outputs:
        probs_TE = logits_TE.softmax(-1)
        chosen_TK, id_TK = logits_TE.topk(shape.top_k, dim=-1)
        return probs_TE, id_TK, chosen_TK.softmax(-1)

    values = (logits_TE, inputs.valid_T, None, None, None, shape.top_k, True, "all", 0.5, 0, 0)
    per_choice = shape.num_tokens * shape.top_k * (INDEX_BYTES + 4 + 1)
    return OpCase(
        name="route_topk",
        contenders={**twins("route_topk", *values), "softmax, topk": torch_topk},
        bound_bytes=2 * logits_TE.nbytes + per_choice,
    )


def route_topk_backward(inputs: Inputs) -> OpCase:
    """Gradients of probabilities and weights to that of the logits."""
    shape, dtype = inputs.shape, inputs.logits_TE.dtype
    probs_TE = inputs.logits_TE.softmax(-1)
    chosen_TK, id_TK = inputs.logits_TE.topk(shape.top_k, dim=-1)
    weight_TK = chosen_TK.softmax(-1)
    active_TK = torch.ones_like(id_TK, dtype=torch.bool)

    def torch_backward() -> Outputs:
        # What autograd would call; it would do so on the stream of the forward pass, which no graph can capture.
        d_chosen_TK = torch._softmax_backward_data(inputs.d_weights_TK, weight_TK, -1, dtype)
        d_logits_TE = torch._softmax_backward_data(inputs.d_probs_TE, probs_TE, -1, dtype)
        return d_logits_TE.scatter_add_(1, id_TK, d_chosen_TK)

    values = (inputs.d_probs_TE, inputs.d_weights_TK, probs_TE, id_TK, active_TK, True)
    return OpCase(
        name="route_topk backward",
        contenders={**twins("route_topk_backward", *values), "backwards of softmax, topk": torch_backward},
        bound_bytes=3 * inputs.logits_TE.nbytes + shape.num_tokens * shape.top_k * (INDEX_BYTES + 4 + 1),
    )


def assign_slots(inputs: Inputs) -> OpCase:
    """Slots of all assignments, dropless."""
    num_experts = inputs.shape.num_experts
    expert_A = inputs.expert_A

    values = (expert_A, inputs.group_A, inputs.active_A, 1, num_experts, DROPLESS)
    return OpCase(
        name="assign_slots",
        contenders={
            **twins("assign_slots", *values),
            "one-hot cumsum": lambda: _one_hot_slots(expert_A, num_experts),
        },
        bound_bytes=expert_A.numel() * (3 * INDEX_BYTES + 1) + num_experts * INDEX_BYTES,
    )


def _one_hot_slots(expert_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    mask_AE = F.one_hot(expert_A, num_experts)
    slot_A = (mask_AE.cumsum(0) - 1).gather(1, expert_A.unsqueeze(1)).squeeze(1)
    return slot_A, mask_AE.sum(0, keepdim=True)


def routing_prologue(inputs: Inputs) -> OpCase:
    """Logits to slots: all that has to be known before the first row moves, dropless."""
    shape = inputs.shape

    def prologue(kernels: Any) -> Outputs:
        _, id_TK, weight_TK, active_TK = kernels.route_topk(
            inputs.logits_TE, inputs.valid_T, None, None, None, shape.top_k, True, "all", 0.5, 0, 0
        )
        listed = (id_TK.t().reshape(-1), inputs.group_A, active_TK.t().reshape(-1))
        return weight_TK, *kernels.assign_slots(*listed, 1, shape.num_experts, DROPLESS)

    def plain() -> Outputs:
        chosen_TK, id_TK = inputs.logits_TE.topk(shape.top_k, dim=-1)
        return chosen_TK.softmax(-1), *_one_hot_slots(id_TK.t().reshape(-1), shape.num_experts)

    return OpCase(
        name=PROLOGUE,
        contenders={
            "native": lambda: prologue(ops),
            "reference": lambda: prologue(reference),
            "topk, one-hot cumsum": plain,
        },
        bound_bytes=route_topk(inputs).bound_bytes + assign_slots(inputs).bound_bytes,
    )


# ------------------------------------------------------------------------------------------------- rows
def _row_bytes(inputs: Inputs, times_T: int, times_N: int) -> int:
    """Rows of T tokens and of N assignments, and one index per assignment."""
    row = inputs.shape.d_model * inputs.x_TD.element_size()
    num_assignments = inputs.token_N.numel()
    return (
        row * (times_T * inputs.shape.num_tokens + times_N * num_assignments) + INDEX_BYTES * num_assignments
    )


def permute(inputs: Inputs) -> OpCase:
    """Tokens to rows: T rows read, N written."""
    return OpCase(
        name="permute",
        contenders={
            **twins("permute", inputs.x_TD, inputs.token_N),
            "index_select": lambda: inputs.x_TD.index_select(0, inputs.token_N),
        },
        bound_bytes=_row_bytes(inputs, 1, 1),
    )


def permute_backward(inputs: Inputs) -> OpCase:
    """Gradients of rows summed per token: N rows read, T written."""

    def index_add() -> Outputs:
        return torch.zeros_like(inputs.x_TD).index_add_(0, inputs.token_N, inputs.rows_ND)

    values = (inputs.rows_ND, None, inputs.token_N, inputs.shape.num_tokens)
    return OpCase(
        name="permute backward",
        contenders={**twins("combine", *values), "index_add": index_add},
        bound_bytes=_row_bytes(inputs, 1, 1),
    )


def combine(inputs: Inputs) -> OpCase:
    """Weighted sum of each token's rows: N rows read, T written."""

    def index_add() -> Outputs:
        weighted_ND = inputs.rows_ND * inputs.weight_N.unsqueeze(1).to(inputs.rows_ND.dtype)
        return torch.zeros_like(inputs.x_TD).index_add_(0, inputs.token_N, weighted_ND)

    values = (inputs.rows_ND, inputs.weight_N, inputs.token_N, inputs.shape.num_tokens)
    return OpCase(
        name="combine",
        contenders={**twins("combine", *values), "mul, index_add": index_add},
        bound_bytes=_row_bytes(inputs, 1, 1) + inputs.weight_N.nbytes,
    )


def combine_backward(inputs: Inputs) -> OpCase:
    """Gradients of rows and weights: T rows of gradient and N rows read, N written."""

    def index_select() -> Outputs:
        d_y_ND = inputs.x_TD.index_select(0, inputs.token_N)
        d_weight_N = (d_y_ND * inputs.rows_ND).sum(-1, dtype=torch.float32)
        return d_y_ND * inputs.weight_N.unsqueeze(1).to(d_y_ND.dtype), d_weight_N

    values = (inputs.x_TD, inputs.rows_ND, inputs.weight_N, inputs.token_N)
    return OpCase(
        name="combine backward",
        contenders={**twins("combine_backward", *values), "index_select, mul, sum": index_select},
        bound_bytes=_row_bytes(inputs, 1, 2) + 2 * inputs.weight_N.nbytes,
    )


# ---------------------------------------------------------------------------------------------- experts
ACTIVATION = "gelu"


def expert_ffn(inputs: Inputs) -> OpCase:
    """Rows through their experts; the bound is ``bmm``, activation, ``bmm`` of balanced experts."""
    rows_ND, (w_in_EDF, w_out_EFD) = inputs.rows_ND, _matrices(inputs)
    packed_ECD = _packed(rows_ND, inputs.shape.num_experts)
    offset_E = inputs.counts_E.cumsum(0).to(torch.int32)

    def grouped() -> Outputs:
        hidden_NF = F.grouped_mm(rows_ND, w_in_EDF, offs=offset_E)
        return F.grouped_mm(F.gelu(hidden_NF), w_out_EFD, offs=offset_E), hidden_NF

    values = (rows_ND, None, w_in_EDF, w_out_EFD, inputs.counts_E, None, ACTIVATION)
    return OpCase(
        name="expert_ffn",
        contenders={**twins("expert_ffn", *values), "torch grouped_mm": grouped},
        bound_bytes=0,
        bound=lambda: torch.bmm(F.gelu(torch.bmm(packed_ECD, w_in_EDF)), w_out_EFD),
    )


def expert_ffn_backward(inputs: Inputs) -> OpCase:
    """All its gradients; the bound is four ``bmm`` of balanced experts, and the activation with its gradient."""
    shape, rows_ND, matrices = inputs.shape, inputs.rows_ND, _matrices(inputs)
    hidden_NF = torch.randn(rows_ND.shape[0], shape.d_ff, device=rows_ND.device).to(shape.dtype)
    d_y_ND = torch.randn_like(rows_ND)
    packed = tuple(_packed(rows, shape.num_experts) for rows in (d_y_ND, rows_ND, hidden_NF))
    offset_E = inputs.counts_E.cumsum(0).to(torch.int32)

    def plain(
        multiply: Callable[[Tensor, Tensor], Tensor], d_y: Tensor, rows: Tensor, hidden: Tensor
    ) -> Outputs:
        w_in_EDF, w_out_EFD = matrices
        d_hidden = torch.ops.aten.gelu_backward(multiply(d_y, w_out_EFD.transpose(1, 2)), hidden)
        d_w_out_EFD = multiply(F.gelu(hidden).transpose(-2, -1), d_y)
        d_rows = multiply(d_hidden, w_in_EDF.transpose(1, 2))
        return d_rows, rows.new_empty(0), multiply(rows.transpose(-2, -1), d_hidden), d_w_out_EFD

    given = (rows_ND, None, *matrices, inputs.counts_E, None, hidden_NF, ACTIVATION)
    contenders = twins("expert_ffn_backward", d_y_ND, *given, True, True, True)
    contenders["torch grouped_mm"] = lambda: plain(
        partial(F.grouped_mm, offs=offset_E), d_y_ND, rows_ND, hidden_NF
    )
    return OpCase(
        name="expert_ffn backward",
        contenders=contenders,
        bound_bytes=0,
        bound=lambda: plain(torch.bmm, *packed),
    )


def _matrices(inputs: Inputs) -> tuple[Tensor, Tensor]:
    shape, device = inputs.shape, inputs.x_TD.device

    def normal(fan_in: int, width: int) -> Tensor:
        matrices = torch.randn(shape.num_experts, fan_in, width, device=device)
        return matrices.mul_(fan_in**-0.5).to(shape.dtype)

    return normal(shape.d_model, shape.d_ff), normal(shape.d_ff, shape.d_model)


def _packed(rows_NX: Tensor, num_experts: int) -> Tensor:
    per_expert = rows_NX.shape[0] // num_experts
    return rows_NX[: per_expert * num_experts].view(num_experts, per_expert, rows_NX.shape[1])


# ------------------------------------------------------------------------------------------------- peers
def transformer_engine(inputs: Inputs) -> dict[str, Callable[[], Outputs]]:
    """Transformer Engine's permute, and its weighted unpermute as ``combine``. CUDA only.

    Its rows lie in another order inside an expert, so it is checked by a round trip.

    Raises:
        ImportError: It is not installed.
        RuntimeError: The round trip does not give K times the tokens.
    """
    from transformer_engine.pytorch.permutation import moe_permute, moe_unpermute

    shape = inputs.shape
    id_TK = inputs.expert_A.view(shape.top_k, shape.num_tokens).t().to(torch.int32).contiguous()
    rows_ND, row_map = moe_permute(inputs.x_TD, id_TK, map_type="index")
    ones_TK = torch.ones_like(id_TK, dtype=torch.float32)
    back_TD = moe_unpermute(rows_ND, row_map, ones_TK, map_type="index")
    if not torch.allclose(back_TD.float(), shape.top_k * inputs.x_TD.float(), rtol=2e-2, atol=2e-2):
        raise RuntimeError("moe_unpermute(moe_permute(x)) is not K * x")
    weight_TK = torch.rand_like(ones_TK)
    return {
        "permute": lambda: moe_permute(inputs.x_TD, id_TK, map_type="index")[0],
        "combine": lambda: moe_unpermute(inputs.rows_ND, row_map, weight_TK, map_type="index"),
    }


ROUTING = (route_topk, route_topk_backward, assign_slots, routing_prologue)
ROWS = (permute, permute_backward, combine, combine_backward)
EXPERTS = (expert_ffn, expert_ffn_backward)
