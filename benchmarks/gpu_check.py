"""The smoke test of one NVIDIA GPU: build, kernels against the reference, speed against its bars, a training run.

    make gpu-check [PART=build|test|bench|train] [PYTHON=python3]

Every part ends after at most 8 minutes and, once the kernels are built, can be run alone. A part that fails is shown
with the end of its output, and the others still run. At the end there is one table, also written to
``results/gpu-check-<machine>.md``. The exit code is 1 when anything failed, and 0 with one line where there is no GPU.
Bars are those of an H100; on other GPUs they are shown and decide nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/gpu-check.yaml"
LIMIT_S = 480.0
"""Time of a part, in seconds."""
TAIL_LINES = 30
"""How much of a failed command's output is shown again."""
PYTHON = (sys.executable, "-u")

LAYER_SHARE, MOVE_SHARE, PROLOGUE_US, ACTIVE = 0.85, 0.85, 25.0, 100_000_000
"""The bars: speed of the layer relative to balanced products, of row moves relative to a copy of the bytes; time of
the routing prologue; active parameters of the model that is trained."""
MOVES = ("permute", "permute backward", "combine", "combine backward")
LAYERS = ({"d-model": 2048, "d-ff": 1024, "experts": 64}, {"d-model": 4096, "d-ff": 14336, "experts": 8})
LARGE_GIB = 60.0
"""GPU memory that the second of these layers wants."""
ORACLE = "index_add loop"
"""The layer in plain PyTorch that must compute what epmoe's does."""
WARM_UP = 2
"""Records of the training run whose speed is not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    value: str
    bar: str = ""
    seconds: float = 0.0
    """Of the command that told the value."""
    passed: bool | None = None
    """None: nothing depends on it."""


class Failed(Exception):
    """A command that did not do what it is for, with the end of its output."""

    def __init__(self, why: str, seconds: float, tail: Sequence[str]) -> None:
        super().__init__(why)
        self.seconds, self.tail = seconds, tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """Runs the commands of one part, which share its time."""

    part: str
    gpu: str
    """Name of the GPU."""
    gpu_gib: float
    """Its memory."""
    folder: Path
    """Empty at first, gone at the end."""
    deadline: float = field(default_factory=lambda: time.monotonic() + LIMIT_S)

    def run(self, *command: str, **environment: str) -> tuple[str, float]:
        """Shows the output while it comes -> its last line, and seconds.

        Raises:
            Failed: It did not exit with 0, or the time of the part is over; it and its children are then killed.
        """
        begin, tail, late = time.monotonic(), deque[str](maxlen=TAIL_LINES), threading.Event()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def kill() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, self.deadline - begin), kill)
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                tail.append(line.rstrip())
            code = process.wait()
        finally:
            timer.cancel()
            if process.returncode is None:  # this program is being stopped
                kill()
        seconds = time.monotonic() - begin
        if late.is_set() or code != 0:
            why = (
                f"the {LIMIT_S / 60:.0f} minutes of a part were over"
                if late.is_set()
                else f"exit code {code}"
            )
            raise Failed(f"{why}: {' '.join(command[1:5])}", seconds, tuple(tail))
        return (tail[-1] if tail else ""), seconds

    def row(self, what: str, value: str, seconds: float = 0.0, **judged: Any) -> Row:
        """A line of this part."""
        return Row(part=self.part, what=what, value=value, seconds=seconds, **judged)

    def against(self, bar: str, passed: bool) -> dict[str, Any]:
        """A bar for an H100, which decides there and is only shown elsewhere."""
        on_h100 = "H100" in self.gpu
        return {"bar": bar if on_h100 else f"H100: {bar}", "passed": passed if on_h100 else None}


# ------------------------------------------------------------------------------------------------- parts
def build(shell: Shell) -> Iterator[Row]:
    """The native kernels in place, CUDA among them."""
    command = (*PYTHON, "setup.py", "--quiet", "build_ext", "--inplace", "--force")
    _, seconds = shell.run(*command, EPMOE_NATIVE="1", EPMOE_CUDA="1")
    status, _ = shell.run(*PYTHON, "-c", "from epmoe.ops import kernel_status; print(*kernel_status())")
    yield shell.row("kernels", status, seconds, bar="native, with CUDA", passed="CUDA kernels" in status)


def test(shell: Shell) -> Iterator[Row]:
    """Kernels against the reference on inputs that no run had before; memory poisoned, other streams, graphs."""
    seed, report = random.SystemRandom().randrange(2**31), shell.folder / "test.xml"
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-rs")
    _, seconds = shell.run(
        *(*PYTHON, *pytest, "tests/gpu", f"--junit-xml={report}"), EPMOE_TEST_SEED=str(seed)
    )
    passed, skipped = count_tests(report)
    value = f"{passed} tests passed, {skipped} of tests/gpu skipped"
    yield shell.row(f"kernels, EPMOE_TEST_SEED={seed}", value, seconds, bar="pass", passed=passed > 0)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        yield shell.row("compute-sanitizer", "not on PATH, not run")
        return
    watched = ("--error-exitcode", "99", "--target-processes", "all", "--report-api-errors", "no")
    selection = "strides or ties or gradients or uniform or activations or (slots and random)"  # every kernel
    short = ("tests/gpu/test_kernels.py", "-k", selection, "-o", "timeout=0")
    # Without torch's pools every tensor is an allocation of its own, whose end the sanitizer knows.
    _, seconds = shell.run(sanitizer, *watched, *PYTHON, *pytest, *short, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    yield shell.row("compute-sanitizer, short selection", "no errors", seconds, bar="no errors", passed=True)


def bench(shell: Shell) -> Iterator[Row]:
    """Operators and layers against their bounds, at the shapes that have bars."""
    out = ("--device", "cuda", "--out")
    results = shell.folder / "ops.json"
    _, seconds = shell.run(*PYTHON, "benchmarks/bench_ops.py", "--sweeps", "base", *out, str(results))
    yield from operator_rows(shell, json.loads(results.read_text(encoding="utf-8")), seconds)
    for number, sizes in enumerate(LAYERS):
        if number == 1 and shell.gpu_gib < LARGE_GIB:
            yield shell.row(f"layer {sizes}", f"not run: wants {LARGE_GIB:.0f} GiB of GPU memory")
            continue
        results = shell.folder / f"layer-{number}.json"
        shape = [word for size, value in sizes.items() for word in (f"--{size}", str(value))]
        command = (*PYTHON, "benchmarks/bench_layer.py", "--peers", ORACLE, "--tokens", "16384", *shape)
        _, seconds = shell.run(*command, *out, str(results))
        yield from layer_rows(shell, json.loads(results.read_text(encoding="utf-8")), seconds)


def train(shell: Shell) -> Iterator[Row]:
    """A sparse model in bfloat16 on the embedded corpus, to the end: evaluation, checkpoint and sample."""
    from epmoe.config_file import load_config
    from epmoe.metrics.step_record import read_records
    from epmoe.models.sizes import count_parameters, flops_per_token

    out = shell.folder / "run"
    _, seconds = shell.run(*PYTHON, "-m", "epmoe", "train", CONFIG, f"out={out}", "train.device=cuda")
    config = load_config(ROOT / CONFIG)
    # The corpus is large enough for the whole vocabulary.
    sizes = (config.model, config.moe, config.data.vocab_size)
    counts = count_parameters(*sizes)
    tokens = config.train.global_batch_size * config.data.seq_len
    value = f"{counts.active:,} active parameters of {counts.total:,}, {tokens:,} tokens per step"
    bar = f">= {ACTIVE:,} active"
    yield shell.row(CONFIG, value, seconds, bar=bar, passed=counts.active >= ACTIVE)
    records = [(record.loss, record.tokens_per_second) for record in read_records(out / "metrics.jsonl")]
    yield from speed_rows(shell, records, flops_per_token(*sizes, config.data.seq_len), seconds)


PARTS = {part.__name__: part for part in (build, test, bench, train)}


# -------------------------------------------------------------------------------------------- from results
def count_tests(report: Path) -> tuple[int, int]:
    """Kernel tests that passed, and what was skipped, from pytest's report (all others would have failed it)."""
    tests = list(ElementTree.parse(report).iter("testcase"))
    ran = [test for test in tests if test.find("skipped") is None]
    passed = sum(test.get("classname", "").endswith("test_kernels") for test in ran)
    return passed, len(tests) - len(ran)


