"""Rules that no linter knows: what may not be called, what must be documented, what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import epmoe
from epmoe.config_file import load_config

ROOT = Path(epmoe.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
CONFIGS = sorted((ROOT.parent / "configs").rglob("*.y*ml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT.parent))


def dotted(node: ast.expr) -> str:
    """``os.environ.get`` for that expression; empty when it is anything else than names and dots."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_false(call: ast.Call, keyword: str) -> bool:
    return any(
        k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is False
        for k in call.keywords
    )


def violations(tree: ast.Module, *, reads_environment: bool = False) -> Iterator[tuple[int, str]]:
    """Line and rule of everything that must not be there."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    loads = {
        "torch.load",
        "torch.save",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "joblib.load",
    }
    environment = {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").split(".")[0]}
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            for name in names & (loads | environment):
                yield node.lineno, f"{name} must be written out where it is used"
        else:
            imported = set()
        for module in imported & modules:
            yield node.lineno, f"{module} runs code from files"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in loads:
                yield node.lineno, f"{called} is not safe, or not our format"
            if called in {"eval", "exec", "compile", "__import__"}:
                yield node.lineno, f"{called} runs text as code"
            if called in {"np.load", "numpy.load"} and not is_false(node, "allow_pickle"):
                yield node.lineno, "numpy.load needs allow_pickle=False"
            if is_false(node, "weights_only"):
                yield node.lineno, "weights_only=False runs code from files"
            if called.endswith("_object_list") or called.endswith("all_gather_object"):
                yield node.lineno, "object collectives unpickle what peers send"
        if isinstance(node, ast.Attribute) and dotted(node) in environment and not reads_environment:
            yield node.lineno, "only env.py reads the environment"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_forbidden_is_called(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"{name_of(path)}:{line}: {rule}"
        for line, rule in violations(tree, reads_environment=path.name == "env.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "eval('1')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "f(weights_only=False)",
        "import os\nos.environ['A']",
        "import os\nx = os.getenv('A')",
        "from os import environ",
        "import torch.distributed as dist\ndist.broadcast_object_list([])",
    ],
)
def test_the_rules_find_what_they_are_for(text: str):
    assert list(violations(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["import os\nos.replace('a', 'b')", "model.eval()", "np.load('x', allow_pickle=False)"]
)
def test_the_rules_leave_the_rest_alone(text: str):
    assert not list(violations(ast.parse(text)))


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Public functions and classes without a docstring; methods count unless they override a dunder or a hook."""
    for node in body:
        if not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_everything_public_is_documented(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.stat().st_size == 0 or path.name == "__init__.py" or ast.get_docstring(tree), (
        "the module says nothing"
    )
    assert not list(undocumented(tree.body))


def test_importing_epmoe_and_reading_a_configuration_does_not_import_torch():
    code = "import sys, epmoe, epmoe.cli, epmoe.config_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_there_are_configurations_to_check():
    assert any(path.name == "quickstart.yaml" for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_configuration_parses(path: Path):
    load_config(path)
