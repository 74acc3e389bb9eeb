"""The build script where the native kernels cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import epmoe

ROOT = Path(epmoe.__file__).parent.parent


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
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
    ],
)
def test_a_build_without_native_kernels_says_why(environment, code, line):
    done = run_setup(**{"EPMOE_NATIVE": "auto"} | environment)
    assert done.returncode == code
    assert len([found for found in done.stderr.splitlines() if line in found]) == 1