def operator_rows(shell: Shell, result: Mapping[str, Any], seconds: float) -> Iterator[Row]:
    """Row moves relative to a copy of their bytes, and the time from logits to slots."""
    found = {row["op"]: row["contenders"]["native"] for row in result["rows"]}
    for name in MOVES:
        share = found[name]["share_of"]["copy"]["median"]
        judged = shell.against(f">= {MOVE_SHARE}", share >= MOVE_SHARE)
        yield shell.row(f"{name}, speed of a copy", f"{share:.2f}", seconds, **judged)
    took = found["routing prologue"]["seconds"]["median"] * 1e6
    judged = shell.against(f"<= {PROLOGUE_US:.0f} µs", took <= PROLOGUE_US)
    yield shell.row("routing prologue, graph replay", f"{took:.1f} µs", seconds, **judged)


def layer_rows(shell: Shell, result: Mapping[str, Any], seconds: float) -> Iterator[Row]:
    """Forward and backward relative to balanced products, and whether plain PyTorch gets the same."""
    for case in result["cases"]:
        sizes = case["shape"]
        name = f"layer D={sizes['d_model']} F={sizes['d_ff']} E={sizes['num_experts']} {sizes['activation']}"
        rows = {row["contender"]: row for row in case["rows"]}
        share = rows["epmoe"]["share_of_bound"]["median"]
        judged = shell.against(f">= {LAYER_SHARE}", share >= LAYER_SHARE)
        yield shell.row(f"{name}, speed of balanced bmm", f"{share:.3f}", seconds, **judged)
        if same := ORACLE in rows:
            value = f"differs by {rows[ORACLE]['difference']['output']:.0e}"
        else:
            value = case["unavailable"][ORACLE]
        yield shell.row(f"{name}, plain PyTorch", value, seconds, bar="the same result", passed=same)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Part of the GPU's peak that the arithmetic of the active parameters takes."""
    return tokens_per_second * flops_per_token / peak


