"""The operators: pure tensor functions with reference kernels, autograd and autocast rules.

``route_topk``, ``assign_slots``, ``permute``, ``combine``, ``activate``: meaning in ``epmoe.ops.reference``;
``expert_ffn``: in ``epmoe.ops.ffn``; ``uniform``: in ``epmoe.ops.philox``.
"""

from collections.abc import Callable

from torch import Tensor

from epmoe.ops.calls import ops
from epmoe.ops.checks import ACTIVATIONS
from epmoe.ops.reference import DROPLESS, UNFILLED
from epmoe.ops.registration import kernel_status

route_topk: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = ops.route_topk
assign_slots: Callable[[Tensor, Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]] = ops.assign_slots
permute: Callable[[Tensor, Tensor], Tensor] = ops.permute
combine: Callable[[Tensor, Tensor | None, Tensor, int], Tensor] = ops.combine
activate: Callable[[Tensor, Tensor | None, str], Tensor] = ops.activate
expert_ffn: Callable[..., tuple[Tensor, Tensor]] = ops.expert_ffn

__all__ = [
    "ACTIVATIONS",
    "DROPLESS",
    "UNFILLED",
    "activate",
    "assign_slots",
    "combine",
    "expert_ffn",
    "kernel_status",
    "permute",
    "route_topk",
]
