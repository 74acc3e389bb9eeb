"""Registers the operators with PyTorch: schema, reference kernel, fake kernel, autograd and autocast rules.

The reference is registered as ``CompositeExplicitAutograd``; a native kernel registered for a device takes precedence
there, chosen by PyTorch's own dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epmoe.ops import checks, ffn, native, reference
from epmoe.ops.calls import ops
from epmoe.types import compute_dtype

_LIBRARY = torch.library.Library("epmoe", "DEF")

_SCHEMAS = {
    "route_topk": "(Tensor logits, Tensor valid, Tensor? uniform, Tensor? sample, Tensor? position, int top_k, "
    "bool normalize, str second_policy, float tau, int seed, int layer) -> (Tensor, Tensor, Tensor, Tensor)",
    "route_topk_backward": "(Tensor d_probs, Tensor d_weights, Tensor probs, Tensor topk_ids, "
    "Tensor active, bool normalize) -> Tensor",
    "assign_slots": "(Tensor expert, Tensor group, Tensor active, SymInt num_groups, int num_experts, "
    "SymInt capacity) -> (Tensor, Tensor)",
    "permute": "(Tensor x, Tensor token) -> Tensor",
    "uniform": "(Tensor sample, Tensor position, int seed, int stream, int layer, SymInt num_lanes, int first_lane) "
    "-> Tensor",
    "combine": "(Tensor rows, Tensor? weight, Tensor token, SymInt num_tokens) -> Tensor",
    "combine_backward": "(Tensor d_y, Tensor rows, Tensor weight, Tensor token) -> (Tensor, Tensor)",
    "activate": "(Tensor hidden, Tensor? weight, str kind) -> Tensor",
    "activate_backward": "(Tensor d_act, Tensor hidden, Tensor? weight, str kind) -> (Tensor, Tensor, Tensor)",
    "expert_ffn": "(Tensor rows, Tensor? weight, Tensor w_in, Tensor w_out, Tensor tokens_per_expert, "
    "SymInt? rows_per_expert, str activation) -> (Tensor, Tensor)",
    "expert_ffn_backward": "(Tensor d_y, Tensor rows, Tensor? weight, Tensor w_in, Tensor w_out, "
    "Tensor tokens_per_expert, SymInt? rows_per_expert, Tensor hidden, str activation, bool needs_rows, "
    "bool needs_w_in, bool needs_w_out) -> (Tensor, Tensor, Tensor, Tensor)",
}

for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _plain = getattr(ffn if _name.startswith("expert_ffn") else reference, _name)
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")

_STATUS = native.load_kernels()


def kernel_status() -> tuple[str, str]:
    """Which kernels serve the operators, and why -> (name, reason)."""
    return _STATUS


# ------------------------------------------------------------------------------------- fake kernels
@torch.library.register_fake("epmoe::route_topk", lib=_LIBRARY)
def _(logits: Tensor, valid: Tensor, uniform: Any, sample: Any, position: Any, top_k: int, *rest: Any) -> Any:
    _, second_policy, tau, _, layer = rest
    checks.route_topk(logits, valid, uniform, sample, position, top_k, second_policy, tau, layer)
    shape_TK = (logits.shape[0], top_k)
    return (
        logits.new_empty(logits.shape),
        logits.new_empty(shape_TK, dtype=torch.int64),
        logits.new_empty(shape_TK),
        logits.new_empty(shape_TK, dtype=torch.bool),
    )


@torch.library.register_fake("epmoe::route_topk_backward", lib=_LIBRARY)
def _(d_probs: Tensor, *rest: Any) -> Tensor:
    checks.route_topk_backward(d_probs, *rest[:-1])
    return d_probs.new_empty(d_probs.shape)


@torch.library.register_fake("epmoe::assign_slots", lib=_LIBRARY)
def _(expert: Tensor, group: Tensor, active: Tensor, num_groups: int, num_experts: int, capacity: int) -> Any:
    checks.assign_slots(expert, group, active, num_groups, num_experts, capacity)
    return expert.new_empty(expert.shape), expert.new_empty(num_groups, num_experts)


@torch.library.register_fake("epmoe::permute", lib=_LIBRARY)
def _(x: Tensor, token: Tensor) -> Tensor:
    checks.permute(x, token)
    return x.new_empty(token.shape[0], x.shape[1])


@torch.library.register_fake("epmoe::uniform", lib=_LIBRARY)
def _(
    sample: Tensor, position: Tensor, seed: int, stream: int, layer: int, num_lanes: int, first: int
) -> Tensor:
    checks.uniform(sample, position, stream, layer, num_lanes, first)
    return sample.new_empty((sample.shape[0], num_lanes), dtype=torch.float32)


@torch.library.register_fake("epmoe::combine", lib=_LIBRARY)
def _(rows: Tensor, weight: Tensor | None, token: Tensor, num_tokens: int) -> Tensor:
    checks.combine(rows, weight, token, num_tokens)
    return rows.new_empty(num_tokens, rows.shape[1])


@torch.library.register_fake("epmoe::combine_backward", lib=_LIBRARY)
def _(d_y: Tensor, rows: Tensor, weight: Tensor, token: Tensor) -> Any:
    checks.combine_backward(d_y, rows, weight, token)
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


@torch.library.register_fake("epmoe::activate", lib=_LIBRARY)
def _(hidden: Tensor, weight: Tensor | None, kind: str) -> Tensor:
    checks.activate(hidden, weight, kind)
    return hidden.new_empty(hidden.shape[0], hidden.shape[1] // (2 if kind == "swiglu" else 1))


@torch.library.register_fake("epmoe::activate_backward", lib=_LIBRARY)
def _(d_act: Tensor, hidden: Tensor, weight: Tensor | None, kind: str) -> Any:
    checks.activate_backward(d_act, hidden, weight, kind)
    d_weight = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))
    return hidden.new_empty(hidden.shape), hidden.new_empty(d_act.shape), d_weight


@torch.library.register_fake("epmoe::expert_ffn", lib=_LIBRARY)
def _(rows: Tensor, weight: Any, w_in: Tensor, w_out: Tensor, *others: Any) -> Any:
    checks.expert_ffn(rows, weight, w_in, w_out, *others)
    return rows.new_empty(rows.shape[0], w_out.shape[2]), rows.new_empty(rows.shape[0], w_in.shape[2])


@torch.library.register_fake("epmoe::expert_ffn_backward", lib=_LIBRARY)
def _(d_y: Tensor, rows: Tensor, weight: Any, w_in: Tensor, w_out: Tensor, *rest: Any) -> Any:
    *others, needs_rows, needs_w_in, needs_w_out = rest
    checks.expert_ffn_backward(d_y, rows, weight, w_in, w_out, *others)
    compute = compute_dtype(rows.dtype)
    return (
        rows.new_empty(rows.shape if needs_rows else 0),
        rows.new_empty(0, dtype=compute) if weight is None else weight.new_empty(weight.shape),
        rows.new_empty(w_in.shape if needs_w_in else 0),
        rows.new_empty(w_out.shape if needs_w_out else 0),
    )


# ------------------------------------------------------------------------------------------ autograd
def _save_route_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    probs_TE, ids_TK, _, active_TK = output
    ctx.save_for_backward(probs_TE, ids_TK, active_TK)
    ctx.normalize = inputs[6]
    ctx.mark_non_differentiable(ids_TK, active_TK)
    ctx.set_materialize_grads(True)


def _route_topk_backward(ctx: Any, d_probs: Tensor, _: Any, d_weights: Tensor, __: Any) -> tuple[Any, ...]:
    d_logits = ops.route_topk_backward(d_probs, d_weights, *ctx.saved_tensors, ctx.normalize)
    return (d_logits, *[None] * 10)


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.num_tokens = inputs[0].shape[0]


def _permute_backward(ctx: Any, d_rows: Tensor) -> tuple[Any, ...]:
    return ops.combine(d_rows, None, ctx.saved_tensors[0], ctx.num_tokens), None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, token, _ = inputs
    ctx.save_for_backward(*((token,) if weight is None else (token, rows, weight)))


def _combine_backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
    token, *rest = ctx.saved_tensors
    if not rest:
        return ops.permute(d_y, token), None, None, None
    d_rows, d_weight = ops.combine_backward(d_y, *rest, token)
    return d_rows, d_weight, None, None


def _save_activate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, ctx.kind = inputs
    ctx.save_for_backward(hidden, weight)


def _activate_backward(ctx: Any, d_act: Tensor) -> tuple[Any, ...]:
    hidden, weight = ctx.saved_tensors
    d_hidden, _, d_weight = ops.activate_backward(d_act.contiguous(), hidden, weight, ctx.kind)
    return d_hidden, None if weight is None else d_weight.to(weight.dtype), None


def _save_expert_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.rows_per_expert, ctx.activation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made as the pre-activation's gradient


def _expert_ffn_backward(ctx: Any, d_y: Tensor | None, _: Any) -> tuple[Any, ...]:
    if d_y is None:  # what came after has no gradient, and zeros are not made here
        return (None,) * 7
    *tensors, hidden = ctx.saved_tensors
    needs_rows, needs_weight, *needs_matrices = ctx.needs_input_grad[:4]
    gradients = ops.expert_ffn_backward(
        d_y, *tensors, ctx.rows_per_expert, hidden, ctx.activation, needs_rows, *needs_matrices
    )
    needed = (needs_rows, needs_weight, *needs_matrices)
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None)


for _name, _backward, _save in (
    ("route_topk", _route_topk_backward, _save_route_topk),
    ("permute", _permute_backward, _save_permute),
    ("combine", _combine_backward, _save_combine),
    ("activate", _activate_backward, _save_activate),
    ("expert_ffn", _expert_ffn_backward, _save_expert_ffn),
):
    torch.library.register_autograd(f"epmoe::{_name}", _backward, setup_context=_save, lib=_LIBRARY)


def _refuse_second_derivatives(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "route_topk, weighted combine, activate and expert_ffn have first derivatives only: their backward kernels "
        "cannot be differentiated (create_graph=True)"
    )


# Without a rule PyTorch would only warn, and take the derivative for zero.
for _name in ("route_topk_backward", "combine_backward", "activate_backward", "expert_ffn_backward"):
    torch.library.register_autograd(f"epmoe::{_name}", _refuse_second_derivatives, lib=_LIBRARY)


# ------------------------------------------------------------------------------------------ autocast
def _autocast(device_type: str) -> None:
    """Under autocast the expert GEMMs run in the autocast dtype, like ``torch.mm``; nothing else is cast."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type]
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(rows: Tensor, weight: Tensor | None, w_in: Tensor, w_out: Tensor, *others: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            if rows.dtype != torch.float64:
                wanted = torch.get_autocast_dtype(device_type)
                rows, w_in, w_out = rows.to(wanted), w_in.to(wanted), w_out.to(wanted)
            return ops.expert_ffn(rows, weight, w_in, w_out, *others)

    _LIBRARY.impl("expert_ffn", cast, key)


for _device_type in ("cpu", "cuda"):
    _autocast(_device_type)
