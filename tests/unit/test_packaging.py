"""What an installation brings along: pins, lower bounds, configurations in a wheel, the way of an editable install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import epmoe
from tests.patience import HANGS_S

ROOT = Path(epmoe.__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return found[0].lower()


def test_every_direct_dependency_is_pinned():
    extras = project()["optional-dependencies"].values()
    direct = [*project()["dependencies"], *(each for extra in extras for each in extra)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert {name_of(each) for each in direct} | {"setuptools"} == {name_of(line) for line in lines}


def copy_of_the_sources(folder: Path) -> Path:
    skipped = shutil.ignore_patterns("__pycache__", "*.so", "csrc")
    shutil.copytree(ROOT / "epmoe", folder / "epmoe", ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(folder: Path, *command: str) -> Path:
    """Runs setup.py in a copy of the sources -> the wheel."""
    copy = copy_of_the_sources(folder)
    words = [sys.executable, "setup.py", "-q", *command, "--dist-dir", "dist"]
    subprocess.run(words, cwd=copy, env={**os.environ, "EPMOE_NATIVE": "0"}, check=True, capture_output=True)
    return next((copy / "dist").glob("*.whl"))


@pytest.mark.slow  # builds a wheel and starts three processes
def test_the_commands_of_the_readme_work_from_a_wheel(tmp_path: Path):
    pytest.importorskip("setuptools")
    (tmp_path / "build").mkdir()
    zipfile.ZipFile(build(tmp_path / "build", "bdist_wheel")).extractall(tmp_path / "site")
    for config in ("quickstart", "configs/quickstart.yaml"):
        done = subprocess.run(
            [sys.executable, "-m", "epmoe", "train", config, "--dry-run"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            timeout=HANGS_S,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("out: runs/quickstart\n")


@pytest.mark.slow  # builds a wheel
def test_an_editable_install_wins_over_a_folder_of_its_name(tmp_path: Path):
    """A path is searched for a real package to its end; an import hook would come after the folder."""
    pytest.importorskip("setuptools")
    (tmp_path / "epmoe").mkdir()
    copy_at = tmp_path / "epmoe"
    wheel = build(copy_at, "editable_wheel")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import site; site.addsitedir({str(tmp_path / 'site')!r}); from epmoe import __file__; print(__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without the epmoe that this interpreter may have installed
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.stdout == f"{copy_at / 'epmoe' / '__init__.py'}\n", done.stderr


@pytest.mark.slow  # installs packages, with a network
def test_the_oldest_versions_that_are_allowed_train(tmp_path: Path):
    """All lower bounds but torch's at once; torch and the rest are those of this interpreter."""
    bounds = [text.replace(">=", "==") for text in project()["dependencies"] if name_of(text) != "torch"]
    assert all("==" in text for text in bounds), "every dependency has a lower bound"
    venv.create(tmp_path / "old", with_pip=True)
    python = tmp_path / "old" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *bounds],
        capture_output=True,
        text=True,
    )
    if "Could not find a version" in installed.stderr or "No matching distribution" in installed.stderr:
        pytest.skip("no package index here, or none with these versions for this Python")
    assert installed.returncode == 0, installed.stderr
    import torch

    (tmp_path / "text.txt").write_text("Some words, and then some more of them. " * 200)
    (tmp_path / "run.yaml").write_text(
        "out: run\n"
        "data: {sources: [{path: text.txt}], tokenizer: byte, seq_len: 16}\n"
        "model: {d_model: 16, num_layers: 2, num_heads: 2, d_ff: 24}\n"
        "train: {steps: 3, global_batch_size: 2, device: cpu, sample: {tokens: 4}}\n"
    )
    site = next((tmp_path / "old" / "lib").glob("python*/site-packages"))
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n{ROOT}\n")  # after its own
    for words in (["train", "run.yaml"], ["generate", "run"], ["doctor", "run"]):
        done = subprocess.run(
            [python, "-m", "epmoe", *words],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
