"""The benchmarks run, write what they promise, time the right function and refuse a wrong one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from epmoe.comm.exchange import flat
from epmoe.config import Config, DataConfig, MoEConfig, router_classes
from epmoe.moe import dispatch
from epmoe.moe.dispatch import AllToAllDispatcher
from tests.unit.moe.helpers import config, make_layer, tokens

FOLDER = Path(__file__).parents[3] / "benchmarks"
RUN_ALL = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
for words in json.loads(sys.argv[2]):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of every benchmark, run with ``--quick`` in one child process, so that torch is imported once."""
    base = tmp_path_factory.mktemp("benchmarks")
    for split, lines in (("train", 400), ("val", 50)):
        (base / split).mkdir()
        (base / split / "words.txt").write_text("\n".join(f"line {i} of {split}" for i in range(lines)))
    source = {"name": "words", "path": str(base / "train"), "val_path": str(base / "val")}
    data = {"sources": [source], "tokenizer": "byte", "cache": str(base / "cache"), "num_workers": 1}
    config = {"out": str(base / "run"), "data": data, "moe": {"num_experts": 4}}
    (base / "tiny.yaml").write_text(json.dumps(config))
    extra = {
        "ops": [],
        "layer": ["--activation", "swiglu", "--peers", "index_add loop", "GShard einsum", "SonicMoE"],
        "step": ["--config", str(base / "tiny.yaml")],
        "routers": ["--config", str(base / "tiny.yaml")],
    }
    words = [
        [
            str(FOLDER / f"bench_{name}.py"),
            "--quick",
            "--device",
            "cpu",
            "--out",
            str(base / f"{name}.json"),
            *more,
        ]
        for name, more in extra.items()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, str(FOLDER), json.dumps(words)],
        cwd=base,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in extra:
        picture = (base / f"{name}.svg").read_text()
        assert picture.startswith("<svg")
        assert ('class="line base"' if name == "routers" else 'class="ours"') in picture
    return {name: json.loads((base / f"{name}.json").read_text()) for name in extra}


def test_every_result_says_where_it_comes_from(results: dict[str, Any]) -> None:
    for result in results.values():
        assert {"device", "kernels", "load_average", "commit", "command", "hardware"} <= result.keys()
        assert result["versions"]["torch"] == torch.__version__
        assert result["threads_per_rank"] == 1
        assert "host" not in result["hardware"]


def test_operators_are_timed_against_their_bounds(results: dict[str, Any]) -> None:
    rows = [row for row in results["ops"]["rows"] if row["sweep"] == "base"]
    assert len({row["op"] for row in rows}) == len(rows) == 10
    for row in rows:
        assert {"native", "reference"} < row["contenders"].keys()
        assert row["bounds"].keys() == ({"copy", "clone"} if row["bound_bytes"] else {"bmm"})
        for found in row["contenders"].values():
            assert found["seconds"]["low"] <= found["seconds"]["median"] <= found["seconds"]["high"]
            assert all(share["median"] > 0 for share in found["share_of"].values())
    permute = next(row for row in rows if row["op"] == "permute")
    assert permute["bound_bytes"] == 3 * 64 * 16 * 4 + 2 * 64 * 8  # (1 + K) T D floats and T K indices


def test_layers_are_timed_against_the_bound(results: dict[str, Any]) -> None:
    for case in results["layer"]["cases"]:
        rows = {row["contender"]: row for row in case["rows"]}
        assert list(rows) == ["bound", "epmoe", "index_add loop", "GShard einsum"]
        assert rows["bound"]["share_of_bound"]["median"] == 1.0
        for row in rows.values():
            assert 0 < row["forward_s"]["median"] < row["step_s"]["median"]
            assert row["saved_bytes"] > 0
            assert row["peak_bytes"] > 0
        for peer in ("index_add loop", "GShard einsum"):
            assert rows[peer]["difference"]["output"] < 1e-5
            assert rows[peer]["difference"]["gradients"] < 1e-5
        assert sum(case["parts"].values()) == pytest.approx(1.0)
        assert {"routing", "row moves", "expert GEMM"} <= case["parts"].keys()
        assert "CuTe" in case["unavailable"]["SonicMoE"]


