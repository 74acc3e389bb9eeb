"""How often dispatch and combine make the host wait for the device: what would be a copy on CUDA is counted on CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from epmoe.comm.exchange import flat
from epmoe.moe.build import DISPATCHERS
from epmoe.moe.routers import common
from epmoe.types import Limits
from tests.unit.moe.helpers import config, context, make_layer, tokens

WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "equal", "allclose"}
WAITS |= {"__int__", "__float__", "__bool__", "__index__", "__contains__"}


class HostCopies(TorchFunctionMode):
    """Names of the calls whose result, or its shape, the host can only know from the device."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(common, "at_hand", lambda values: False)  # as on a device
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        repeats = [a for a in args[1:] if isinstance(a, Tensor)]
        by_mask = name in ("__getitem__", "__setitem__") and any(r.dtype == torch.bool for r in repeats)
        unknown_size = name == "repeat_interleave" and repeats and not (kwargs or {}).get("output_size")
        if name in WAITS or by_mask or unknown_size:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("name", DISPATCHERS)
def test_dispatch_makes_the_host_wait_at_most_once(name, factor, one_rank_group):
    layer = make_layer(config("gshard_random", num_experts=4, capacity_factor=factor))
    layer.dispatcher = DISPATCHERS[name](flat(one_rank_group), weigh_rows=False)
    x_BSD = tokens(2, 6)
    with HostCopies() as routed:
        routing = layer.router(x_BSD, context(x_BSD))
    assert routed.calls == []
    with HostCopies() as dispatched:
        batch, plan = layer.dispatcher.dispatch(
            x_BSD.flatten(0, 1),
            routing,
            Limits(num_experts=4, group_size=6, capacity=-1 if factor is None else 2),
        )
    static = name == "padded" and factor is not None
    assert len(dispatched.calls) == (0 if static else 1), dispatched.calls
    rows_RD = layer.experts(batch)
    with HostCopies() as combined:
        layer.dispatcher.combine(rows_RD, routing, plan)
        layer.report(routing, plan, 6)
    assert combined.calls == []


def test_the_counter_sees_what_waits():
    counts = torch.tensor([1, 2])
    with HostCopies() as copies:
        counts.tolist()
        int(counts.sum())
        counts.repeat_interleave(counts)
        counts[counts > 1]
        bool(counts.any())
        counts.repeat_interleave(counts, output_size=3)
        counts[counts - 1]
    assert len(copies.calls) == 5, copies.calls
