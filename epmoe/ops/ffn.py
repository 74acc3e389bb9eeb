"""The two matrices of every expert and the activation between them, as one operator.

As one operator it saves for the backward pass only what it was given and the pre-activation: the activation itself
is computed again where its gradient is. With a weight per row, ``y = weight * act(rows @ w_in) @ w_out``, the
gradient of the weight is the product of the activation with its own gradient, so that the experts' results need not
be saved either (SonicMoE, arXiv:2512.14080: <dy W_out^T, a> = <dy, a W_out>).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epmoe.ops import checks
from epmoe.ops.gemm import multiply, multiply_weight_grad


def expert_ffn(
    rows_RD: Tensor,
    weight_R: Tensor | None,
    w_in_LDX: Tensor,
    w_out_LFD: Tensor,
    tokens_per_expert_L: Tensor,
    rows_per_expert: int | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Each row through its expert, times its weight (None = 1).

    Args:
        w_in_LDX: ``[L, D, 2F]`` (gate, then up columns) for ``swiglu``, else ``[L, D, F]``.
        tokens_per_expert_L: Consecutive rows of each expert; they add up to R.
        rows_per_expert: All experts have this many rows; then the counts are not looked at. None = they differ.
        activation: ``swiglu`` | ``gelu`` | ``relu``.

    Returns:
        y_RD, and the pre-activation hidden_RX that the backward pass needs.
    """
    checks.expert_ffn(
        rows_RD, weight_R, w_in_LDX, w_out_LFD, tokens_per_expert_L, rows_per_expert, activation
    )
    hidden_RX = multiply(rows_RD, w_in_LDX, tokens_per_expert_L, rows_per_expert)
    act_RF = torch.ops.epmoe.activate(hidden_RX, weight_R, activation)
    return multiply(act_RF, w_out_LFD, tokens_per_expert_L, rows_per_expert), hidden_RX


def save_expert_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the backward pass needs: the inputs and the pre-activation."""
    *tensors, ctx.rows_per_expert, ctx.activation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made as the pre-activation's gradient


def expert_ffn_backward(ctx: Any, d_y_RD: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    """Gradients of rows, row weights and both stacks of matrices, as far as they are needed."""
    if d_y_RD is None:  # what came after has no gradient, and zeros are not made here
        return (None,) * 7
    rows_RD, weight_R, w_in_LDX, w_out_LFD, counts_L, hidden_RX = ctx.saved_tensors
    blocks = (counts_L, ctx.rows_per_expert)
    needs_rows, needs_weight, needs_w_in, needs_w_out = ctx.needs_input_grad[:4]
    d_y_RD = d_y_RD.contiguous()
    if d_y_RD.device.type == "cpu" and weight_R is None and all(ctx.needs_input_grad[i] for i in (0, 2, 3)):
        a, b, c = torch.ops.epmoe.expert_ffn_backward(d_y_RD, rows_RD, weight_R, w_in_LDX, w_out_LFD, counts_L, hidden_RX, ctx.activation)
        return a, None, b, c, None, None, None
    d_act_RF = multiply(d_y_RD, w_out_LFD.transpose(1, 2), *blocks)
    d_hidden_RX, act_RF, d_weight_R = torch.ops.epmoe.activate_backward(
        d_act_RF, hidden_RX, weight_R, ctx.activation
    )
    return (
        multiply(d_hidden_RX, w_in_LDX.transpose(1, 2), *blocks) if needs_rows else None,
        d_weight_R.to(weight_R.dtype) if needs_weight else None,
        multiply_weight_grad(rows_RD, d_hidden_RX, *blocks) if needs_w_in else None,
        multiply_weight_grad(act_RF, d_y_RD, *blocks) if needs_w_out else None,
        None,
        None,
        None,
    )
