"""What `make gpu-check` makes of its parts: table, exit code, failures, time-outs, bars, MFU. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epmoe.config_file import load_config
from epmoe.metrics.throughput import peak_of
from epmoe.models.sizes import count_parameters, flops_per_token
from tests.patience import HANGS_S

ROOT = Path(__file__).parents[3]
H100, OTHER = "NVIDIA H100 80GB HBM3", "NVIDIA RTX A2000"


@pytest.fixture
def gpu_check(bench: None) -> Any:
    import gpu_check

    return gpu_check


@pytest.fixture
def with_gpu(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that says it has an H100 -> the folder of its results."""
    import common

    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    properties = SimpleNamespace(name=H100, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: H100)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "results"


def shell_of(gpu_check: Any, folder: Path, gpu: str = H100, **values: Any) -> Any:
    return gpu_check.Shell(part="part", gpu=gpu, gpu_gib=79.1, folder=folder, **values)


def test_without_a_gpu_it_says_so_and_succeeds(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    said = capsys.readouterr().out
    assert said == f"gpu-check: torch {torch.__version__} sees no NVIDIA GPU here, nothing to check\n"


def test_make_runs_all_of_it_or_a_part() -> None:
    for part in ("", "bench"):
        command = ["make", "--no-print-directory", "-n", "gpu-check", "PYTHON=py", f"PART={part}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S, check=True)
        assert done.stdout.split() == ["py", "benchmarks/gpu_check.py", *part.split()]


def test_all_parts_run_and_one_table_tells_of_them(
    gpu_check: Any, with_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(shell: Any) -> Iterator[Any]:
        yield shell.row("speed", "0.91", 12.3, bar=">= 0.85", passed=True)
        yield shell.row("tool", "not there")

    def broken(shell: Any) -> Iterator[Any]:
        yield shell.row("first half", "fine", passed=True)
        shell.run(sys.executable, "-c", "print('last words'); raise SystemExit(7)")
        yield shell.row("second half", "never", passed=True)

    def surprising(shell: Any) -> Iterator[Any]:
        yield shell.row("x", str({}["missing"]))

    monkeypatch.setattr(gpu_check, "PARTS", {"good": good, "broken": broken, "surprising": surprising})
    assert gpu_check.main([]) == 1
    shown = capsys.readouterr().out
    assert "broken failed: exit code 7" in shown
    assert [line.strip() for line in shown.splitlines()].count("last words") == 2  # at once, and as its end
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| good | speed | 0.91 | >= 0.85 | 12 | pass |",
        "| good | tool | not there |  | 0 | - |",
        "| broken | first half | fine |  | 0 | pass |",
        "| broken | broken | exit code 7: -c print('last words'); raise SystemExit(7) |  | 0 | **fail** |",
        "| surprising | surprising | KeyError: 'missing' |  | 0 | **fail** |",
    ]
    written = (with_gpu / "gpu-check-nvidia-h100-80gb-hbm3.md").read_text()
    assert all(line in written for line in lines)
    assert all(f"- {fact}: " in written for fact in ("cores", "torch", "kernels", "commit", "command"))
    assert gpu_check.main(["good"]) == 0
    assert (with_gpu / "gpu-check-nvidia-h100-80gb-hbm3-good.md").exists()
    assert not list((with_gpu.parent / "runs").iterdir())


def test_an_unknown_part_is_refused(gpu_check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["benchmark"])
    assert "no part benchmark; the parts are build, test, bench, train" in capsys.readouterr().err


@pytest.mark.usefixtures("with_gpu")
def test_missing_packages_are_named(
    gpu_check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"pydantic", "yaml", "tensorboard"}
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name in gone else object())
    assert gpu_check.main([]) == 1
    assert "lacks pydantic, pyyaml: install them, or put them on PYTHONPATH" in capsys.readouterr().out


def test_a_part_whose_time_is_over_ends_with_all_it_started(
    gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import os, time; print(os.fork(), 'almost', flush=True); time.sleep(60)"

    def slow(shell: Any) -> Iterator[Any]:
        shell.run(sys.executable, "-S", "-c", code)
        yield shell.row("slow", "done")

    begin = time.monotonic()
    (row,) = gpu_check.run_part(shell_of(gpu_check, tmp_path, deadline=begin + 0.7), slow)
    assert time.monotonic() - begin < 20
    assert row.passed is False
    assert row.value.startswith("the 8 minutes of a part were over: -S -c")
    shown = capsys.readouterr().out
    assert shown.rpartition("the end of its output:")[2].count("almost") == 2
    child = max(int(word) for word in re.findall(r"(\d+) almost", shown))
    while time.monotonic() < begin + 20 and not _ended(child):
        time.sleep(0.02)
    assert _ended(child)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ---------------------------------------------------------------------------------------- bars and numbers
@pytest.mark.parametrize(("gpu", "judged"), [(H100, True), (OTHER, False)])
def test_bars_decide_on_an_h100_only(gpu_check: Any, tmp_path: Path, gpu: str, judged: bool) -> None:
    def native(share: float, seconds: float) -> dict[str, Any]:
        numbers = {"seconds": {"median": seconds}, "share_of": {"copy": {"median": share}}}
        return {"contenders": {"native": numbers}}

    rows = [{"op": name, **native(0.85, 1e-3)} for name in gpu_check.MOVES[:3]]
    rows += [
        {"op": gpu_check.MOVES[3], **native(0.84, 1e-3)},
        {"op": "routing prologue", **native(0.1, 25.1e-6)},
    ]
    layer = {
        "shape": {"d_model": 2048, "d_ff": 1024, "num_experts": 64, "activation": "gelu"},
        "rows": [{"contender": "epmoe", "share_of_bound": {"median": 0.8501}}],
        "unavailable": {"index_add loop": "does not compute the same function"},
    }
    shell = shell_of(gpu_check, tmp_path, gpu)
    operators = list(gpu_check.operator_rows(shell, {"rows": rows}, 5.0))
    speed, same = gpu_check.layer_rows(shell, {"cases": [layer]}, 5.0)
    passed = [row.passed for row in (*operators, speed)]
    assert passed == ([True, True, True, False, False, True] if judged else [None] * 6)
    assert (operators[4].value, operators[4].bar) == ("25.1 µs", "<= 25 µs" if judged else "H100: <= 25 µs")
    assert (same.passed, same.value) == (False, "does not compute the same function")


def test_only_kernel_tests_that_ran_count(gpu_check: Any, tmp_path: Path) -> None:
    case = '<testcase classname="tests.gpu.{}" name="t">{}</testcase>'
    tests = [("test_kernels", ""), ("test_kernels", "<skipped/>"), ("test_accelerators", "")]
    (tmp_path / "t.xml").write_text(
        f"<testsuites>{''.join(case.format(*test) for test in tests)}</testsuites>"
    )
    assert gpu_check.count_tests(tmp_path / "t.xml") == (1, 1)


def test_the_model_has_a_hundred_million_active_parameters() -> None:
    config = load_config(ROOT / "configs/gpu-check.yaml")
    assert config.train.precision.startswith("bf16")
    assert count_parameters(config.model, config.moe, config.data.vocab_size).active >= 100_000_000


def test_mfu_is_that_computed_by_hand(gpu_check: Any, tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/gpu-check.yaml")
    flops = flops_per_token(config.model, config.moe, config.data.vocab_size, config.data.seq_len)
    attention, dense, routers = 8 * 4 * 1024 * 1024, 4 * 3 * 1024 * 4096, 4 * 8 * 1024
    experts, head = 4 * 2 * 3 * 1024 * 2048, 8192 * 1024
    assert flops == 6 * (attention + dense + routers + experts + head) + 6 * 8 * 16 * 64 * 1025 == 906_215_424
    assert gpu_check.mfu(200_000.0, flops, 989e12) == pytest.approx(0.183259, abs=1e-6)
    # The first two records warm up, the median counts.
    records = [(9.0, 1.0), (8.0, 1.0), (7.0, 200_000.0), (6.0, 1e9), (5.0, 190_000.0)]
    loss, speed, share = gpu_check.speed_rows(shell_of(gpu_check, tmp_path), records, flops, 9.0)
    assert (loss.value, loss.passed) == ("9.000 to 5.000", True)
    assert speed.value == "200,000 tokens/s"
    assert share.value == "18.3%: 181.2 TFLOP/s at 906.2 MFLOP per token, peak 989 TFLOP/s"
    loss, _, share = gpu_check.speed_rows(shell_of(gpu_check, tmp_path, OTHER), records[::-1], flops, 9.0)
    assert loss.passed is False
    assert share.value.endswith(f"the peak of {OTHER} is not known")


def test_the_peak_is_that_of_the_most_precise_name() -> None:
    assert peak_of(H100) == peak_of("NVIDIA GH200 480GB") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H100 NVL") == 835e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of(OTHER) is None
