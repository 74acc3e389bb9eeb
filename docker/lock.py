"""The locks of the image: every dependency with its version and the hashes of its files.

    python docker/lock.py          resolves pyproject.toml again (needs `pip install uv` and the network)
    python docker/lock.py --check  says in one sentence what does not fit, and ends with 2

base.lock is what every image has; torch-cpu.lock and torch-cuda.lock are torch with what it brings.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PROJECT, CONSTRAINTS = HERE.parent / "pyproject.toml", HERE.parent / "constraints.txt"
LOCKS = ("base.lock", "torch-cpu.lock", "torch-cuda.lock")
RESOLVE = "uv pip compile --universal --generate-hashes --no-header --no-annotate --no-emit-index-url --quiet"
AGAIN = "fix: python docker/lock.py"


def entries(text: str) -> list[str]:
    """The requirements of a lock, each with the lines of its hashes."""
    return re.split(r"\n(?=\S)", text.strip("\n")) if text.strip() else []


def brought_by_torch(entry: str) -> bool:
    """Whether only torch's CUDA build needs it."""
    return re.match(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==", entry) is not None


def make() -> None:
    """Writes the three locks."""
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder, "all.lock")
        python = ("--python-version", "3.11", "-c", str(CONSTRAINTS), "-o", str(resolved), str(PROJECT))
        subprocess.run([*RESOLVE.split(), *python], check=True)
        every = entries(resolved.read_text())
        (HERE / "base.lock").write_text("\n".join(e for e in every if not brought_by_torch(e)) + "\n")
        (HERE / "torch-cuda.lock").write_text("\n".join(e for e in every if brought_by_torch(e)) + "\n")
        [torch] = [entry.split()[0] for entry in every if entry.startswith("torch==")]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, torch]
        subprocess.run(pip, check=True)
        [wheel] = Path(folder).glob("torch-*.whl")
        if "+cpu" not in wheel.name:
            sys.exit(
                f"pip finds no CPU build of {torch}: name an index that has one; torch-cpu.lock stays as it is"
            )
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (HERE / "torch-cpu.lock").write_text(f"{torch} \\\n    --hash=sha256:{digest}\n")


def problem() -> str | None:
    """What does not fit, in one sentence; None when everything does."""
    locked: dict[str, list[str]] = {}
    for name in LOCKS:
        if not (HERE / name).is_file():
            return f"docker/{name} is missing; {AGAIN}"
        for entry in entries((HERE / name).read_text()):
            pinned = Requirement(entry.partition("\\")[0].strip())
            locked.setdefault(canonicalize_name(pinned.name), []).append(
                str(pinned.specifier).removeprefix("==")
            )
            if "--hash=sha256:" not in entry:
                return f"docker/{name} has no hash for {pinned.name}; {AGAIN}"
    wanted = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    for text in wanted:
        asked = Requirement(text)
        versions = locked.get(canonicalize_name(asked.name))
        if versions is None:
            return f"pyproject.toml asks for {asked.name}, which no lock in docker/ has; {AGAIN}"
        if not all(asked.specifier.contains(version, prereleases=True) for version in versions):
            return f"pyproject.toml asks for {text}, the lock has {', '.join(versions)}; {AGAIN}"
    for line in CONSTRAINTS.read_text().splitlines():
        fixed = Requirement(line) if line and not line.startswith("#") else None
        versions = locked.get(canonicalize_name(fixed.name), []) if fixed else []
        if fixed and versions and not any(fixed.specifier.contains(version) for version in versions):
            return f"constraints.txt says {line}, the lock has {', '.join(versions)}; {AGAIN}"
    return None


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        make()
    if found := problem():
        print(f"error: {found}", file=sys.stderr)
        sys.exit(2)
