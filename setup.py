"""Build script: the native kernels. Everything that can be said as data is in pyproject.toml.

``EPMOE_NATIVE=auto`` (default) builds epmoe._C where torch and a C++ compiler are at hand and otherwise installs
plain Python; ``1`` makes it an error when that fails; ``0`` does not try.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11: the binary works there and in every later one
PYTHON_TARGET = "0x030b0000"  # limited API of Python 3.11: one binary for every later one
COMPILE = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-fopenmp-simd",  # the pragmas only: threads are torch's own
    "-ffp-contract=off",  # the same bits on every machine, and the second-expert decision of the reference
    "-fno-math-errno",
    "-fno-trapping-math",
]


def missing() -> str | None:
    """Why the extension cannot be built here; None when it can."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if not shutil.which(shlex.split(compiler)[0]):
        return f"no C++ compiler ({compiler!r} is not on PATH; CXX names another)"
    if find_spec("torch") is None:
        return "the build cannot see torch (install torch first, then use pip's --no-build-isolation)"
    return None


def torch_version() -> str:
    """Version of the torch that is built against; torch itself is not imported."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "of unknown version"


def native_extension() -> Extension:
    """epmoe._C for the CPU, against the headers of the installed torch."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    return Extension(
        "epmoe._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        include_dirs=["csrc"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("Py_LIMITED_API", PYTHON_TARGET),
            ("EPMOE_TORCH_VERSION", f'"{torch_version()}"'),
        ],
        extra_compile_args=[*COMPILE, "-isystem", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
        optional=os.environ.get("EPMOE_NATIVE") != "1",
    )


def extensions() -> list[Extension]:
    """The extension, or nothing and one line that says why."""
    wanted = os.environ.get("EPMOE_NATIVE", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"EPMOE_NATIVE={wanted} must be auto, 0 or 1")
    reason = "EPMOE_NATIVE=0" if wanted == "0" else missing()
    if reason is None:
        return [native_extension()]
    if wanted == "1":
        sys.exit(f"EPMOE_NATIVE=1, but {reason}")
    print(f"epmoe: native kernels are not built: {reason}; plain PyTorch kernels will serve", file=sys.stderr)
    return []


setup(
    license="Apache-2.0",  # here because the field of pyproject.toml has changed its type over the years
    ext_modules=extensions(),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
