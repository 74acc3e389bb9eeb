"""The locks of the image fit what the package asks for; the image itself is built and run by docker/test.sh."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lock(tmp_path: Path) -> ModuleType:
    """docker/lock.py of a copy that a test may change."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location("docker_lock", tmp_path / "docker" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_lock_fits(lock: ModuleType) -> None:
    assert lock.problem() is None


def test_what_does_not_fit_is_one_sentence_with_the_fix(lock: ModuleType) -> None:
    change(lock.PROJECT, '    "numpy>=1.26.4",', '    "numpy>=99",')
    assert lock.problem().startswith("pyproject.toml asks for numpy>=99, the lock has 2.")
    change(lock.PROJECT, '    "numpy>=99",', '    "not-locked",')
    assert "asks for not-locked, which no lock" in lock.problem()
    assert lock.problem().endswith("fix: python docker/lock.py")


def test_a_pin_without_a_hash_or_another_version_than_the_tested_one_is_seen(lock: ModuleType) -> None:
    change(lock.CONSTRAINTS, "torch==2.13.0", "torch==2.12.0")
    assert "constraints.txt says torch==2.12.0, the lock has 2.13.0" in lock.problem()
    (lock.HERE / "torch-cpu.lock").write_text("torch==2.13.0\n")
    assert "no hash for torch" in lock.problem()
    (lock.HERE / "torch-cpu.lock").unlink()
    assert "docker/torch-cpu.lock is missing" in lock.problem()


@pytest.mark.parametrize("script", ["entrypoint.sh", "health.sh", "test.sh"])
def test_scripts_are_programs(script: str) -> None:
    path = ROOT / "docker" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)