def speed_rows(
    shell: Shell, records: Sequence[tuple[float, float]], flops: int, seconds: float
) -> Iterator[Row]:
    """What the run reached, from loss and tokens per second of each of its records."""
    from epmoe.metrics.throughput import peak_of

    first, last = records[0][0], records[-1][0]
    falls = last < first  # false as well when either is NaN
    yield shell.row("loss, nats per token", f"{first:.3f} to {last:.3f}", seconds, bar="falls", passed=falls)
    speed = statistics.median(per_second for _, per_second in records[WARM_UP:])
    yield shell.row("speed", f"{speed:,.0f} tokens/s", seconds)
    work = f"{speed * flops / 1e12:.1f} TFLOP/s at {flops / 1e6:,.1f} MFLOP per token"
    peak = peak_of(shell.gpu)
    if peak is None:
        yield shell.row("active arithmetic", f"{work}; the peak of {shell.gpu} is not known", seconds)
    else:
        value = f"{mfu(speed, flops, peak):.1%}: {work}, peak {peak / 1e12:,.0f} TFLOP/s"
        yield shell.row("MFU of active FLOPs", value, seconds)


FORMULA = """\
MFU = tokens/s x FLOPs per token / peak of the GPU (dense bfloat16). FLOPs per token, forward and backward = 6 x weights
of the matrices that one token meets (attention, dense feed-forward, routers, top_k experts, head; not the embedding) +
6 x layers x heads x head size x (sequence length + 1)."""


# ---------------------------------------------------------------------------------------------- the check
def run_part(shell: Shell, part: Callable[[Shell], Iterator[Row]]) -> list[Row]:
    """The rows of a part; when something fails, those before it and one that says why."""
    print(f"\n== gpu-check: {shell.part}", flush=True)
    rows: list[Row] = []
    try:
        for row in part(shell):
            rows.append(row)
    except Failed as failed:
        print(f"== {shell.part} failed: {failed}; the end of its output:", *failed.tail, sep="\n    ")
        rows.append(shell.row(shell.part, str(failed), failed.seconds, passed=False))
    except (
        Exception
    ) as error:  # a result that is not as it should be must not keep the other parts from running
        traceback.print_exc()
        rows.append(shell.row(shell.part, f"{type(error).__name__}: {error}", passed=False))
    return rows


def report(rows: Sequence[Row]) -> str:
    """The table."""
    from common import table  # late: it loads the kernels, which a part builds

    verdicts = {True: "pass", False: "**fail**", None: "-"}
    lines = [
        (row.part, row.what, row.value, row.bar, f"{row.seconds:.0f}", verdicts[row.passed]) for row in rows
    ]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return table(("part", "what", "value", "bar", "seconds", "result"), escaped)


def write(text: str, parts: Sequence[str]) -> Path:
    """The table with what it is worth nothing without -> where it is."""
    import torch
    from common import RESULTS, machine, where

    device = torch.device("cuda")
    facts = where(device)
    lines = [f"- {name}: {value}" for name, value in {**facts["hardware"], **facts["versions"]}.items()]
    lines += [
        f"- kernels: {facts['kernels']}",
        f"- commit: {facts['commit']}, {facts['changed_files']} files changed",
    ]
    lines.append(f"- command: {' '.join(facts['command'])}, {time.strftime('%Y-%m-%d')}")
    part = "" if len(parts) == len(PARTS) else f"-{'-'.join(parts)}"
    path = RESULTS / f"gpu-check-{machine(device)}{part}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("# gpu-check", "", text, "", FORMULA, "", *lines, "")), encoding="utf-8")
    return path


def missing_packages() -> list[str]:
    """What this Python lacks of what the project, its build and its tests import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]]
    names.remove("tensorboard")  # a run does without
    imported = {"pyyaml": "yaml"}
    return [name for name in (*names, "setuptools", "pytest") if find_spec(imported.get(name, name)) is None]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts -> exit code: 1 when anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    chosen = parser.parse_args(words).parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    missing = missing_packages()
    if "torch" not in missing:
        import torch

        if torch.version.cuda is None or not torch.cuda.is_available():
            print(f"gpu-check: torch {torch.__version__} sees no NVIDIA GPU here, nothing to check")
            return 0
    if missing:
        print(
            f"gpu-check: {sys.executable} lacks {', '.join(missing)}: install them, or put them on PYTHONPATH"
        )
        return 1
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that children are ended
    gpu = torch.cuda.get_device_properties(0)
    (ROOT / "runs").mkdir(exist_ok=True)
    rows: list[Row] = []
    for part in chosen:
        with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=ROOT / "runs") as folder:
            shell = Shell(part=part, gpu=gpu.name, gpu_gib=gpu.total_memory / 2**30, folder=Path(folder))
            rows += run_part(shell, PARTS[part])
    text = report(rows)
    print(f"\n{text}\n\n{FORMULA}\n")
    path = write(text, chosen)
    print(f"written: {path.name} in {path.parent.name}/")
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
