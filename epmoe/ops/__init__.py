"""The operators: pure tensor functions with reference kernels, autograd and autocast rules.

``route_topk``, ``assign_slots``, ``permute``, ``combine``, ``grouped_gemm``: meaning in ``epmoe.ops.reference``.
"""

from collections.abc import Callable

from torch import Tensor

from epmoe.ops.reference import DROPLESS
from epmoe.ops.registration import kernel_status, ops

route_topk: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = ops.route_topk
assign_slots: Callable[[Tensor, Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]] = ops.assign_slots
permute: Callable[[Tensor, Tensor], Tensor] = ops.permute
combine: Callable[[Tensor, Tensor | None, Tensor, int], Tensor] = ops.combine
grouped_gemm: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.grouped_gemm

__all__ = [
    "DROPLESS",
    "assign_slots",
    "combine",
    "grouped_gemm",
    "kernel_status",
    "permute",
    "route_topk",
]
