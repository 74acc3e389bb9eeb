"""Every operator, native and reference, against plain PyTorch and against what the machine can move.

    python benchmarks/bench_ops.py [--rounds 15] [--sweeps base E]

The bound of routing and row operators is the time of a copy, in the same turn, of as many bytes as the operator has to
read and write once (rows, weights and indices): into memory that exists (``copy``), and into memory that is asked for
(``clone``), as every operator does for its result. Freed memory is kept in the process, on large pages, because the
first touch of a new page costs more than any operator (``MALLOC_TRIM_THRESHOLD_=131072`` shows how much). The bound of
the experts is balanced ``bmm`` of equal arithmetic, with the activation between. All contenders are compared with the
reference before they are timed. On CUDA, times are those of graph replays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from common import (
    arguments_parser,
    interleave,
    paired,
    poisoned,
    progress,
    relative_difference,
    sampler,
    spread,
    start,
    table,
    where,
    write_results,
)
from operators import (
    EXPERTS,
    ROUTING,
    ROWS,
    Inputs,
    OpCase,
    OpShape,
    Outputs,
    make_inputs,
    transformer_engine,
)
from plot import Bar, bar_chart, share_bar
from torch import Tensor

SWEEPS = ("base", "dtype", "E", "T", "K", "D")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference from the reference, relative to the largest value."""
Builder = Callable[[Inputs], OpCase]
Plan = list[tuple[str, OpShape, tuple[Builder, ...]]]
"""Sweep, shape, operators."""


def plan(device: torch.device, quick: bool) -> Plan:
    """All cases: both dtypes at the base shape, then one size at a time."""
    if quick:
        rows = OpShape(num_tokens=64, num_experts=8, top_k=2, d_model=16, d_ff=32, dtype=torch.float32)
        return [
            ("base", rows, ROUTING + ROWS + EXPERTS),
            ("E", replace(rows, num_experts=16), ROUTING + ROWS),
        ]
    if device.type == "cuda":
        rows = OpShape(
            num_tokens=16384, num_experts=64, top_k=2, d_model=4096, d_ff=1024, dtype=torch.bfloat16
        )
        product, other = replace(rows, d_model=2048), torch.float32
        tokens, widths = (4096, 65536), (1024, 8192)
    else:
        rows = OpShape(num_tokens=8192, num_experts=64, top_k=2, d_model=512, d_ff=1024, dtype=torch.float32)
        product, other = replace(rows, num_tokens=2048, d_model=256), torch.bfloat16
        tokens, widths = (2048, 32768), (128, 2048)
    return [
        ("base", rows, ROUTING + ROWS),
        ("base", product, EXPERTS),
        ("dtype", replace(rows, dtype=other), ROWS),
        ("dtype", replace(product, dtype=other), EXPERTS),
        *(("E", replace(rows, num_experts=E), ROUTING + ROWS) for E in (8, 32, 128, 512)),
        *(("E", replace(product, num_experts=E), EXPERTS) for E in (8, 256, 512)),
        *(("T", replace(rows, num_tokens=T), ROUTING + ROWS) for T in tokens),
        *(("K", replace(rows, top_k=K), ROUTING + ROWS) for K in (1, 4, 8)),
        *(("D", replace(rows, d_model=D), ROWS) for D in widths),
        *(
            ("T", replace(product, num_tokens=T), EXPERTS)
            for T in (product.num_tokens // 8, 4 * product.num_tokens)
        ),
        *(("D", replace(product, d_model=D, d_ff=2 * D), EXPERTS) for D in (128, 512)),
    ]


# ------------------------------------------------------------------------------------------- correctness
def check(case: OpCase, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, str]]:
    """Largest relative difference of every contender from the reference, on poisoned memory; and who cannot run.

    Raises:
        RuntimeError: epmoe's own operator is not the function its reference is.
    """
    with poisoned():
        expected = _tensors(case.contenders["reference"]())
        found: dict[str, float] = {}
        missing: dict[str, str] = {}
        for name, function in case.contenders.items():
            try:
                actual = _tensors(function())
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if name == "native":
                    raise
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            # Plain PyTorch leaves some results out; what it has comes in the same order.
            found[name] = max(relative_difference(a, e) for a, e in zip(actual, expected, strict=False))
    limit = TOLERANCE[dtype]
    if found["native"] > limit:
        raise RuntimeError(
            f"{case.name}: native differs from the reference by {found['native']:.1e} > {limit}"
        )
    return found, missing


