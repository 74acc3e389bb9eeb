"""Contenders of the layer benchmark with the same weights: the bound, epmoe's layer, and two in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from epmoe import MoEConfig, build_moe_layer
from epmoe.moe.layer import MoELayer


def swiglu(hidden_RX: Tensor) -> Tensor:
    """silu(first half of the columns) * second half, in plain PyTorch."""
    gate_RF, up_RF = hidden_RX.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "gelu": F.gelu}

SEQ_LEN = 256
BALANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One row of the benchmark; letters as in ``epmoe.types``."""

    num_tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    activation: str
    dtype: torch.dtype

    @property
    def width_in(self) -> int:
        """Columns of the first expert matrix."""
        return 2 * self.d_ff if self.activation == "swiglu" else self.d_ff

    def name(self) -> str:
        """``E=8 swiglu`` and the sizes."""
        return (
            f"E={self.num_experts} {self.activation}, T={self.num_tokens} D={self.d_model} F={self.d_ff} "
            f"K={self.top_k}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What all contenders share: tokens, the gradient that comes back, and the weights."""

    x_TD: Tensor
    d_y_TD: Tensor
    router_ED: Tensor
    w_in_EDX: Tensor
    w_out_EFD: Tensor


def make_weights(shape: LayerShape, device: torch.device) -> Weights:
    """Random and nowhere zero; the router's logits have standard deviation 1, so that loads are uneven but sane."""

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(sizes, device=device) * std).to(shape.dtype)

    T, D, E, F_ = shape.num_tokens, shape.d_model, shape.num_experts, shape.d_ff
    return Weights(
        x_TD=normal(T, D),
        d_y_TD=normal(T, D),
        router_ED=normal(E, D, std=D**-0.5),
        w_in_EDX=normal(E, D, shape.width_in, std=D**-0.5),
        w_out_EFD=normal(E, F_, D, std=F_**-0.5),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One implementation with its inputs."""

    name: str
    x: Tensor
    """Input, a leaf that wants a gradient."""
    d_y: Tensor
    """Gradient of the output."""
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """x -> y and an auxiliary loss (or None), both differentiated in a step."""
    parameters: Sequence[Tensor]
    gradients: Callable[[], dict[str, Tensor]]
    """After a backward: gradients of the weights in the layout of ``Weights``."""
    drops: bool = False
    """Leaves assignments out, so that it is not the same function."""

    def reset(self) -> None:
        """Drops all gradients, so that the next backward allocates them."""
        for tensor in (self.x, *self.parameters):
            tensor.grad = None

    def backward(self, outputs: tuple[Tensor, Tensor | None]) -> None:
        """Gradients of the output and, where there is one, of the auxiliary loss."""
        y, loss = outputs
        if loss is None:
            torch.autograd.backward((y,), (self.d_y,))
        else:
            torch.autograd.backward((y, loss), (self.d_y, torch.ones_like(loss)))

    def step_from_reset(self) -> None:
        """Forward and backward, right after ``reset``."""
        self.backward(self.forward(self.x))

    def step(self) -> None:
        """Forward and backward from no gradients."""
        self.reset()
        self.step_from_reset()


def grad(parameter: Tensor) -> Tensor:
    """The gradient of a weight, which every contender must have left."""
    if parameter.grad is None:
        raise RuntimeError("a contender left a weight without a gradient")
    return parameter.grad


def leaf(tensor: Tensor) -> Tensor:
    """The same memory as a leaf of its own that wants a gradient."""
    return tensor.detach().requires_grad_()


# --------------------------------------------------------------------------------------------- the bound
class BalancedExperts(torch.autograd.Function):
    """The denominator: every expert gets the same number of rows, already packed; two ``bmm`` forward, four backward,
    the activation between them, no routing and no row moves. Weight gradients are new tensors."""

    @staticmethod
    def forward(ctx: Any, rows_ECD: Tensor, w_in_EDX: Tensor, w_out_EFD: Tensor, activation: str) -> Tensor:
        """Rows through their experts -> ``[E, C, D]``."""
        hidden_ECX = torch.bmm(rows_ECD, w_in_EDX)
        if activation == "swiglu":
            gate_ECF, up_ECF = hidden_ECX.chunk(2, dim=-1)
            active_ECF = F.silu(gate_ECF).mul_(up_ECF)
        else:
            active_ECF = ACTIVATIONS[activation](hidden_ECX)
        ctx.save_for_backward(rows_ECD, w_in_EDX, w_out_EFD, hidden_ECX, active_ECF)
        ctx.activation = activation
        return torch.bmm(active_ECF, w_out_EFD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_ECD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of the rows and of both weights."""
        rows_ECD, w_in_EDX, w_out_EFD, hidden_ECX, active_ECF = ctx.saved_tensors
        d_w_out_EFD = torch.bmm(active_ECF.transpose(1, 2), d_out_ECD)
        d_active_ECF = torch.bmm(d_out_ECD, w_out_EFD.transpose(1, 2))
        d_hidden_ECX = _activation_backward(d_active_ECF, hidden_ECX, ctx.activation)
        d_w_in_EDX = torch.bmm(rows_ECD.transpose(1, 2), d_hidden_ECX)
        return torch.bmm(d_hidden_ECX, w_in_EDX.transpose(1, 2)), d_w_in_EDX, d_w_out_EFD, None


def _activation_backward(d_active_ECF: Tensor, hidden_ECX: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        d_hidden_ECX: Tensor = torch.ops.aten.gelu_backward(d_active_ECF, hidden_ECX)
        return d_hidden_ECX
    if activation != "swiglu":
        raise ValueError(f"the denominator knows swiglu and gelu, got {activation!r}")
    gate_ECF, up_ECF = hidden_ECX.chunk(2, dim=-1)
    d_hidden_ECX = torch.empty_like(hidden_ECX)  # both halves are written in place, nothing is concatenated
    d_gate_ECF, d_up_ECF = d_hidden_ECX.chunk(2, dim=-1)
    torch.mul(d_active_ECF, F.silu(gate_ECF), out=d_up_ECF)
    torch.ops.aten.silu_backward.grad_input(d_active_ECF.mul_(up_ECF), gate_ECF, grad_input=d_gate_ECF)
    return d_hidden_ECX


def bound(shape: LayerShape, weights: Weights) -> Contender:
    """The denominator as a contender: T*K rows, which are x repeated, in E equal blocks."""
    num_rows = shape.num_tokens * shape.top_k
    if num_rows % shape.num_experts:
        raise ValueError(f"T*K={num_rows} rows cannot be spread evenly over E={shape.num_experts} experts")
    w_in, w_out = leaf(weights.w_in_EDX), leaf(weights.w_out_EFD)
    packed = (shape.num_experts, num_rows // shape.num_experts, shape.d_model)
    return Contender(
        name="bound",
        x=leaf(weights.x_TD.repeat(shape.top_k, 1).view(packed)),
        d_y=weights.d_y_TD.repeat(shape.top_k, 1).view(packed),
        forward=lambda rows_ECD: (BalancedExperts.apply(rows_ECD, w_in, w_out, shape.activation), None),
        parameters=(w_in, w_out),
        gradients=lambda: {"w_in": grad(w_in), "w_out": grad(w_out)},
    )


# ------------------------------------------------------------------------------------------------- epmoe
def epmoe_layer(shape: LayerShape, weights: Weights) -> tuple[Contender, MoELayer]:
    """epmoe's layer, dropless, with its balance loss; and the module, for a look at its parts."""
    moe = MoEConfig.model_validate(
        {
            "num_experts": shape.num_experts,
            "router": "topk",
            "top_k": shape.top_k,
            "activation": shape.activation,
            "capacity_factor": None,
            "losses": {"balance": BALANCE},
        }
    )
    with torch.device("meta"):  # every parameter is replaced
        layer = build_moe_layer(moe, d_model=shape.d_model, d_ff=shape.d_ff)
    experts: Any = layer.experts
    with torch.no_grad():
        layer.router.weight = nn.Parameter(weights.router_ED.clone())
        experts.w_in = nn.Parameter(weights.w_in_EDX.clone())
        experts.w_out = nn.Parameter(weights.w_out_EFD.clone())
    seq_len = min(SEQ_LEN, shape.num_tokens)

    def forward(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, report = layer(x_TD.view(-1, seq_len, shape.d_model))
        return y_BSD.flatten(0, 1), report.losses["balance"] * (BALANCE / shape.num_tokens)

    contender = Contender(
        name="epmoe",
        x=leaf(weights.x_TD),
        d_y=weights.d_y_TD,
        forward=forward,
        parameters=tuple(layer.parameters()),
        gradients=lambda: {
            "router": grad(layer.router.weight),
            "w_in": grad(experts.w_in),
            "w_out": grad(experts.w_out),
        },
    )
    return contender, layer


# ----------------------------------------------------------------------------------------- plain PyTorch
def route(x_TD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and ids of the K best experts; the weights are a softmax over the chosen logits."""
    logits_TE = F.linear(x_TD.float(), router_ED.float())
    chosen_TK, id_TK = logits_TE.topk(top_k, dim=-1)
    return chosen_TK.softmax(-1), id_TK


def _plain(
    name: str,
    shape: LayerShape,
    weights: Weights,
    forward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Contender:
    router, w_in, w_out = leaf(weights.router_ED), leaf(weights.w_in_EDX), leaf(weights.w_out_EFD)
    return Contender(
        name=name,
        x=leaf(weights.x_TD),
        d_y=weights.d_y_TD,
        forward=lambda x_TD: (forward(x_TD, router, w_in, w_out), None),
        parameters=(router, w_in, w_out),
        gradients=lambda: {"router": grad(router), "w_in": grad(w_in), "w_out": grad(w_out)},
    )


def mm_loop(shape: LayerShape, weights: Weights) -> Contender:
    """What one writes first: for every expert ``index_select``, two products, ``index_add``. The stacked weights are
    unbound once; indexing them expert by expert would make the backward pass add E tensors of all weights' size."""
    act = ACTIVATIONS[shape.activation]

    def forward(x_TD: Tensor, router_ED: Tensor, w_in_EDX: Tensor, w_out_EFD: Tensor) -> Tensor:
        weight_TK, id_TK = route(x_TD, router_ED, shape.top_k)
        y_TD = torch.zeros_like(x_TD)
        for expert, (w_in_DX, w_out_FD) in enumerate(
            zip(w_in_EDX.unbind(0), w_out_EFD.unbind(0), strict=True)
        ):
            token_R, choice_R = (id_TK == expert).nonzero(as_tuple=True)  # a host sync on CUDA
            rows_RD = act(x_TD.index_select(0, token_R) @ w_in_DX) @ w_out_FD
            weight_R = weight_TK[token_R, choice_R].to(rows_RD.dtype)
            y_TD = y_TD.index_add(0, token_R, rows_RD * weight_R.unsqueeze(1))
        return y_TD

    return _plain("index_add loop", shape, weights, forward)


def gshard_einsum(shape: LayerShape, weights: Weights) -> Contender:
    """GShard as published (arXiv:2006.16668, Algorithm 2): dense ``[T, E, C]`` masks and einsums over them, all
    tokens one group. The capacity is the largest load, so that nothing drops and the function is the same.

    Raises:
        MemoryError: The masks alone would take more than a quarter of the free memory.
    """
    act = ACTIVATIONS[shape.activation]
    with torch.no_grad():
        _, id_TK = route(weights.x_TD, weights.router_ED, shape.top_k)
    capacity = int(id_TK.flatten().bincount(minlength=shape.num_experts).max())
    require_memory(3 * 4 * shape.num_tokens * shape.num_experts * capacity, "[T, E, C] masks", weights)

    def forward(x_TD: Tensor, router_ED: Tensor, w_in_EDX: Tensor, w_out_EFD: Tensor) -> Tensor:
        weight_TK, id_TK = route(x_TD, router_ED, shape.top_k)
        mask_KTE = F.one_hot(id_TK.t(), shape.num_experts)
        slot_KTE = (
            mask_KTE.flatten(0, 1).cumsum(0).view_as(mask_KTE) - 1
        )  # all first choices, then all second ones
        slot_KT = (slot_KTE * mask_KTE).sum(-1)
        gate_KTE = weight_TK.t().unsqueeze(-1) * mask_KTE
        place_KTC = F.one_hot(slot_KT, capacity).to(gate_KTE.dtype)
        combine_TEC = torch.einsum("kte,ktc->tec", gate_KTE, place_KTC).to(x_TD.dtype)
        dispatch_TEC = (combine_TEC.detach() != 0).to(x_TD.dtype)
        rows_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
        rows_ECD = torch.bmm(act(torch.bmm(rows_ECD, w_in_EDX)), w_out_EFD)
        return torch.einsum("tec,ecd->td", combine_TEC, rows_ECD)

    return _plain("GShard einsum", shape, weights, forward)


def require_memory(num_bytes: int, what: str, weights: Weights) -> None:
    """Raises MemoryError when something would take more than a quarter of the free memory."""
    if weights.x_TD.is_cuda:
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if num_bytes > free // 4:
        raise MemoryError(
            f"{what} of {num_bytes / 2**30:.1f} GiB are more than a quarter of the free {free / 2**30:.1f} GiB"
        )
