"""Operator tests on kernels that watch themselves: Address-, UndefinedBehavior- and ThreadSanitizer. ``make sanitize``.

For each sanitizer the extension is compiled into a temporary folder, three mistakes made on purpose must be reported
(``probe.cpp``), and then the tests of the operators run. Needs g++ and its libasan, libubsan and libtsan; about a
minute on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CXX = os.environ.get("CXX", "g++")

PROBE = """
import ctypes, sys, torch
from epmoe import _C, ops
assert ops.kernel_status()[0] == "native", ops.kernel_status()
probe = getattr(ctypes.CDLL(_C.__file__), "epmoe_probe_" + sys.argv[1])
values = torch.arange(100)  # memory of torch, so that its bounds are seen to be watched
arguments = {"bounds": (values.data_ptr(), 100), "overflow": (2**63 - 1,), "race": (100,)}[sys.argv[1]]
probe(*map(ctypes.c_int64, arguments))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sanitizer:
    """One way to compile and run the kernels."""

    name: str
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    preload: str
    environment: dict[str, str]
    reports: dict[str, str]
    """Mistake in ``probe.cpp`` -> what must be said about it."""
    tests: tuple[str, ...]


WATCHED = ("native", "fuzz", "bad_input", "expert_ffn", "permute_combine", "unfilled")
"""Tests of the operators in which native kernels do most of the work."""
SANITIZERS = (
    Sanitizer(
        name="address, undefined behaviour",
        # The widest vectors, which reach furthest; here the compiler takes them apart.
        flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DEPMOE_VECTOR_BYTES=64"),
        sources=("probe.cpp",),
        preload="libasan.so",
        # Leaks: Python and torch keep what they have until the end. Memory that nobody has is torch's to refuse.
        environment={"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"},
        reports={"bounds": "heap-buffer-overflow", "overflow": "signed integer overflow"},
        tests=(*(f"tests/unit/ops/test_{name}.py" for name in WATCHED), "-k", "not ten_million"),
    ),
    Sanitizer(
        name="threads",
        flags=("-fsanitize=thread",),
        sources=("probe.cpp", "threads.cpp"),
        preload="libtsan.so",
        # Python and torch are not compiled for it, so what only they do is not its business.
        environment={
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:allocator_may_return_null=1"
        },
        reports={"race": "data race"},
        tests=("tests/unit/ops", "-k", "(test_native or threads) and not ten_million"),
    ),
)


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def library(name: str) -> str:
    """Full path of a library of the compiler."""
    return run([CXX, f"-print-file-name={name}"], {}).stdout.strip()


def build(sanitizer: Sanitizer, folder: Path) -> None:
    """The package with a sanitised epmoe._C in ``folder``/lib."""
    flags = [*sanitizer.flags, "-fno-omit-frame-pointer", "-O1"]
    objects = []
    for source in sanitizer.sources:
        objects.append(str(folder / source.replace(".cpp", ".o")))
        command = [CXX, "-std=c++20", "-fPIC", *flags, "-c", str(HERE / source), "-o", objects[-1]]
        finish(run(command, {}), f"{source} does not compile")
    command = [sys.executable, "setup.py", "--quiet", "build"]
    command += ["--build-base", str(folder / "build"), "--build-lib", str(folder / "lib")]
    more = {
        "EPMOE_NATIVE": "1",
        "CXX": CXX,
        "CXXFLAGS": " ".join(flags),
        "CFLAGS": " ".join(flags),  # what older setuptools looks at
        "LDFLAGS": " ".join([*sanitizer.flags, *objects]),
    }
    finish(run(command, more), "the extension does not compile")


def finish(done: subprocess.CompletedProcess[str], told: str) -> None:
    if done.returncode:
        sys.exit(f"{done.stdout}\n{told} (exit code {done.returncode})")


def check(sanitizer: Sanitizer, folder: Path) -> None:
    """First that mistakes are reported, then that the tests make none."""
    more = sanitizer.environment | {
        # The exceptions of the kernels are only caught when the C++ library is there before the sanitizer looks.
        "LD_PRELOAD": f"{library(sanitizer.preload)} {library('libstdc++.so.6')}",
        "PYTHONPATH": str(folder / "lib"),
        "EPMOE_KERNELS": "auto",
        "OMP_NUM_THREADS": "1",
    }
    python = [sys.executable, "-P"]  # not the package of the working folder
    for probe, report in sanitizer.reports.items():
        done = run([*python, "-c", PROBE, probe], more)
        if done.returncode == 0 or report not in done.stdout:
            sys.exit(
                f"{done.stdout}\n{sanitizer.name}: {probe!r}, wrong on purpose, is not reported as {report!r}"
            )
    # What a sanitizer says before it ends the process must not wait in pytest's files.
    options = ["--capture=sys", "-pno:cacheprovider", f"-opythonpath={folder / 'lib'} {ROOT}"]
    done = run([*python, "-m", "pytest", *options, *sanitizer.tests], more)
    finish(done, f"{sanitizer.name}: a test failed, or a kernel was reported")
    last_line = done.stdout.strip().splitlines()[-1]
    print(f"{sanitizer.name}: {last_line}; reported on purpose: {list(sanitizer.reports)}")


def main() -> None:
    """Both at the same time; the first report ends it."""
    if shutil.which(CXX) is None:
        sys.exit(f"no compiler {CXX!r} on PATH; CXX names another")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as pool:

        def everything(sanitizer: Sanitizer) -> None:
            if not Path(library(sanitizer.preload)).is_absolute():
                sys.exit(f"{CXX} has no {sanitizer.preload}: install the sanitizer libraries of the compiler")
            folder = Path(temporary) / sanitizer.preload
            folder.mkdir()
            build(sanitizer, folder)
            check(sanitizer, folder)

        list(pool.map(everything, SANITIZERS))


if __name__ == "__main__":
    main()
