"""Where a step spends its time, by named parts, and what it keeps in memory.

Time comes from torch.profiler. A label around a method of one object names the part of everything that happens inside;
the backward pass follows by the sequence numbers autograd gives to nodes, so nothing in the package has to know.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from epmoe.moe import dispatch
from epmoe.moe.layer import MoELayer

REST = "rest"
ROUTING, MOVES, EXCHANGE, GEMM, ACTIVATION, LOSSES = (
    "routing",
    "row moves",
    "exchange and waiting for it",
    "expert GEMM",
    "expert activation",
    "router losses and metrics",
)
_PREFIX = "part: "
_NODE = "autograd::engine::evaluate_function"
_OUTSIDE = ""
"""Of what has neither a label nor a node of the backward pass above it: no step."""
ANY = "*"

Label = tuple[object, str, str]
"""Object (or module), name of its method, part."""
Rules = Mapping[tuple[str, str], str]
"""(part or ANY, operator) -> a finer part for that operator and all it calls."""

_GEMMS = ("aten::mm", "aten::bmm", "aten::_grouped_mm")
"""Inside the experts' operator. Where threads share the experts out, the profiler sees those of the thread that called:
what it waits for the others counts as activation."""
_TRIPS = tuple(f"{name}{way}" for name in ("_Travel", "_Depart", "_Arrive") for way in ("", "Backward"))
"""Rows between ranks, forward and backward."""
MOE_RULES: Rules = {
    **{(ANY, f"epmoe::{name}"): MOVES for name in ("permute", "combine", "combine_backward")},
    **{(ACTIVATION, name): GEMM for name in _GEMMS},
    **{(ANY, name): EXCHANGE for name in _TRIPS},
}


def moe_labels(layer: MoELayer) -> list[Label]:
    """The parts of an MoE layer."""
    return [
        (layer.router, "forward", ROUTING),
        (layer.dispatcher, "apply", MOVES),
        (layer.dispatcher, "plan", ROUTING),
        (dispatch, "exchange_counts", EXCHANGE),
        (layer.experts, "forward", ACTIVATION),
        (layer, "report", LOSSES),
    ]


def part_times(
    step: Callable[[], object],
    labels: Sequence[Label],
    rules: Rules,
    *,
    repeats: int,
    device: torch.device,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Seconds per step in every part, median; what no label covers is ``rest``. On CUDA, time of the device's kernels.

    Args:
        prepare: Runs before every step and is not counted.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    prepare()
    step()
    with labelled(labels), _profile(activities=activities) as profiler:
        for _ in range(repeats):
            prepare()
            with record_function(_PREFIX + REST):
                step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    pairs = classified(profiler.events(), rules)
    begins = [event.time_range.start for event, _ in pairs if event.name == _PREFIX + REST]
    times = {part: [0.0] * repeats for _, part in pairs}
    for event, part in pairs:
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if number := bisect(begins, event.time_range.start):  # 0: of ``prepare``
            times[part][number - 1] += spent / 1e6
    return {part: statistics.median(seconds) for part, seconds in times.items()}


def _profile(**options: Any) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every start and stop is told on stderr
    return profile(**options)


@contextmanager
def labelled(labels: Sequence[Label]) -> Iterator[None]:
    """Names the parts of everything that happens inside these methods."""
    once = {(id(target), method): (target, method, part) for target, method, part in labels}
    own = [(target, method, vars(target).get(method)) for target, method, _ in once.values()]
    try:
        for target, method, part in once.values():
            setattr(target, method, _inside(getattr(target, method), part))
        yield
    finally:
        for target, method, before in own:
            if before is None:
                delattr(target, method)  # the class's own method shows again
            else:
                setattr(target, method, before)


def _inside(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def inside(*values: Any, **named: Any) -> Any:
        with record_function(_PREFIX + part):
            return function(*values, **named)

    return inside


def classified(events: Sequence[FunctionEvent], rules: Rules) -> list[tuple[FunctionEvent, str]]:
    """Every event on the host with its part, forward and backward; what lies outside the steps is left out."""
    own = [event for event in events if event.device_type == DeviceType.CPU]
    own.sort(key=lambda event: event.time_range.start)
    forward: dict[int, str] = {}
    for event in own:
        if event.sequence_nr >= 0 and not _in_backward(event):
            # Operators that make no node carry the number of the next node that is made: the last one counts.
            forward[event.sequence_nr] = _part(event, rules, {})
    pairs = [(event, _part(event, rules, forward)) for event in own]
    return [(event, part) for event, part in pairs if part != _OUTSIDE]


def _in_backward(event: FunctionEvent | None) -> bool:
    while event is not None:
        if event.name.startswith(_NODE):
            return True
        event = event.cpu_parent
    return False


def _part(event: FunctionEvent | None, rules: Rules, forward: Mapping[int, str]) -> str:
    part, names = _OUTSIDE, []
    while event is not None:
        if event.name.startswith(_PREFIX):
            part = event.name.removeprefix(_PREFIX)
            break
        if event.name.startswith(_NODE):
            part = forward.get(event.sequence_nr, REST)
            break
        names.append(event.name)
        event = event.cpu_parent
    for name in names:
        finer = rules.get((ANY, name)) or rules.get((part, name))
        if finer is not None:
            return finer
    return part


# ------------------------------------------------------------------------------------------------ memory
def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most tensor memory that a step holds at once beyond what was there before it; it must free nothing older."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], kept: Sequence[Tensor]) -> int:
    """Memory that autograd keeps between forward and backward; parameters and inputs (``kept``) are not counted."""
    storages: dict[int, Tensor] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in kept}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            storages[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del result  # until here: what it holds must not be freed and counted twice under one address
    return total
