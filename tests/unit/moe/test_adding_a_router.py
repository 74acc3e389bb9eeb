"""A router is added to a copy of the package (a class, a file, a line), and a YAML file trains it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import epmoe
from tests.patience import HANGS_S

OPTIONS = '''

class MineOptions(RouterOptions):
    """A router that leans towards the experts it used less in the last step."""

    name: Literal["mine"] = "mine"
    pull: Annotated[float, Field(ge=0)] = 0.5
    """How much."""

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """A limit for every expert."""
        return num_experts * d_model + num_experts
'''
FAMILY = '''"""Leans towards the experts that were used less."""

import numpy as np

from epmoe.moe.routers.common import as_routing, choose
from epmoe.moe.routers.family import Family, RouterTensor


def route(inputs, options, top_k):
    """The largest logits, less the experts' limits and what they had in the last step."""
    leaning_TE = inputs.logits_TE - inputs.threshold_E - options.pull * inputs.bias_E
    choices = choose(inputs, top_k, normalize=False, logits_TE=leaning_TE)
    return as_routing(inputs, options, choices, logits_TE=leaning_TE)


def _parts(options, num_experts):
    limit = RouterTensor(
        name="limit", field="threshold_E", num_rows=num_experts, projects=False,
        init=lambda _, shape: np.linspace(0, 1, shape[0], dtype=np.float32),
    )
    used = RouterTensor(
        name="used", field="bias_E", num_rows=num_experts, projects=False,
        update=lambda value_E, demand_E, options, step: demand_E / demand_E.sum(),
    )
    return limit, used


FAMILY = Family(route=route, parts=_parts)
'''
RUN = """
out: run
data: {tokenizer: byte, seq_len: 8, cache: cache, sources: [{name: notes, path: notes}]}
model: {d_model: 8, num_layers: 2, num_heads: 2, d_ff: 12}
moe: {every: 1, num_experts: 4, top_k: 2, router: {name: mine, pull: 0.25}}
train: {steps: 1, global_batch_size: 2, device: cpu, sample: {tokens: 2}}
optimizer: {warmup_steps: 0}
"""
PROOF = """
from pathlib import Path
import epmoe
assert Path(epmoe.__file__).parents[1] == Path.cwd(), epmoe.__file__
from epmoe.cli import main
from epmoe.config_file import dump_config, load_config
from epmoe.errors import ConfigError
try:
    load_config(Path("run.yaml"), ["moe.router.pull=-1"])
except ConfigError as error:
    assert "at least 0" in str(error) and "How much." in str(error), error
else:
    raise SystemExit("a wrong option is not refused")
assert "name: mine" in dump_config(load_config(Path("run.yaml")))
try:
    main(["train", "run.yaml"])
except SystemExit as end:
    assert not end.code, end.code
import torch
from epmoe.models.sizes import count_parameters
from epmoe.train.load_trained import load_trained
trained = load_trained(Path("run"), device=torch.device("cpu"))
config, model = trained.config, trained.model
assert config.moe.router.pull == 0.25
counted = count_parameters(config.model, config.moe, model.embed.weight.shape[0])
assert counted.total == sum(p.numel() for p in model.parameters())
for layer in model.moe_layers():
    moved = layer.router.limit - torch.linspace(0, 1, 4)
    assert 0 < moved.abs().max() < 0.1, moved
    assert abs(layer.router.used.sum().item() - 1) < 1e-6
    assert not layer.router.used.requires_grad
print("trained")
"""


def insert(path: Path, before: str, text: str) -> None:
    """Writes ``text`` in front of the one place that begins with ``before``."""
    whole = path.read_text()
    assert whole.count(before) == 1, before
    path.write_text(whole.replace(before, text + before))


@pytest.fixture
def with_mine(tmp_path: Path) -> Path:
    """A folder with the package, the new router in it, and a configuration that asks for it."""
    package = tmp_path / "epmoe"
    shutil.copytree(Path(epmoe.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    options, build = package / "config_routers.py", package / "moe" / "build.py"
    options.write_text(options.read_text() + OPTIONS)
    (package / "moe" / "routers" / "mine.py").write_text(FAMILY)
    insert(build, '    "dense",\n', '    "mine",\n')
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "notes").mkdir()
    for number in range(4):
        (tmp_path / "notes" / f"{number}.txt").write_text("All experts are equal, some are used more. " * 5)
    return tmp_path


@pytest.mark.slow
def test_a_family_is_an_options_class_a_file_and_its_names(with_mine: Path) -> None:
    """From YAML, with its mistakes explained; after a step its parameter moved and its buffer was updated."""
    done = subprocess.run(
        [sys.executable, "-c", PROOF],
        cwd=with_mine,
        env={**os.environ, "PYTHONPATH": str(with_mine), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("trained\n")
