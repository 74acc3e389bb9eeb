"""What the rows are sent for: stacked feed-forward experts, or any list of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn

from epmoe.moe.expert_dropout import HiddenDropout, expert_of_rows
from epmoe.ops import activate, expert_ffn
from epmoe.types import ExpertBatch

Compute = Callable[[ExpertBatch], Tensor]


def reset_modules(parent: nn.Module) -> None:
    """``reset_parameters`` of the modules below one, down to where a module has it.

    Raises:
        ValueError: One with tensors does not.
    """
    for name, child in parent.named_children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        elif [*child.parameters(recurse=False), *child.buffers(recurse=False)]:
            raise ValueError(f"{name} is a {type(child).__name__} with tensors and without reset_parameters")
        else:
            reset_modules(child)


class FFNExperts(nn.Module):
    """Two-layer feed-forward experts without biases, their weights stacked.

    Args:
        num_experts: Experts over all ranks, E. The module starts with all of them; ``keep`` leaves this rank's.
        d_model: Width of rows, D.
        d_ff: Hidden width, F.
        activation: ``swiglu`` (w_in holds gate and up columns) | ``gelu`` | ``relu``.
    """

    draws = False
    """Whether a pass may take numbers from torch's generators."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str = "swiglu") -> None:
        super().__init__()
        width_in = 2 * d_ff if activation == "swiglu" else d_ff
        self.num_experts = num_experts
        self.first_expert = 0
        """Global id of local expert 0."""
        self.num_local = num_experts
        """Experts on this rank, L."""
        self.activation = activation
        self.dropout: HiddenDropout | None = None
        """For rows with labels, in training."""
        self.w_in = nn.Parameter(torch.empty(num_experts, d_model, width_in))
        self.w_out = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each matrix N(0, 1/fan_in). A model's own initialisation may overwrite it.

        The numbers of all experts are drawn, whichever are here: ranks with the same seed have different experts, and
        the same ones as a single process.
        """
        for weight_LXY in (self.w_in, self.w_out):
            drawn_XY = torch.empty_like(weight_LXY[0])
            for expert in range(self.num_experts):
                nn.init.normal_(drawn_XY, std=drawn_XY.shape[0] ** -0.5)
                if 0 <= expert - self.first_expert < self.num_local:
                    weight_LXY[expert - self.first_expert].copy_(drawn_XY)

    @torch.no_grad()
    def keep(self, first: int, count: int) -> None:
        """Leaves only experts ``first`` to ``first + count - 1`` on this rank.

        The parameters stay the objects that they are, with their gradients: what refers to them goes on to.
        """
        for weight in (self.w_in, self.w_out):
            if weight.shape[0] != count:  # else a layer that it is shared with has cut it already
                gradient, weight.grad = weight.grad, None
                weight.data = weight.data[first : first + count].clone()
                weight.grad = None if gradient is None else gradient[first : first + count].clone()
        self.first_expert, self.num_local = self.first_expert + first, count

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # which experts these are: the names are the same on every rank
            destination._metadata[prefix[:-1]]["experts"] = (self.first_expert, self.num_local)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        first, count = local_metadata.get("experts", (self.first_expert, self.num_local))
        if (first, count) == (self.first_expert, self.num_local):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )
            return
        errors.append(
            f"{prefix}* holds experts {first} to {first + count - 1} of {self.num_experts}, and this rank has "
            f"{self.first_expert} to {self.first_expert + self.num_local - 1}; load the file that this rank wrote, or "
            f"load all experts before shard_experts"
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(layer)``."""
        held = (
            f"{self.first_expert} to {self.first_expert + self.num_local - 1} of {self.num_experts} experts"
        )
        return f"{held}, D={self.w_in.shape[1]}, F={self.w_out.shape[1]}, {self.activation}"

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Each row through its expert, times its weight if it has one -> ``[R, D]``."""
        return self._compute(batch, self.w_in, self.w_out, self.first_expert)

    def in_parts(self, sizes: Sequence[int], run: Callable[[list[Compute]], Tensor]) -> Tensor:
        """``run`` of a function for every so many experts, consecutive ones, in one forward pass of the module."""
        # Split once: slices would each have a gradient of the whole size.
        firsts = accumulate(sizes, initial=self.first_expert)
        parts = zip(self.w_in.split(list(sizes)), self.w_out.split(list(sizes)), firsts, strict=False)
        return run([partial(self._compute, w_in_LDX=a, w_out_LFD=b, first=e) for a, b, e in parts])

    @property
    def wants_labels(self) -> bool:
        """Whether rows are to say whose they are (``epmoe.moe.expert_dropout``)."""
        return self.training and self.dropout is not None

    def _compute(self, batch: ExpertBatch, w_in_LDX: Tensor, w_out_LFD: Tensor, first: int) -> Tensor:
        if self.training and self.dropout is not None:
            return self._with_dropout(batch, w_in_LDX, w_out_LFD, expert_of_rows(batch, first), self.dropout)
        y_RD, _ = expert_ffn(
            batch.rows_RD,
            batch.weight_R,
            w_in_LDX,
            w_out_LFD,
            batch.tokens_per_expert_L,
            batch.rows_per_expert,
            self.activation,
        )
        return y_RD

    def _with_dropout(
        self,
        batch: ExpertBatch,
        w_in_LDX: Tensor,
        w_out_LFD: Tensor,
        expert_R: Tensor,
        dropout: HiddenDropout,
    ) -> Tensor:
        """The two products one by one, since the fused operator keeps every unit."""
        rows_RD, label_RX = batch.rows_RD.tensor_split([w_in_LDX.shape[1]], dim=1)
        act_RF = activate(_multiply(batch, rows_RD, w_in_LDX), batch.weight_R, self.activation)
        return _multiply(batch, dropout(act_RF, label_RX, expert_R), w_out_LFD)


def _multiply(batch: ExpertBatch, rows_RX: Tensor, weight_LXY: Tensor) -> Tensor:
    """Each row times its expert's matrix."""
    if batch.rows_per_expert is not None:
        return torch.bmm(
            rows_RX.unflatten(0, (weight_LXY.shape[0], batch.rows_per_expert)), weight_LXY
        ).flatten(0, 1)
    blocks = rows_RX.split(batch.tokens_per_expert_L.tolist())  # a host sync on CUDA
    return torch.cat(
        [rows_nX @ weight_XY for rows_nX, weight_XY in zip(blocks, weight_LXY.unbind(), strict=True)]
    )