def test_every_causal_router_is_compared_at_equal_arithmetic(results: dict[str, Any]) -> None:
    dense, *rows = results["routers"]["rows"]
    causal = {name for name, options in router_classes().items() if options().looks_ahead is None}
    assert {row["model"] for row in rows} == causal >= {"gshard_top2", "task", "dense"}
    assert dense["model"] == "dense FFN"
    assert dense["speed_of_dense"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    for row in (dense, *rows):
        assert row["mflop_per_token"] == pytest.approx(dense["mflop_per_token"], rel=0.02)
        assert row["against_dense"]["0"] == row["bits_per_byte"]["0"] - dense["bits_per_byte"]["0"]
        assert [tokens for tokens, _ in row["curve"]] == [128, 256]
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_s"]["median"])
    found = {row["model"]: row for row in rows}
    assert (found["task"]["dead_experts"], found["task"]["busiest_share"]) == (2, 0.5)
    assert (found["dense"]["experts"], found["dense"]["busiest_share"]) == ("4 x 16", 0.25)
    assert found["switch"]["drop_rate"] > 0 == found["deepseek"]["drop_rate"]


@pytest.mark.usefixtures("bench")
def test_what_is_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_routers
    from router_report import append_line, read_lines
    from router_variants import DENSE, Variant

    base = Config(data=DataConfig(cache=str(tmp_path)))
    variants = [
        Variant(name=name, config=base.model_copy(update={"moe": moe}), flops=1, why="")
        for name, moe in ((DENSE, None), ("topk", MoEConfig(router="topk")))
    ]
    trained: list[tuple[str, int]] = []

    def train_once(config: Config, *_: Any, **__: Any) -> dict[str, Any]:
        trained.append((config.moe.router.name if config.moe else DENSE, config.seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"bits_per_byte": 2.0, "train_seconds": 1.0, "validation_seconds": 1.0}

    monkeypatch.setattr(bench_routers, "train_once", train_once)
    monkeypatch.setattr(bench_routers, "where", lambda _: dict.fromkeys(bench_routers.ORIGIN))
    place, prepared = SimpleNamespace(device=CPU), SimpleNamespace(fingerprint="f")
    store, arguments = (
        tmp_path / "r.jsonl",
        SimpleNamespace(seeds=2, minutes=9.0, share="1/1", log_every=1, quick=True),
    )
    with pytest.raises(KeyboardInterrupt):
        bench_routers.train_missing(variants, prepared, place, store, arguments)
    store.write_text(store.read_text() + '{"part": "run", "key"')  # a line that a crash tore
    assert len(read_lines(store)) == 2
    bench_routers.train_missing(variants, prepared, place, store, arguments)
    assert trained == [(DENSE, 0), ("topk", 0), (DENSE, 1), (DENSE, 1), ("topk", 1)]
    append_line(store, {"part": "run", "key": "k", "bits_per_byte": 1.0})
    assert len(read_lines(store)) == 5
    late = SimpleNamespace(**{**vars(arguments), "seeds": 3, "minutes": -1.0})
    bench_routers.train_missing(variants, prepared, place, store, late)
    assert len(trained) == 5, "no run begins when the time is over"


def test_a_step_is_split_into_parts(results: dict[str, Any]) -> None:
    sparse, dense = results["step"]["rows"]
    for row in (sparse, dense):
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert all(row["shares"][part] > 0 for part in ("attention", "head and loss", "optimizer"))
    assert all(sparse["shares"][part] > 0 for part in ("routing", "row moves", "expert GEMM"))
    assert dense["shares"]["routing"] == dense["shares"]["expert GEMM"] == 0.0


@pytest.mark.usefixtures("bench")
def test_the_gpu_check_reads_these_results(results: dict[str, Any], tmp_path: Path) -> None:
    from gpu_check import MOVES, Shell, layer_rows, operator_rows

    shell = Shell(part="bench", gpu="NVIDIA H100 80GB HBM3", gpu_gib=79.1, folder=tmp_path)
    rows = list(operator_rows(shell, results["ops"], 1.0))
    assert len(rows) == len(MOVES) + 1
    assert rows[-1].what.startswith("routing prologue")
    speed, same = layer_rows(shell, results["layer"], 1.0)
    assert "swiglu" in speed.what
    assert same.passed
    assert same.value.startswith("differs by")


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients_of_the_denominator(activation: str) -> None:
    from layers import ACTIVATIONS, BalancedExperts

    def plain(rows_ECD: Tensor, w_in_EDX: Tensor, w_out_EFD: Tensor) -> Tensor:
        return ACTIVATIONS[activation](rows_ECD @ w_in_EDX) @ w_out_EFD

    width = 14 if activation == "swiglu" else 7
    sizes = ((3, 5, 4), (3, 4, width), (3, 7, 4))
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    d_out_ECD = torch.randn(3, 5, 4, dtype=torch.float64)
    out_ECD = BalancedExperts.apply(*leaves, activation)
    expected_ECD = plain(*leaves)
    torch.testing.assert_close(out_ECD, expected_ECD)
    torch.testing.assert_close(
        torch.autograd.grad(out_ECD, leaves, d_out_ECD), torch.autograd.grad(expected_ECD, leaves, d_out_ECD)
    )


@pytest.mark.usefixtures("bench")
def test_a_sweep_changes_one_size_at_a_time() -> None:
    from bench_layer import around
    from layers import LayerShape

    shape = LayerShape(
        num_tokens=16, d_model=8, d_ff=8, num_experts=4, top_k=2, activation="gelu", dtype=torch.float32
    )
    sizes = asdict(shape)
    changed = [
        {name for name, size in asdict(other).items() if size != sizes[name]} for other in around(shape)
    ]
    assert changed.count(set()) == 1
    assert all(len(names) <= 1 for names in changed)
    assert set.union(*changed) == {"num_experts", "num_tokens", "top_k", "d_model"}


@pytest.mark.usefixtures("bench")
def test_a_layer_with_other_weights_is_refused() -> None:
    from bench_layer import differences, outputs
    from layers import LayerShape, epmoe_layer, make_weights, mm_loop

    shape = LayerShape(
        num_tokens=16, d_model=8, d_ff=8, num_experts=4, top_k=2, activation="gelu", dtype=torch.float32
    )
    weights = make_weights(shape, CPU)
    expected = outputs(epmoe_layer(shape, weights)[0])
    assert differences(mm_loop(shape, weights), expected)["gradients"] < 1e-5
    swapped = replace(weights, w_out_EFD=weights.w_out_EFD.flip(0))
    with pytest.raises(RuntimeError, match="does not compute the same function"):
        differences(mm_loop(shape, swapped), expected)


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize(
    "wrong", [lambda: torch.zeros(4), lambda: torch.empty(4)], ids=["zeros", "unwritten"]
)
def test_a_wrong_operator_is_refused(wrong: Any) -> None:
    from bench_ops import check
    from operators import OpCase

    right = torch.tensor([1.0, -2.0, 3.0, 0.5])
    contenders = {"reference": lambda: right, "native": lambda: right.clone()}
    assert check(OpCase(name="x", contenders=contenders, bound_bytes=8), torch.float32)[0]["native"] == 0.0
    broken = OpCase(name="x", contenders={**contenders, "native": wrong}, bound_bytes=8)
    with pytest.raises(RuntimeError, match="native differs"):
        check(broken, torch.float32)


@pytest.mark.usefixtures("bench")
def test_memory_is_poisoned_before_a_check() -> None:
    from common import poisoned

    with poisoned():
        assert torch.empty(100).isnan().all()
        assert (torch.empty(100, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("bench")
def test_a_backward_pass_belongs_to_the_parts_of_its_forward_pass() -> None:
    from parts import classified, labelled
    from torch.profiler import ProfilerActivity, profile

    class Product:
        weight_DD = torch.randn(8, 8, requires_grad=True)

        def run(self, x_TD: Tensor) -> Tensor:
            y_TD = x_TD @ self.weight_DD
            torch.arange(3) + 1  # makes no node: carries the number of the node that comes next
            return y_TD

    first, second, x_TD = Product(), Product(), torch.randn(4, 8, requires_grad=True)
    labels = [(first, "run", "first"), (second, "run", "second")]
    with labelled(labels), profile(activities=[ProfilerActivity.CPU]) as profiler:
        F.silu(second.run(F.gelu(first.run(x_TD)))).sum().backward()
    parts = [part for event, part in classified(profiler.events(), {}) if event.name == "aten::mm"]
    assert sorted(parts) == ["first"] * 3 + ["second"] * 3  # forward, and two products backward
    # Between the two, time belongs to neither.
    assert {part for event, part in classified(profiler.events(), {}) if "gelu" in event.name} == set()
    assert "run" not in vars(first)


@pytest.mark.usefixtures("bench")
def test_exchanges_are_a_part_of_their_own(one_rank_group: dist.ProcessGroup) -> None:
    """Counts, and rows there and back in both passes; labels that are given twice count once."""
    from parts import EXCHANGE, MOE_RULES, classified, labelled, moe_labels
    from torch.profiler import ProfilerActivity, profile

    layer = make_layer(config("top2", num_experts=4))
    x_BSD = tokens(2, 6).requires_grad_()
    before = vars(dispatch)["exchange_counts"]
    layer.dispatcher = AllToAllDispatcher(flat(one_rank_group))
    with labelled(moe_labels(layer) * 2), profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer(x_BSD)[0].sum().backward()
    parts = [part for event, part in classified(profiler.events(), MOE_RULES) if "alltoall" in event.name]
    assert len(parts) >= 5
    assert set(parts) == {EXCHANGE}
    assert vars(dispatch)["exchange_counts"] is before


@pytest.mark.usefixtures("bench")
def test_memory_is_counted_to_the_byte() -> None:
    from layers import LayerShape, bound, make_weights
    from parts import peak_bytes, saved_bytes

    def step() -> None:
        first = torch.ones(1000)
        del first
        second = torch.ones(500)
        third = torch.ones(700)
        del second, third

    assert peak_bytes(step, CPU) == 1200 * 4
    shape = LayerShape(
        num_tokens=16, d_model=8, d_ff=12, num_experts=4, top_k=2, activation="swiglu", dtype=torch.float32
    )
    base = bound(shape, make_weights(shape, CPU))
    kept = saved_bytes(lambda: base.forward(base.x), [base.x, *base.parameters])
    assert kept == 32 * (2 * 12 + 12) * 4  # the pre-activation and the activation of every row
