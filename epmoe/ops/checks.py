"""What the reference and fake kernels refuse, in the words of ``csrc/checks.h``: a ``ValueError`` with the numbers.

Dtypes, devices, sizes and options are known without waiting for a device; ``indices`` looks at values and therefore
only at those in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epmoe.ops.philox import MAX_LAYER, MAX_STREAM

WIDE = (torch.float32, torch.float64)
FLOATING = (*WIDE, torch.bfloat16, torch.float16)
SECOND_POLICIES = ("all", "none", "threshold", "random")
ACTIVATIONS = ("swiglu", "gelu", "relu")
LARGEST = 2**63 - 1


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True, slots=True)
class Check:
    """The checks of one call of an operator."""

    op: str
    device: torch.device

    def that(self, condition: bool | torch.SymBool, told: Callable[[], str]) -> None:
        """Also of sizes that are symbols: those that only a run can tell are compared there."""
        if condition is not True:
            torch._check_value(condition, lambda: f"{self.op}: {told()}")

    def tensor(
        self, tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int | None, ...]
    ) -> None:
        """Dense, one of the dtypes, on the device of this call, of the given sizes (None = any)."""
        self.that(tensor.layout == torch.strided, lambda: f"{name} must be dense, got {tensor.layout}")
        self.that(
            tensor.dtype in dtypes,
            lambda: f"{name} must be {_listed(dtypes)}, got {_listed((tensor.dtype,))}",
        )
        self.that(
            tensor.device == self.device,
            lambda: f"{name} must be on {self.device} like the tensors before it, got {tensor.device}",
        )

        def told() -> str:
            shape = ", ".join("any" if size is None else str(size) for size in sizes)
            return f"{name} must have shape [{shape}], got {list(tensor.shape)}"

        self.that(tensor.dim() == len(sizes), told)
        for actual, size in zip(tensor.shape, sizes, strict=True):
            if size is not None:
                self.that(actual == size, told)

    def at_least(self, least: int, value: int, name: str) -> None:
        """A lower limit."""
        self.that(value >= least, lambda: f"{name}={value} must be at least {least}")

    def at_most(self, most: int, value: int, name: str) -> None:
        """An upper limit."""
        self.that(value <= most, lambda: f"{name}={value} must be at most {most}")


def indices(
    op: str, index: Tensor, bound: int, name: str, used: Tensor | None = None, *, least: int = 0
) -> None:
    """All values, or those ``used``, are in [least, bound). In host memory only: elsewhere this would wait."""
    if index.device.type != "cpu":
        return
    bad = (index < least) | (index >= bound)
    if used is not None:
        bad &= used
    if bad.any():
        first = int(bad.flatten().nonzero()[0])
        value = int(index.flatten()[first])
        raise ValueError(f"{op}: {name}[{first}]={value} must be in [{least}, {bound})")


def route_topk(
    logits_TE: Tensor,
    valid_T: Tensor,
    uniform_T: Tensor | None,
    sample_T: Tensor | None,
    position_T: Tensor | None,
    top_k: int,
    second_policy: str,
    tau: float,
    layer: int,
) -> None:
    """Arguments of ``route_topk``."""
    check = Check("route_topk", logits_TE.device)
    check.tensor(logits_TE, "logits", WIDE, (None, None))
    num_tokens, num_experts = logits_TE.shape
    check.tensor(valid_T, "valid", (torch.bool,), (num_tokens,))
    check.that(
        second_policy in SECOND_POLICIES,
        lambda: f"second_policy='{second_policy}' must be 'all', 'none', 'threshold' or 'random'",
    )
    check.at_least(1 if second_policy == "all" else 2, top_k, "top_k")
    check.at_most(num_experts, top_k, "top_k")
    if second_policy in ("threshold", "random"):
        check.that(tau > 0, lambda: f"tau={tau:g} must be positive")
    if second_policy != "random":
        return
    counters = (sample_T, position_T)
    given = [counter for counter in counters if counter is not None]
    check.that(
        len(given) == (0 if uniform_T is not None else 2),
        lambda: "second_policy='random' needs either uniform or both sample and position",
    )
    if uniform_T is not None:
        check.tensor(uniform_T, "uniform", WIDE, (num_tokens,))
        return
    check.at_least(0, layer, "layer")
    check.at_most(MAX_LAYER - 1, layer, "layer")
    for counter, name in zip(given, ("sample", "position"), strict=True):
        check.tensor(counter, name, (torch.int64,), (num_tokens,))


def uniform(
    sample_T: Tensor, position_T: Tensor, stream: int, layer: int, num_lanes: int, first_lane: int
) -> None:
    """Arguments of ``uniform``."""
    check = Check("uniform", sample_T.device)
    check.tensor(sample_T, "sample", (torch.int64,), (None,))
    check.tensor(position_T, "position", (torch.int64,), (sample_T.shape[0],))
    check.at_least(0, stream, "stream")
    check.at_most(MAX_STREAM, stream, "stream")
    check.at_least(0, layer, "layer")
    check.at_most(MAX_LAYER - 1, layer, "layer")
    check.at_least(0, num_lanes, "num_lanes")
    check.at_least(0, first_lane, "first_lane")
    check.that(first_lane % 4 == 0, lambda: f"first_lane={first_lane} must be a multiple of 4")


def route_topk_backward(
    d_probs_TE: Tensor,
    d_weights_TK: Tensor,
    probs_TE: Tensor,
    topk_ids_TK: Tensor,
    active_TK: Tensor,
) -> None:
    """Arguments of ``route_topk_backward``."""
    check = Check("route_topk_backward", probs_TE.device)
    check.tensor(probs_TE, "probs", WIDE, (None, None))
    num_tokens, num_experts = probs_TE.shape
    same = (probs_TE.dtype,)
    check.tensor(topk_ids_TK, "topk_ids", (torch.int64,), (num_tokens, None))
    shape_TK = (num_tokens, topk_ids_TK.shape[1])
    check.tensor(d_probs_TE, "d_probs", same, (num_tokens, num_experts))
    check.tensor(d_weights_TK, "d_weights", same, shape_TK)
    check.tensor(active_TK, "active", (torch.bool,), shape_TK)
    check.at_least(1, topk_ids_TK.shape[1], "top_k")


def assign_slots(
    expert_A: Tensor, group_A: Tensor, active_A: Tensor, num_groups: int, num_experts: int, capacity: int
) -> None:
    """Arguments of ``assign_slots``."""
    check = Check("assign_slots", expert_A.device)
    check.tensor(expert_A, "expert", (torch.int64,), (None,))
    check.tensor(group_A, "group", (torch.int64,), (expert_A.shape[0],))
    check.tensor(active_A, "active", (torch.bool,), (expert_A.shape[0],))
    check.at_least(0, num_groups, "num_groups")
    check.at_least(0, num_experts, "num_experts")
    check.at_least(-1, capacity, "capacity")
    check.that(
        num_groups * num_experts <= LARGEST,
        lambda: f"num_groups*num_experts={num_groups}*{num_experts} overflows int64",
    )


def permute(x_TD: Tensor, token_N: Tensor) -> None:
    """Arguments of ``permute``."""
    check = Check("permute", x_TD.device)
    check.tensor(x_TD, "x", FLOATING, (None, None))
    check.tensor(token_N, "token", (torch.int64,), (None,))


def combine(rows_ND: Tensor, weight_N: Tensor | None, token_N: Tensor, num_tokens: int) -> None:
    """Arguments of ``combine``."""
    check = Check("combine", rows_ND.device)
    check.tensor(rows_ND, "rows", FLOATING, (None, None))
    check.tensor(token_N, "token", (torch.int64,), (rows_ND.shape[0],))
    if weight_N is not None:
        check.tensor(weight_N, "weight", FLOATING, (rows_ND.shape[0],))
    check.at_least(0, num_tokens, "num_tokens")


def combine_backward(d_y_TD: Tensor, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor) -> None:
    """Arguments of ``combine_backward``."""
    check = Check("combine_backward", rows_ND.device)
    check.tensor(rows_ND, "rows", FLOATING, (None, None))
    check.tensor(d_y_TD, "d_y", (rows_ND.dtype,), (None, rows_ND.shape[1]))
    check.tensor(weight_N, "weight", FLOATING, (rows_ND.shape[0],))
    check.tensor(token_N, "token", (torch.int64,), (rows_ND.shape[0],))


def _activation(check: Check, hidden_RX: Tensor, weight_R: Tensor | None, kind: str) -> int:
    """What both operators are given -> the number of activated columns."""
    check.tensor(hidden_RX, "hidden", FLOATING, (None, None))
    num_rows, columns = hidden_RX.shape
    if weight_R is not None:
        check.tensor(weight_R, "weight", FLOATING, (num_rows,))
    check.that(kind in ACTIVATIONS, lambda: f"kind='{kind}' must be one of {', '.join(ACTIVATIONS)}")
    if kind != "swiglu":
        return columns
    check.that(
        columns % 2 == 0,
        lambda: f"hidden has {columns} columns, but swiglu needs pairs of gate and up columns",
    )
    return columns // 2


def activate(hidden_RX: Tensor, weight_R: Tensor | None, kind: str) -> None:
    """Arguments of ``activate``."""
    _activation(Check("activate", hidden_RX.device), hidden_RX, weight_R, kind)


def activate_backward(d_act_RF: Tensor, hidden_RX: Tensor, weight_R: Tensor | None, kind: str) -> None:
    """Arguments of ``activate_backward``."""
    check = Check("activate_backward", hidden_RX.device)
    width = _activation(check, hidden_RX, weight_R, kind)
    check.tensor(d_act_RF, "d_act", (hidden_RX.dtype,), (hidden_RX.shape[0], width))


def _expert_ffn(
    check: Check,
    rows_RD: Tensor,
    weight_R: Tensor | None,
    w_in_LDX: Tensor,
    w_out_LFD: Tensor,
    tokens_per_expert_L: Tensor,
    rows_per_expert: int | None,
    activation: str,
) -> None:
    """What both operators are given."""
    check.tensor(rows_RD, "rows", FLOATING, (None, None))
    num_rows = rows_RD.shape[0]
    if weight_R is not None:
        check.tensor(weight_R, "weight", FLOATING, (num_rows,))
    check.that(
        activation in ACTIVATIONS,
        lambda: f"activation='{activation}' must be one of {', '.join(ACTIVATIONS)}",
    )
    check.tensor(w_in_LDX, "w_in", (rows_RD.dtype,), (None, rows_RD.shape[1], None))
    (num_local, _, columns), pair = w_in_LDX.shape, 2 if activation == "swiglu" else 1
    check.that(
        columns % pair == 0,
        lambda: f"w_in has {columns} columns, but swiglu needs pairs of gate and up columns",
    )
    check.tensor(w_out_LFD, "w_out", (rows_RD.dtype,), (num_local, columns // pair, None))
    check.tensor(tokens_per_expert_L, "tokens_per_expert", (torch.int64,), (num_local,))
    if rows_per_expert is not None:
        check.that(
            rows_per_expert * num_local == num_rows,
            lambda: f"rows_per_expert={rows_per_expert} of {num_local} experts must be the {num_rows} rows",
        )


def expert_ffn(rows_RD: Tensor, *others: Any) -> None:
    """Arguments of ``expert_ffn``."""
    _expert_ffn(Check("expert_ffn", rows_RD.device), rows_RD, *others)


def expert_ffn_backward(
    d_y_RD: Tensor,
    rows_RD: Tensor,
    weight_R: Tensor | None,
    w_in_LDX: Tensor,
    w_out_LFD: Tensor,
    tokens_per_expert_L: Tensor,
    rows_per_expert: int | None,
    hidden_RX: Tensor,
    activation: str,
) -> None:
    """Arguments of ``expert_ffn_backward``; which gradients are needed can be anything."""
    check = Check("expert_ffn_backward", rows_RD.device)
    matrices = (w_in_LDX, w_out_LFD, tokens_per_expert_L, rows_per_expert)
    _expert_ffn(check, rows_RD, weight_R, *matrices, activation)
    num_rows = rows_RD.shape[0]
    check.tensor(hidden_RX, "hidden", (rows_RD.dtype,), (num_rows, w_in_LDX.shape[2]))
    check.tensor(d_y_RD, "d_y", (rows_RD.dtype,), (num_rows, w_out_LFD.shape[2]))


def blocks(op: str, tokens_per_expert_L: Tensor, num_rows: int) -> list[int]:
    """The counts on the host, none negative, all rows together: on CUDA this waits for the device."""
    counts: list[int] = tokens_per_expert_L.tolist()
    left = num_rows
    for expert, count in enumerate(counts):
        if not 0 <= count <= left:
            name = f"tokens_per_expert[{expert}]={count}"
            raise ValueError(f"{op}: {name} must be in [0, {left}], the rows that are left")
        left -= count
    if left:
        raise ValueError(f"{op}: tokens_per_expert must add up to the {num_rows} rows, got {num_rows - left}")
    return counts
