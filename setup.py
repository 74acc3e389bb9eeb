"""Build script: the native kernels. Everything that can be said as data is in pyproject.toml.

``EPMOE_NATIVE=auto`` (default) builds epmoe._C where torch and a C++ compiler are at hand and otherwise installs
plain Python; ``1`` makes it an error when that fails; ``0`` does not try.

``EPMOE_CUDA=auto`` (default) puts the CUDA kernels into it where the CUDA compiler is at hand (in ``CUDA_HOME``, or
nvcc on the path) and the installed torch has CUDA; ``1`` makes it an error when that fails; ``0`` does not try.
``TORCH_CUDA_ARCH_LIST`` says for which GPUs. No GPU is needed, and none is asked.

``setup.py cuda_check`` only compiles the CUDA kernels, for any torch, and takes a warning for an error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

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


CUDA_COMPILE = [
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",  # torch's headers then declare the current stream
    "-fmad=false",  # as -ffp-contract=off; the kernels wait for memory, not for arithmetic
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # A100, H100, B200, and what comes after them


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


def torch_folder() -> Path:
    """Where the installed torch is."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def defines() -> list[tuple[str, str]]:
    """What every source is compiled with."""
    return [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)]


def usable_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- CUDA
def nvcc() -> Path | None:
    """The CUDA compiler of CUDA_HOME or, without that variable, of the path."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return Path(found) if found else None


def missing_nvcc() -> str | None:
    """Why no CUDA can be compiled; None when it can."""
    if nvcc() is not None:
        return None
    home = os.environ.get("CUDA_HOME")
    return f"no nvcc in CUDA_HOME={home}" if home else "no nvcc (not on PATH, and CUDA_HOME is not set)"


def missing_cuda() -> str | None:
    """Why the extension cannot have CUDA kernels; None when it can."""
    if missing_nvcc() is not None:
        return missing_nvcc()
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    of_torch = re.search(r"^cuda\b.*= *['\"](\d+)\.", text, re.MULTILINE)
    if of_torch is None:
        return f"the installed torch {torch_version()} has no CUDA"
    told = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    of_nvcc = re.search(r"release (\d+)\.", told)
    if of_nvcc is None or of_nvcc[1] != of_torch[1]:
        return f"nvcc is of CUDA {of_nvcc and of_nvcc[1]}, torch {torch_version()} of CUDA {of_torch[1]}"
    return None if cuda_runtime() is not None else f"no libcudart.so.{of_torch[1]} beside nvcc or torch"


def cuda_runtime() -> Path | None:
    """The CUDA runtime library to link with: of the toolkit, or of the packages that torch came with."""
    # nvcc on the path may be a script that calls the real one, which says where it lives.
    told = subprocess.run(
        [str(nvcc()), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    toolkit = Path(top[1]).resolve() if top else Path(str(nvcc())).resolve().parent.parent
    packages = torch_folder().parent / "nvidia"
    folders = [toolkit / "lib64", *toolkit.glob("targets/*/lib"), *packages.glob("cu*/lib")]
    found = (library for folder in folders for library in sorted(folder.glob("libcudart.so*")))
    return next(found, None)


def architectures() -> list[str]:
    """The GPUs to compile for: compute capabilities, with +PTX where newer GPUs shall be able to use the code."""
    names = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or CUDA_ARCHITECTURES)
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: {name!r} must look like 9.0 or 9.0+PTX")
    return names


def compile_cuda(folder: Path, *more: str) -> list[str]:
    """Compiles csrc/cuda/*.cu for all architectures -> the object files, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path("csrc/cuda").glob("*.cu"))
    targets = []
    for name in architectures():
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        targets += ["-gencode", f"arch=compute_{number},code={code}"]
    subprocess.run(
        [
            *(str(nvcc()), "-c", *CUDA_COMPILE, *more, *targets, "--threads", str(usable_cores())),
            *("-Icsrc", "-isystem", str(torch_folder() / "include")),
            *(f"-D{name}={value}" for name, value in defines()),
            *("--output-directory", str(folder)),
            *map(str, sources),
        ],
        check=True,
    )
    return [str(folder / f"{source.stem}.o") for source in sources]


class BuildKernels(build_ext):
    """Adds the CUDA kernels to the extension where they are wanted; compiles the C++ sources side by side."""

    def build_extension(self, ext: Extension) -> None:
        reason = "EPMOE_CUDA=0" if os.environ.get("EPMOE_CUDA") == "0" else missing_cuda()
        if reason is None:
            try:
                ext.extra_objects = [*compile_cuda(Path(self.build_temp) / "cuda"), str(cuda_runtime())]
                ext.define_macros.append(("EPMOE_CUDA", f'"{" ".join(architectures())}"'))
                ext.libraries.append("torch_cuda")
            except subprocess.CalledProcessError as error:
                if os.environ.get("EPMOE_CUDA") == "1":
                    sys.exit(f"EPMOE_CUDA=1, but nvcc failed with {error.returncode}")
                reason = f"nvcc failed with {error.returncode}"
        if reason is not None:
            print(f"epmoe: CUDA kernels are not built: {reason}", file=sys.stderr)
        compile_in_turn = self.compiler.compile
        with ThreadPoolExecutor(usable_cores()) as pool:

            def compile_at_once(sources: list[str], **options: Any) -> list[str]:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [made for of_one in objects for made in of_one]

            self.compiler.compile = compile_at_once
            super().build_extension(ext)


class CheckCuda(Command):
    """``setup.py cuda_check``."""

    description = "compile the CUDA kernels and throw the result away; a warning is an error"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        reason = missing_nvcc()
        if reason is not None:
            sys.exit(f"cuda_check: {reason}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                compile_cuda(Path(folder), "-Werror=all-warnings")
            except subprocess.CalledProcessError as error:
                sys.exit(f"cuda_check: nvcc failed with {error.returncode}")
        print(f"csrc/cuda compiles without warnings for {', '.join(architectures())}")


# ------------------------------------------------------------------------------------------ extension
def native_extension() -> Extension:
    """epmoe._C, against the headers of the installed torch; BuildKernels adds what CUDA needs."""
    torch = torch_folder()
    return Extension(
        "epmoe._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix not in ("", ".cpp")),
        include_dirs=["csrc"],
        define_macros=[*defines(), ("EPMOE_TORCH_VERSION", f'"{torch_version()}"')],
        # What CXXFLAGS says comes last, and so is stronger.
        extra_compile_args=[
            *(*COMPILE, "-isystem", str(torch / "include")),
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
        optional="1" not in (os.environ.get("EPMOE_NATIVE"), os.environ.get("EPMOE_CUDA")),
    )


def extensions() -> list[Extension]:
    """The extension, or nothing and one line that says why."""
    native, cuda = (os.environ.get(name, "auto") for name in ("EPMOE_NATIVE", "EPMOE_CUDA"))
    for name, value in (("EPMOE_NATIVE", native), ("EPMOE_CUDA", cuda)):
        if value not in ("auto", "0", "1"):
            sys.exit(f"{name}={value} must be auto, 0 or 1")
    reason = "EPMOE_NATIVE=0" if native == "0" else missing()
    if cuda == "1" and (reason or missing_cuda()):
        sys.exit(f"EPMOE_CUDA=1, but {reason or missing_cuda()}")
    if reason is None:
        return [native_extension()]
    if native == "1":
        sys.exit(f"EPMOE_NATIVE=1, but {reason}")
    print(f"epmoe: native kernels are not built: {reason}; plain PyTorch kernels will serve", file=sys.stderr)
    return []


setup(
    license="Apache-2.0",  # here because the field of pyproject.toml has changed its type over the years
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "cuda_check": CheckCuda},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
