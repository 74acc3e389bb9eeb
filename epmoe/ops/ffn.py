"""The two matrices of every expert and the activation between them, as one operator.

As one operator it saves for the backward pass only what it was given and the pre-activation: the activation itself
is computed again where its gradient is. With a weight per row, ``y = weight * act(rows @ w_in) @ w_out``, the
gradient of the weight is the product of the activation with its own gradient, so that the experts' results need not
be saved either (SonicMoE, arXiv:2512.14080: <dy W_out^T, a> = <dy, a W_out>).

Here it is made of other operators, for every device and dtype. On the CPU csrc/cpu/expert_ffn.cpp takes its place: the
threads share the experts out, and each goes from product to activation to product while its rows are in the cache.
"""

from __future__ import annotations

from torch import Tensor

from epmoe.ops import checks
from epmoe.ops.calls import ops
from epmoe.ops.gemm import multiply, multiply_weight_grad, split


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
    widths = (*w_in_LDX.shape[1:], *w_out_LFD.shape[1:])
    blocks = split("expert_ffn", rows_RD, tokens_per_expert_L, rows_per_expert, widths)
    hidden_RX = multiply(rows_RD, w_in_LDX, blocks)
    act_RF = ops.activate(hidden_RX, weight_R, activation)
    return multiply(act_RF, w_out_LFD, blocks), hidden_RX


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
    needs_rows: bool,
    needs_w_in: bool,
    needs_w_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``expert_ffn`` with respect to rows, row weights and both stacks of matrices.

    What is not needed is empty, ``[0]``, and not computed; so is the gradient of weights that are None.
    """
    matrices = (w_in_LDX, w_out_LFD, tokens_per_expert_L, rows_per_expert)
    checks.expert_ffn_backward(d_y_RD, rows_RD, weight_R, *matrices, hidden_RX, activation)
    d_y_RD, num_local = d_y_RD.contiguous(), w_in_LDX.shape[0]
    widths = (*w_in_LDX.shape[1:], *w_out_LFD.shape[1:])
    blocks = split("expert_ffn_backward", rows_RD, tokens_per_expert_L, rows_per_expert, widths)
    d_act_RF = multiply(d_y_RD, w_out_LFD.transpose(1, 2), blocks)
    d_hidden_RX, act_RF, d_weight_R = ops.activate_backward(d_act_RF, hidden_RX, weight_R, activation)
    none = rows_RD.new_empty
    return (
        multiply(d_hidden_RX, w_in_LDX.transpose(1, 2), blocks) if needs_rows else none(0),
        none(0, dtype=d_weight_R.dtype) if weight_R is None else d_weight_R.to(weight_R.dtype),
        multiply_weight_grad(rows_RD, d_hidden_RX, num_local, blocks) if needs_w_in else none(0),
        multiply_weight_grad(act_RF, d_y_RD, num_local, blocks) if needs_w_out else none(0),
    )
