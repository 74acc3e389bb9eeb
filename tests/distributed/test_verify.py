"""The proof on real ranks, with and without something to find."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from epmoe.config import Config, MoEConfig
from epmoe.verify.faults import FAULTS
from epmoe.verify.proof import prove
from epmoe.verify.self_test import plan_for_faults
from epmoe.verify.small_config import make_subject
from epmoe.verify.subjobs import assemble, run_here
from tests.distributed.harness import run_ranks
from tests.patience import HANGS_S

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PLANTED = {
    "expert gradients times ep_size": "gradients",
    "auxiliary losses divided by the tokens in the loss": "balance",
    "combine weights cut off from the graph": "liveness",
    "expert moments lost on a resize": "resize",
}
"""Some of the faults and what must see them; the slow test plants all of them."""
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def _prove(rank: int, names: Sequence[str | None]) -> list[dict[str, Any]]:
    subject = make_subject(Config(moe=MoEConfig(num_experts=4)), 2, "small", ranks_per_node=2)
    ranks = assemble("cpu", HANGS_S, same="{}")
    whole = plan_for_faults(subject)
    found = []
    for name in names:
        fault = next((fault for fault in FAULTS if fault.name == name), None)
        with fault.plant() if fault else nullcontext():
            found.append(asdict(prove(ranks, subject, whole, lambda *_: None, shared=None)))
    return found


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Of both ranks: the code as it is, then with each fault."""
    return run_ranks(2, _prove, tmp_path_factory.mktemp("verify"), [None, *PLANTED], timeout=110)


def test_the_code_as_it_is_is_proven(verdicts: list[list[dict[str, Any]]]) -> None:
    verdict = verdicts[0][0]
    assert verdict["violations"] == ()
    assert {row["scenario"] for row in verdict["rows"]} == {"parity", "one_token", "balance", "task_only"}
    for row in verdict["rows"]:
        assert row["ok"]
        assert [row[name] for name in ("norm_equal", "clip_equal", "collectives_equal")] == [True] * 3
        assert row["expert"]["error"] < 1e-12
        exchanges = {counts.get("all_to_all_single", 0) for counts in row["micro_collectives"]}
        assert len(exchanges) == 1
        if (
            row["settings"]["parallel.engine"] == "native"
        ):  # dense, sums; and experts where two ranks hold them
            assert row["end_collectives"]["all_reduce"] == (2 if row["ep_size"] == 2 else 3)


def test_every_rank_has_the_same_verdict(verdicts: list[list[dict[str, Any]]]) -> None:
    for one, other in zip(*verdicts, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(("number", "item"), list(enumerate(PLANTED.values(), start=1)))
def test_a_planted_fault_is_found(verdicts: list[list[dict[str, Any]]], number: int, item: str) -> None:
    assert item in {violation["item"] for violation in verdicts[0][number]["violations"]}


def test_a_wrong_factor_is_explained(verdicts: list[list[dict[str, Any]]]) -> None:
    first = verdicts[0][1]["violations"][0]
    assert first["tensor"] == "blocks.1.moe.experts.w_in"
    assert first["meaning"].startswith("2x everywhere = ep_size 2")


def _different(rank: int) -> str:
    try:
        assemble("cpu", 20.0, same=json.dumps({"config": {"seed": rank, "moe": {"top_k": 2}}}))
    except Exception as error:
        return str(error)
    return "started"


def test_ranks_with_different_configurations_are_told_the_keys(tmp_path: Path) -> None:
    for text in run_ranks(2, _different, tmp_path):
        assert "rank(s) [1] differs from rank 0's" in text
        assert "config.seed is 0, and 1" in text
        assert "top_k" not in text


def test_a_rank_that_fails_takes_the_others_with_it() -> None:
    def work() -> int:
        return int(os.environ["RANK"]) * 8

    assert run_here(2, work, 20.0) == 8
    assert run_here(2, lambda: 0, 20.0) == 0


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "EPMOE_FAULT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    path = [str(CONFIG.parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=HANGS_S
    )