class ModuleExperts(nn.Module):
    """Any modules that map rows ``[n, D]`` to rows as experts.

    They may draw random numbers (dropout), also where their activations are recomputed. With batch statistics they are
    refused in padded dispatch, whose blocks hold rows of zeros.

    Args:
        modules: Experts of this rank, in ascending global order.
        num_experts: Experts over all ranks, E; None = these are all.
        first_expert: Global id of ``modules[0]``. Parameter names carry global ids.
        d_out: Width of the rows that come out; None = D.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        *,
        num_experts: int | None = None,
        first_expert: int = 0,
        d_out: int | None = None,
    ) -> None:
        super().__init__()
        modules = list(modules)
        self.d_out = d_out
        self.num_experts = num_experts or len(modules)
        self.first_expert = first_expert
        self.experts = nn.ModuleDict({str(first_expert + i): module for i, module in enumerate(modules)})

    @property
    def num_local(self) -> int:
        """Experts on this rank, L."""
        return len(self.experts)

    def reset_parameters(self) -> None:
        """Every module's own, each from a seed that depends on torch's generator and the expert's global id: ranks with
        the same seed have different experts, and the same ones as a single process.

        Raises:
            ValueError: A module has tensors and no ``reset_parameters``.
        """
        seed = int(torch.randint(2**62, (), device="cpu"))
        for number, module in self.experts.items():
            with torch.random.fork_rng():
                torch.manual_seed(seed + int(number))
                reset_modules(nn.ModuleDict({number: module}))

    def forward(self, batch: ExpertBatch) -> Tensor:
        """Each block of rows through its module, times the rows' weights if they have some -> ``[R, d_out]``."""
        return _through_modules(batch, self.experts.values(), self.d_out)

    def in_parts(self, sizes: Sequence[int], run: Callable[[list[Compute]], Tensor]) -> Tensor:
        """As of ``FFNExperts``."""
        modules = iter(self.experts.values())
        parts = [[*islice(modules, count)] for count in sizes]
        return run([partial(_through_modules, modules=part, d_out=self.d_out) for part in parts])


def _through_modules(batch: ExpertBatch, modules: Iterable[nn.Module], d_out: int | None) -> Tensor:
    if batch.rows_per_expert is None:
        blocks = batch.rows_RD.split(batch.tokens_per_expert_L.tolist())  # a host sync on CUDA
    else:
        blocks = batch.rows_RD.split([batch.rows_per_expert] * batch.tokens_per_expert_L.shape[0])
    width = d_out or batch.rows_RD.shape[1]
    outputs = [
        module(block) if block.shape[0] else _touch(module, block[:, :1].expand(-1, width))
        for module, block in zip(modules, blocks, strict=True)
    ]
    # One dtype whatever autocast made of each block: ranks that exchange the rows must agree on it.
    rows_RD = torch.cat([rows_nD.to(batch.rows_RD.dtype) for rows_nD in outputs])
    if batch.weight_R is None:
        return rows_RD
    return (rows_RD * batch.weight_R.unsqueeze(1)).to(rows_RD.dtype)


def _touch(module: nn.Module, empty_rows_RD: Tensor) -> Tensor:
    """Passes no rows, but connects the parameters, so that their gradients are zero and not None."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            empty_rows_RD = empty_rows_RD + parameter.reshape(-1)[:0].sum().to(empty_rows_RD.dtype)
    return empty_rows_RD