def _tensors(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


# ------------------------------------------------------------------------------------------------ timing
def bounds(case: OpCase, device: torch.device) -> dict[str, Callable[[], object]]:
    """What each turn measures besides the contenders."""
    if case.bound is not None:
        return {"bmm": case.bound}
    # A copy reads and writes each byte: half of the bound's bytes make as much traffic.
    source = torch.randn(max(1, case.bound_bytes // 8), device=device)
    target = torch.randn_like(source)
    return {"copy": lambda: target.copy_(source), "clone": source.clone}


def run_case(
    case: OpCase,
    shape: OpShape,
    sweep: str,
    *,
    peers: dict[str, Callable[[], Outputs]],
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Checks and times one operator at one shape."""
    with torch.no_grad():
        found, missing = check(case, shape.dtype)
    functions = {name: function for name, function in case.contenders.items() if name in found} | peers
    limits = bounds(case, device)
    seconds = 0.002 if rounds < 3 else 0.01
    with torch.no_grad():
        samplers = {name: sampler(f, device, seconds=seconds) for name, f in {**functions, **limits}.items()}
        samples = interleave(samplers, rounds)
    contenders = {
        name: {
            "seconds": spread(samples[name]),
            "share_of": {limit: paired(samples[limit], samples[name]) for limit in limits},
            "difference": found.get(name),
        }
        for name in functions
    }
    return {
        "op": case.name,
        "sweep": sweep,
        "shape": asdict(shape),
        "bound_bytes": case.bound_bytes,
        "bounds": {limit: spread(samples[limit]) for limit in limits},
        "contenders": contenders,
        "unavailable": missing,
    }


def peers_of(inputs: Inputs) -> tuple[dict[str, Callable[[], Outputs]], dict[str, str]]:
    """Other libraries' operators by the name of ours, and why there are none."""
    if inputs.x_TD.device.type != "cuda":
        return {}, {"Transformer Engine": "kernels for CUDA"}
    try:
        return transformer_engine(inputs), {}
    except Exception as error:  # whatever its import raises is its entry in the table
        return {}, {"Transformer Engine": f"{type(error).__name__}: {error}".splitlines()[0]}


def run(cases: Plan, rounds: int, device: torch.device) -> Iterator[tuple[OpShape, dict[str, Any]]]:
    """Every operator of the plan in turn."""
    with progress() as bar:
        task = bar.add_task("operators", total=sum(len(builders) for _, _, builders in cases))
        for sweep, shape, builders in cases:
            inputs = make_inputs(shape, device)
            others, missing = peers_of(inputs)
            for builder in builders:
                bar.update(task, description=f"{builder.__name__} {shape.name()}")
                case = builder(inputs)
                peers = {"Transformer Engine": others[case.name]} if case.name in others else {}
                row = run_case(case, shape, sweep, peers=peers, rounds=rounds, device=device)
                row["unavailable"] |= missing if case.name in ("permute", "combine") else {}
                bar.update(task, advance=1)
                yield shape, row


# --------------------------------------------------------------------------------------------- reporting
def line(shape: OpShape, row: dict[str, Any]) -> list[object]:
    """One row of the table."""
    native = row["contenders"]["native"]
    rate = row["bound_bytes"] / native["seconds"].median / 1e9
    others = [
        f"{name} {other['seconds'].median / native['seconds'].median:.2f}x"
        for name, other in row["contenders"].items()
        if name != "native"
    ]
    return [
        row["op"],
        shape.name() + (f" F={shape.d_ff}" if not row["bound_bytes"] else ""),
        native["seconds"].text(1e6, 0),
        f"{rate:.1f}" if row["bound_bytes"] else "",
        "; ".join(f"{limit} {share.text(1, 2)}" for limit, share in native["share_of"].items()),
        "; ".join(others),
        f"{native['difference']:.0e}",
    ]


def picture(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Share of the bound: all contenders at the base shape, and the native operator against E and dtype."""
    groups: dict[str, list[Bar]] = {}
    for row in rows:
        if row["sweep"] not in ("base", "dtype", "E"):
            continue
        limit = next(iter(row["bounds"]))
        for name, found in row["contenders"].items():
            if row["sweep"] != "base" and name != "native":
                continue
            share, sizes = found["share_of"][limit], row["shape"]
            kind = str(sizes["dtype"]).removeprefix("torch.")
            label = (
                name
                if row["sweep"] == "base" and name != "native"
                else f"{name}, E={sizes['num_experts']} {kind}"
            )
            groups.setdefault(row["op"], []).append(share_bar(label, share, ours=name == "native"))
    return bar_chart(
        "Operators against the bound",
        f"torch {facts['versions']['torch']}, {facts['device']}, {facts['threads_per_rank']} threads, kernels "
        f"{facts['kernels'].split(':')[0]}",
        list(groups.items()),
        axis="speed relative to a copy of the bytes that must move; of experts, to balanced bmm",
        mark=1.0,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = arguments_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=None, help="samples of each contender; default 15")
    parser.add_argument(
        "--sweeps", nargs="+", choices=SWEEPS, default=SWEEPS, help="which of them; default all"
    )
    arguments = parser.parse_args()
    device = start(arguments)
    rounds = arguments.rounds or (2 if arguments.quick else 15)
    facts = where(device)
    rows, lines = [], []
    cases = [case for case in plan(device, arguments.quick) if case[0] in arguments.sweeps]
    for shape, row in run(cases, rounds, device):
        rows.append(row)
        lines.append(line(shape, row))
    headers = (
        "operator",
        "shape",
        "native, µs (quartiles)",
        "GB/s",
        "share of bound (quartiles)",
        "time of others against native",
        "max difference",
    )
    print(table(headers, lines))
    missing = {name: why for row in rows for name, why in row["unavailable"].items()}
    for name, why in missing.items():
        print(f"- not here: {name}: {why}")
    result = {"benchmark": "ops", "rounds": rounds, "rows": rows, **facts}
    write_results("ops", result, picture(rows, facts), device=device, arguments=arguments)


if __name__ == "__main__":
    main()
