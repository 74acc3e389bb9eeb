"""The build script where the native kernels, or those for CUDA, cannot be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import epmoe

ROOT = Path(epmoe.__file__).parent.parent


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ("--version",))],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
@pytest.mark.parametrize(
    ("environment", "code", "line"),
    [
        ({"CXX": "no-such-compiler"}, 0, "no C++ compiler ('no-such-compiler' is not on PATH"),
        ({"EPMOE_NATIVE": "0"}, 0, "EPMOE_NATIVE=0; plain PyTorch kernels will serve"),
        ({"EPMOE_NATIVE": "1", "CXX": "no-such-compiler"}, 1, "EPMOE_NATIVE=1, but no C++ compiler"),
        ({"EPMOE_NATIVE": "yes"}, 1, "EPMOE_NATIVE=yes must be auto, 0 or 1"),
        ({"EPMOE_CUDA": "2"}, 1, "EPMOE_CUDA=2 must be auto, 0 or 1"),
        ({"EPMOE_CUDA": "1", "EPMOE_NATIVE": "0"}, 1, "EPMOE_CUDA=1, but EPMOE_NATIVE=0"),
        ({"EPMOE_CUDA": "1", "CUDA_HOME": "/no/such"}, 1, "EPMOE_CUDA=1, but no nvcc in CUDA_HOME=/no/such"),
    ],
)
def test_a_build_without_native_kernels_says_why(environment, code, line):
    done = run_setup(**{"EPMOE_NATIVE": "auto"} | environment)
    assert done.returncode == code
    assert len([found for found in done.stderr.splitlines() if line in found]) == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
def test_only_numbers_of_architectures_are_taken():
    done = run_setup("--quiet", "cuda_check", TORCH_CUDA_ARCH_LIST="9.0;Hopper")
    assert done.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST: 'Hopper' must look like 9.0 or 9.0+PTX" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None or torch.version.cuda is not None, reason="needs nvcc alone")
@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
def test_cuda_kernels_need_a_torch_with_cuda():
    done = run_setup(EPMOE_CUDA="1", EPMOE_NATIVE="auto")
    assert done.returncode == 1
    assert "EPMOE_CUDA=1, but the installed torch" in done.stderr
    assert "has no CUDA" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("environment", "kernels"),
    [
        pytest.param(
            {"EPMOE_NATIVE": "1", "CXXFLAGS": "-O1"},  # compiles in half the time
            "native",
            marks=pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
        ),
        ({"EPMOE_NATIVE": "auto", "CXX": "no-such-compiler"}, "reference"),
    ],
)
def test_a_wheel_serves_where_it_is_unpacked(tmp_path, environment, kernels):
    """Built with a compiler and without one, from nothing but the sources."""
    left_out = shutil.ignore_patterns(".*", "build", "runs", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    make = ["make", "-C", str(tmp_path / "source"), "wheel", f"PYTHON={sys.executable}"]
    done = subprocess.run(make, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = (tmp_path / "source/dist").glob("epmoe-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    look = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "  # this source tree
        "import epmoe; from epmoe.ops import kernel_status; print(epmoe.__file__, kernel_status()[0])"
    )
    seen = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.split() == [str(tmp_path / "site/epmoe/__init__.py"), kernels]
