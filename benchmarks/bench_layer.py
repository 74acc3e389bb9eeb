"""Forward and backward of a mixture-of-experts layer against its bound and against other people's layers.

    python benchmarks/bench_layer.py [--experts 8 64 256] [--activation swiglu gelu] [--pairs 15]
    python benchmarks/bench_layer.py --sweep --experts 64 --peers     # one size at a time, ours and the bound alone
    pip install --no-build-isolation -e '.[bench]'      # the peers; without them the rest runs

The bound is one autograd function with a hand-written backward: balanced ``bmm`` over the same stacked weights, the
same activation, weight gradients newly allocated, rows already packed, no routing. All contenders have the same
weights, tokens and threads and are timed in turns in one process. Before that each one's output and gradients are
compared with epmoe's. The share of the bound is the bound's time over the contender's, median of the pairs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from common import (
    DTYPES,
    Spread,
    arguments_parser,
    paired,
    poisoned,
    progress,
    relative_difference,
    spread,
    start,
    table,
    where,
    write_results,
)
from layers import (
    Contender,
    LayerShape,
    Weights,
    bound,
    epmoe_layer,
    gshard_einsum,
    make_weights,
    mm_loop,
)
from parts import MOE_RULES, MOVES, ROUTING, moe_labels, part_times, peak_bytes, saved_bytes
from peers import PEERS
from plot import Bar, bar_chart, share_bar
from rich.progress import Progress
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference from epmoe's layer, relative to the largest value."""
REROUTED = {torch.float32: 0.0, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Share of tokens that may be sent elsewhere because a router rounds its logits."""
BUILDERS: dict[str, Callable[[LayerShape, Weights], Contender]] = {
    "index_add loop": mm_loop,
    "GShard einsum": gshard_einsum,
    **PEERS,
}


def shapes(arguments: Any, device: torch.device) -> list[LayerShape]:
    """The rows of the benchmark: those of the command line, or the device's own."""
    given = (arguments.tokens, arguments.d_model, arguments.d_ff)
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if arguments.quick:
        sizes = [(64, 16, 32, num_experts) for num_experts in arguments.experts or (4,)]
    elif device.type == "cuda" and arguments.experts is None and given == (None, None, None):
        sizes = [(16384, 2048, 1024, 64), (16384, 4096, 14336, 8)]
    else:
        T, D, F = (
            value or default
            for value, default in zip(
                given, (16384, 2048, 1024) if device.type == "cuda" else (2048, 256, 1024), strict=True
            )
        )
        sizes = [(T, D, F, num_experts) for num_experts in arguments.experts or (8, 64, 256)]
    rows = [
        LayerShape(
            num_tokens=T,
            d_model=D,
            d_ff=F,
            num_experts=E,
            top_k=arguments.top_k,
            activation=activation,
            dtype=dtype,
        )
        for T, D, F, E in sizes
        for activation in arguments.activation
    ]
    return (
        list(dict.fromkeys(other for shape in rows for other in around(shape))) if arguments.sweep else rows
    )


def around(shape: LayerShape) -> list[LayerShape]:
    """One size at a time smaller and larger; experts from 8 to 512, choices from 1 to 4."""
    sizes = {
        "num_experts": (8, shape.num_experts, 512),
        "num_tokens": (shape.num_tokens // 4, 4 * shape.num_tokens),
        "top_k": (1, 4),
        "d_model": (shape.d_model // 2, 2 * shape.d_model),
    }
    return [replace(shape, **{name: size}) for name, values in sizes.items() for size in values]


def build_contenders(
    shape: LayerShape, weights: Weights, wanted: Sequence[str]
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can take part, and why the others cannot."""
    contenders, missing = [], {}
    for name in wanted:
        try:
            contender = BUILDERS[name](shape, weights)
            contender.step()
            contenders.append(contender)
        except Exception as error:  # whatever a peer's import or first step raises is its entry in the table
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return contenders, missing


# ------------------------------------------------------------------------------------------- correctness
def outputs(contender: Contender) -> dict[str, Tensor]:
    """Output and gradients without the auxiliary loss, in the benchmark's layout."""
    contender.reset()
    with poisoned():
        y_TD, _ = contender.forward(contender.x)
        y_TD.backward(contender.d_y)
    assert contender.x.grad is not None
    result = {"y": y_TD.detach(), "x": contender.x.grad, **contender.gradients()}
    contender.reset()
    return result


def differences(contender: Contender, expected: dict[str, Tensor]) -> dict[str, Any]:
    """Largest relative difference of the output over the tokens that were routed alike, share of the other tokens,
    and, where there are none, of the gradients.

    Raises:
        RuntimeError: It is not the same function.
    """
    actual = outputs(contender)
    tolerance = TOLERANCE[expected["y"].dtype]
    scale = expected["y"].double().abs().max()
    worst_T = (actual["y"].double() - expected["y"].double()).abs().amax(-1) / scale
    elsewhere_T = ~(worst_T <= tolerance)
    found: dict[str, Any] = {
        "output": float(worst_T[~elsewhere_T].max()) if not elsewhere_T.all() else float("inf"),
        "tokens_elsewhere": float(elsewhere_T.double().mean()),
        "gradients": None,
    }
    limit = 0.5 if contender.drops else REROUTED[expected["y"].dtype]
    if not elsewhere_T.any():
        found["gradients"] = max(
            relative_difference(actual[name], value) for name, value in expected.items() if name != "y"
        )
    if found["tokens_elsewhere"] > limit or (found["gradients"] or 0.0) > 10 * tolerance:
        raise RuntimeError(f"{contender.name} does not compute the same function: {found}")
    return found


# ------------------------------------------------------------------------------------------------ timing
def timed_step(contender: Contender, device: torch.device) -> tuple[float, float]:
    """Seconds of the forward pass and of the whole step."""
    contender.reset()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        events[0].record()
        result = contender.forward(contender.x)
        events[1].record()
        contender.backward(result)
        events[2].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3, events[0].elapsed_time(events[2]) / 1e3
    begin = time.perf_counter()
    result = contender.forward(contender.x)
    middle = time.perf_counter()
    contender.backward(result)
    return middle - begin, time.perf_counter() - begin


def measure(
    contenders: Sequence[Contender], pairs: int, device: torch.device, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """A row per contender. The first one is the bound."""
    seconds: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for number in range(pairs + 2):
        for contender in contenders:
            spent = timed_step(contender, device)
            if number >= 2:  # the first ones warm up
                seconds[contender.name].append(spent)
            contender.reset()
        tick()
    base = [total for _, total in seconds[contenders[0].name]]
    rows = []
    for contender in contenders:
        total = [spent for _, spent in seconds[contender.name]]
        rows.append(
            {
                "contender": contender.name,
                "forward_s": spread([forward for forward, _ in seconds[contender.name]]),
                "step_s": spread(total),
                "share_of_bound": paired(base, total),
                "peak_bytes": peak_bytes(contender.step_from_reset, device),
            }
        )
        contender.reset()
        kept = [contender.x, *contender.parameters]
        rows[-1]["saved_bytes"] = saved_bytes(partial(contender.forward, contender.x), kept)
    return rows


def run_case(
    shape: LayerShape, wanted: Sequence[str], pairs: int, device: torch.device, bar: Progress
) -> dict[str, Any]:
    """Everything about one shape."""
    task = bar.add_task(shape.name(), total=pairs + 2)
    weights = make_weights(shape, device)
    ours, layer = epmoe_layer(shape, weights)
    others, missing = build_contenders(shape, weights, wanted)
    expected = outputs(ours)
    found: dict[str, Any] = {}
    for contender in list(others):
        try:
            found[contender.name] = differences(contender, expected)
        except RuntimeError as error:
            missing[contender.name] = str(error)
            others.remove(contender)
    del expected
    rows = measure(
        [bound(shape, weights), ours, *others], pairs, device, tick=lambda: bar.update(task, advance=1)
    )
    for row in rows:
        row["difference"] = found.get(row["contender"])
    times = part_times(
        ours.step_from_reset,
        moe_labels(layer),
        MOE_RULES,
        repeats=min(pairs, 15),
        device=device,
        prepare=ours.reset,
    )
    ours.reset()
    total = sum(times.values())  # 0 where the profiler may not look at the GPU
    with torch.no_grad():
        _, report = layer(ours.x.view(1, shape.num_tokens, shape.d_model))
    load_E = report.metrics.demand_E.double()
    return {
        "shape": asdict(shape),
        "max_over_mean_load": float(load_E.max() / load_E.mean()),
        "rows": rows,
        "parts": {n: seconds / total for n, seconds in sorted(times.items(), key=lambda p: -p[1]) if total},
        "unavailable": missing,
    }


# --------------------------------------------------------------------------------------------- reporting
def show(case: dict[str, Any], shape: LayerShape) -> None:
    """Prints one case."""
    print(f"\n### {shape.name()}, {str(shape.dtype).removeprefix('torch.')}, busiest expert ", end="")
    print(f"{case['max_over_mean_load']:.2f}x the mean\n")
    ours = next(row["step_s"].median for row in case["rows"] if row["contender"] == "epmoe")
    lines = []
    for row in case["rows"]:
        difference = row["difference"]
        same = "" if difference is None else f"{difference['output']:.0e}"
        if difference is not None and difference["tokens_elsewhere"]:
            same += f"; {difference['tokens_elsewhere']:.0%} of tokens differ"
        lines.append(
            [
                row["contender"],
                row["step_s"].text(1e3, 1),
                f"{row['forward_s'].median * 1e3:.1f}",
                row["share_of_bound"].text(1, 3),
                f"{row['step_s'].median / ours:.2f}x",
                f"{row['saved_bytes'] / 2**20:.1f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
                same,
            ]
        )
    headers = (
        "contender",
        "step, ms (quartiles)",
        "forward, ms",
        "share of bound (quartiles)",
        "time against epmoe",
        "kept, MiB",
        "peak, MiB",
        "max difference",
    )
    print(table(headers, lines))
    for name, why in case["unavailable"].items():
        print(f"- not here: {name}: {why}")
    parts = case["parts"]
    moves = parts.get(ROUTING, 0.0) + parts.get(MOVES, 0.0)
    print("\nepmoe's time: " + ", ".join(f"{name} {share:.1%}" for name, share in parts.items()))
    print(f"routing plus row moves: {moves:.1%}", flush=True)


def picture(cases: Sequence[dict[str, Any]], labels: Sequence[str], facts: dict[str, Any]) -> str:
    """Share of the bound of every contender."""

    def bars(case: dict[str, Any]) -> list[Bar]:
        shares: list[tuple[str, Spread]] = [
            (row["contender"], row["share_of_bound"]) for row in case["rows"] if row["contender"] != "bound"
        ]
        return [share_bar(name, share, ours=name == "epmoe") for name, share in shares]

    return bar_chart(
        "A mixture-of-experts layer, forward and backward",
        f"torch {facts['versions']['torch']}, {facts['device']}, {facts['threads_per_rank']} threads, kernels "
        f"{facts['kernels'].split(':')[0]}",
        [(label, bars(case)) for label, case in zip(labels, cases, strict=True)],
        axis="speed relative to the bound: balanced bmm, no routing, no row moves",
        mark=1.0,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=None)
    parser.add_argument("--activation", nargs="+", choices=("swiglu", "gelu"), default=["swiglu", "gelu"])
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--d-model", type=int, default=None)
    parser.add_argument("--d-ff", type=int, default=None)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None)
    parser.add_argument("--sweep", action="store_true", help="each shape, and one of its sizes at a time")
    parser.add_argument("--pairs", type=int, default=None, help="timed rounds; default 15")
    parser.add_argument("--peers", nargs="*", choices=tuple(BUILDERS), default=list(BUILDERS))
    arguments = parser.parse_args()
    device = start(arguments)
    pairs = arguments.pairs or (2 if arguments.quick else 15)
    facts = where(device)
    cases, labels = [], []
    with progress() as bar:
        for shape in shapes(arguments, device):
            case = run_case(shape, arguments.peers, pairs, device, bar)
            show(case, shape)
            cases.append(case)
            labels.append(shape.name())
            gc.collect()
    result = {"benchmark": "layer", "pairs": pairs, "cases": cases, **facts}
    write_results("layer", result, picture(cases, labels, facts), device=device, arguments=arguments)


if __name__ == "__main__":
    main()