def run_verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "epmoe", "verify", str(CONFIG), *arguments)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_proves_the_quickstart(tmp_path: Path) -> None:
    """With DeepSpeed, where it is installed, as the engine that the configuration asks for."""
    asked = ["parallel.engine=deepspeed"] if HAS_DEEPSPEED else []
    done = run_verify("--ranks", "2", "--json", str(tmp_path / "verdict.json"), *asked)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "proven: " in done.stdout
    assert "  none " not in done.stdout, "an item had nothing to test"
    report = json.loads((tmp_path / "verdict.json").read_text())
    assert report["ok"]
    found: dict[str, set[tuple[int, int]]] = {}
    for row in report["rows"]:
        found.setdefault(row["settings"]["parallel.engine"], set()).add((row["world_size"], row["ep_size"]))
    every = {(1, 1), (2, 1), (2, 2)}  # those of four ranks: test_matrix
    engines = ("native", "fsdp", "deepspeed") if HAS_DEEPSPEED else ("native", "fsdp")
    assert found == dict.fromkeys(engines, every)
    if HAS_DEEPSPEED:
        check_deepspeed(report["rows"])
        assert "not deepspeed" not in done.stdout
        assert "resize (2, 2) -> (2,2) deepspeed" in done.stderr


def check_deepspeed(all_rows: list[dict[str, Any]]) -> None:
    rows = [row for row in all_rows if row["settings"]["parallel.engine"] == "deepspeed"]
    found = {(row["world_size"], row["ep_size"], row["settings"]["parallel.zero_stage"]) for row in rows}
    assert found == {(*layout, stage) for layout in ((1, 1), (2, 1), (2, 2)) for stage in (0, 1, 2)}
    assert {row["scenario"] for row in rows} == {"parity", "half_empty", "overflow"}
    assert max(float(row[kind]["error"]) for row in rows for kind in ("dense", "expert")) <= 1e-5


SHORT = """
import sys
from dataclasses import replace
from epmoe.cli import main
from epmoe.verify import cases as cells
from epmoe.verify.faults import FAULTS
whole = cells.make_plan

def with_few_cells(*arguments, **options):
    plan = whole(*arguments, **options)
    some = [cell for cell in plan.cells if cell.ep_size == 2 and cell.engine == "native"]
    return replace(plan, cells=tuple(some[:4]))

cells.make_plan = with_few_cells
sys.argv[1:] = ["verify", *sys.argv[1:]]
"""
"""The command with few cells, for what does not depend on them."""
MISSING = f"""{SHORT}
sys.modules["deepspeed"] = None
main()
"""


@pytest.mark.slow
def test_that_deepspeed_is_missing_is_said_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "missing.py").write_text(MISSING)
    done = run_python(str(tmp_path / "missing.py"), str(CONFIG), "--ranks", "2", "parallel.engine=deepspeed")
    assert done.returncode == 0, done.stderr[-2000:]
    before, _, after = done.stdout.partition("cells, worst of all ranks")
    assert "engine: deepspeed cannot run here: ModuleNotFoundError" in before
    assert "nothing is said of engine: deepspeed" in after
    assert "not deepspeed, which this configuration asks for" in after


PLANT = f"""{SHORT}
with FAULTS[0].plant():
    main()
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["processes of its own", "torchrun"])
def test_a_fault_is_an_exit_code(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    (tmp_path / "plant.py").write_text(PLANT)
    ranks = () if launcher else ("--ranks", "2")
    done = run_python(*launcher, str(tmp_path / "plant.py"), str(CONFIG), f"out={tmp_path / 'run'}", *ranks)
    said = done.stdout + done.stderr
    assert "2x everywhere = ep_size 2" in said
    assert "until this is understood, trust runs of one layout only" in said
    if launcher:
        assert done.returncode == 1  # torchrun's own
        assert "exitcode  : 8" in said
    else:
        assert done.returncode == 8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_known_fault_is_found(tmp_path: Path) -> None:
    done = run_verify("--self-test", "--ranks", "2", "--json", str(tmp_path / "trials.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert [trial["fault"] for trial in trials] == ["the code as it is", *(fault.name for fault in FAULTS)]
    for trial, fault in zip(trials[1:], FAULTS, strict=True):
        if fault.engine == "deepspeed" and not HAS_DEEPSPEED:
            assert "ModuleNotFoundError" in trial["absent"]
        else:
            assert trial["caught_by"]
            assert fault.engine == "native" or fault.engine in trial["first"]["where"]
