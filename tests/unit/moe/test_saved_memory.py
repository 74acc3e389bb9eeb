"""What a layer keeps for the backward pass, counted byte by byte with saved-tensor hooks; and its largest tensors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epmoe.comm.exchange import flat
from epmoe.moe.build import DISPATCHERS
from epmoe.moe.experts import FFNExperts
from epmoe.types import Limits, TokenContext
from tests.unit.moe.helpers import config, make_layer

D, F, E, TOKENS = 64, 32, 4, 60
INDEX_BYTES = {"local": 2 * 8, "padded": 2 * 8, "all_to_all": 4 * 8}
"""Per row: the token and the assignment it is, and between ranks the two orders it travels in."""


class Saved:
    """Bytes of every storage that was saved once or more, without those that live anyway."""

    def __init__(self, *alive: torch.Tensor) -> None:
        self.alive = {t.untyped_storage().data_ptr() for t in alive}
        self.bytes: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []  # or a storage could be freed and its address used again

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.alive and storage.nbytes():
            self.bytes[storage.data_ptr()] = storage.nbytes()
            self.kept.append(tensor)
        return tensor

    def total(self) -> int:
        return sum(self.bytes.values())


def saved_bytes(name, save, activation, dtype, group) -> tuple[int, int]:
    """Saved by dispatch, experts and combine, and the rows that the experts get."""
    moe = config("top2", num_experts=E, capacity_factor=1.0, activation=activation)
    layer = make_layer(moe, d_model=D, d_ff=F).to(dtype)
    assert isinstance(layer.experts, FFNExperts)
    exchange = None if name in ("local", "padded") else flat(group)
    dispatcher = DISPATCHERS[name](exchange, weigh_rows=save == "hidden")
    x_TD = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    routing = layer.router(x_TD.unflatten(0, (-1, TOKENS)), TokenContext())
    saved = Saved(*layer.parameters(), x_TD)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        batch, plan = dispatcher.dispatch(
            x_TD, routing, Limits(num_experts=E, group_size=TOKENS, capacity=40)
        )
        y_TD = dispatcher.combine(layer.experts(batch), routing, plan)
    y_TD.sum().backward()
    rows = batch.rows_RD.shape[0]
    assert rows == (4 * 40 if name == "padded" else 2 * TOKENS), "nothing is dropped"
    return saved.total(), rows


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_row(name, activation, dtype, one_rank_group):
    """hidden: the row, its pre-activation, its weight in float32 and two (between ranks four) int64 numbers.

    output: one more row. Besides, one number per expert; no activation, no second copy of anything. (Each dropped
    assignment of a ragged plan would add 8 bytes: the plan's list is cut, not copied.)
    """
    size, width = dtype.itemsize, 2 * F if activation == "swiglu" else F
    numbers = 4 + INDEX_BYTES[name]
    for save, values in (("hidden", D + width), ("output", 2 * D + width)):
        total, rows = saved_bytes(name, save, activation, dtype, one_rank_group)
        per_row = values * size + numbers
        print(
            f"{name} {save} {activation} {dtype}, D={D} F={F}: {total / rows:.2f} bytes per row, wanted {per_row}"
        )
        assert per_row * rows <= total <= per_row * rows + 8 * (E + 1)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest memory that an operator returns a tensor of."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return results


def largest_bytes(dispatcher, save, num_tokens, num_experts) -> int:
    """In forward and backward of a layer whose every token takes two experts."""
    moe = config("top2", num_experts=num_experts, capacity_factor=1.0, dispatcher=dispatcher, save=save)
    layer = make_layer(moe, d_model=8, d_ff=16).float()
    x_BSD = torch.randn(1, num_tokens, 8, requires_grad=True)
    with LargestTensor() as largest:
        y_BSD, report = layer(x_BSD, TokenContext())
        (y_BSD.sum() + sum(report.losses.values())).backward()
    return largest.bytes


@pytest.mark.parametrize("save", ["output", "hidden"])
@pytest.mark.parametrize("dispatcher", ["local", "padded"])
def test_no_tensor_grows_with_more_than_the_tokens(dispatcher, save):
    """A tensor of tokens times experts times slots would be four times as large for twice the tokens, and of tokens
    times experts times a width twice as large for twice the experts."""
    tokens, experts = 1024, 8
    largest = largest_bytes(dispatcher, save, tokens, experts)
    hidden_bytes = tokens * 2 * 2 * 16 * 4  # K rows of gate and up inputs
    assert largest <= 1.3 * hidden_bytes
    assert largest_bytes(dispatcher, save, 2 * tokens, experts) <= 2.1 * largest
    assert largest_bytes(dispatcher, save, tokens, 2 * experts) <= 1.1 * largest
