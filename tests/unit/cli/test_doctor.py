"""``epmoe doctor``: findings about the machine, and the report on a run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import typer

from epmoe.cli import doctor as module
from epmoe.cli.doctor import apex_finding, doctor, examine, flash_finding
from epmoe.cli.run_report import Signs, judge
from epmoe.errors import ConfigError
from epmoe.metrics.step_record import LayerHealth, StepRecord, record_to_json
from epmoe.ops import native, registration
from epmoe.train import lock
from epmoe.train.status import Status, write_status
from tests.unit.packages import Packages, pretend


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]):
    doctor(None, json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    names = {finding["name"]: finding for finding in report["findings"]}
    assert {"python", "torch", "cpu", "cores", "kernels", "rendezvous", "process group", "/dev/shm"} <= set(
        names
    )
    assert names["process group"]["status"] == "ok"
    assert names["deepspeed"]["status"] == "note"


@pytest.mark.parametrize(
    ("address", "status"), [("127.0.0.1", "ok"), ("10.1.2.3", "ok"), ("::1", "ok"), ("8.8.8.8", "warning")]
)
def test_a_rendezvous_that_can_be_reached_from_outside_is_a_warning(address, status, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    finding = module._reach(module.env.rendezvous_address().rpartition(":")[0])
    assert finding.status == status


def test_a_package_that_is_missing_is_one_problem(monkeypatch: pytest.MonkeyPatch):
    real = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: None if name == "torch" else real(name))
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = examine()
    assert [f.name for f in findings if f.status == "failure"] == ["torch"]
    assert "not looked at: torch is not installed" in [f.value for f in findings]


def test_a_look_that_fails_is_a_finding_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(module, "_process_group", lambda: 1 // 0)
    monkeypatch.setattr(module, "_storage", lambda: 1 // 0)
    monkeypatch.setattr(module._storage, "__name__", "_storage")
    failures = [f for f in examine() if f.status == "failure"]
    assert [f.part for f in failures] == ["rendezvous", "storage"]
    assert "ZeroDivisionError" in failures[0].value
    with pytest.raises(typer.Exit) as caught:
        doctor(None, json=False)
    assert caught.value.exit_code == 1
    assert "2 problem(s)" in capsys.readouterr().out


def test_without_the_extension_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EPMOE_KERNELS", raising=False)
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    monkeypatch.setattr(registration, "_STATUS", native.load_kernels())
    [finding] = module._kernels()
    assert finding.value.startswith("reference: epmoe._C is not built: it needs torch and a C++ compiler")
    assert "make build" in finding.value
    assert "\n" not in finding.value


IMPORTED = "raise SystemExit('it was imported')"


@pytest.mark.parametrize("kind", ["toolkit", "nvidia"])
def test_the_two_packages_called_apex_are_told_apart_without_importing_them(packages: Packages, kind: str):
    packages.toolkit()
    if kind == "nvidia":
        packages.apex(fused_adam=IMPORTED)
    finding = apex_finding()
    assert "apex.optimizers" not in sys.modules
    assert (finding.status == "warning") == (kind == "toolkit")
    assert ("unrelated" in finding.value) == (kind == "toolkit")
    assert ("pip uninstall apex" in (finding.fix or "")) == (kind == "toolkit")


def test_accelerators_that_are_not_there_are_not_needed(packages: Packages):
    assert [flash_finding().value, apex_finding().value] == ["not installed, not needed"] * 2


def test_accelerators_are_tried_where_there_is_a_gpu(packages: Packages, monkeypatch: pytest.MonkeyPatch):
    packages.flash(2)
    packages.apex()
    assert "flash-attn needs a GPU" in flash_finding().value
    pretend(monkeypatch, (8, 0))
    assert flash_finding().value.endswith("attention: flash-attn 2")
    assert apex_finding().value == "NVIDIA's, its FusedAdam works"


def test_accelerators_that_do_not_work_say_why(packages: Packages, monkeypatch: pytest.MonkeyPatch):
    packages.broken_flash(2, "raise ImportError('libcudart.so.12: cannot open')")
    packages.apex(fused_adam="import amp_C")
    pretend(monkeypatch, (8, 0))
    findings = [flash_finding(), apex_finding()]
    assert "ImportError: libcudart.so.12: cannot open" in findings[0].value
    assert "No module named 'amp_C'" in findings[1].value


def test_a_run_is_reported_with_its_status_last_step_and_routers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run_status.json").write_text(
        '{"state": "failed", "exit_code": 5, "step": 20, "message": ""}'
    )
    layer = LayerHealth(
        demand_E=(0, 9, 1, 2),
        kept_E=(0, 4, 1, 2),
        assignments=12,
        kept=7,
        overflow_tokens=1,
        valid_tokens=6,
        nonfinite_tokens=0,
        entropy=0.5,
    )
    record = StepRecord(
        step=20,
        tokens=100,
        samples=4,
        loss=1.5,
        lr=0.1,
        grad_norm=1.0,
        tokens_per_second=9.0,
        flops_per_second=1e9,
        memory_gib=1.0,
        seconds=1.0,
        layers={3: layer},
    )
    (tmp_path / "metrics.jsonl").write_text(record_to_json(record) + "\n")
    doctor(tmp_path, json=False)
    text = capsys.readouterr().out
    for part in ("state: failed", "exit_code: 5", "loss=1.5", "WARNING layer 3", "DEAD experts 0"):
        assert part in text
    doctor(tmp_path, json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["status"]["exit_code"], report["last"]["step"], report["routers"][0]["flagged"]) == (
        5,
        20,
        True,
    )


def test_a_run_folder_may_be_empty_or_damaged_but_must_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    doctor(tmp_path, json=False)
    assert "last metrics: none" in capsys.readouterr().out
    (tmp_path / "run_status.json").write_text('{"state"')
    (tmp_path / "metrics.jsonl").write_text("not json\n")
    doctor(tmp_path, json=False)
    assert "absent: no run_status.json that can be read" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not a run folder"):
        doctor(tmp_path / "none", json=False)


OURS = "ours"
"""Stands for this process, whose number is another in every worker of the tests."""


@pytest.mark.parametrize(
    ("state", "owner", "silent_s", "gone", "idle_s", "word"),
    [
        (None, None, 0, False, None, "absent"),
        (None, OURS, 1, False, None, "starting"),
        ("failed", "here:9:9:", 1, False, None, "starting"),  # what stands there is of the attempt before
        ("running", OURS, 1, False, None, "starting"),
        ("running", OURS, 1, False, 5, "running"),
        ("running", OURS, 1, False, 61, "running"),  # they come every 7 s
        ("running", OURS, 1, False, 71, "hanging"),
        ("running", OURS, 400, True, 400, "dead"),
        ("running", None, 0, False, 5, "dead"),
        (None, OURS, 1, True, None, "dead"),
        ("done", None, 0, False, 5, "done"),
        ("stopped", None, 0, False, 5, "stopped"),
        ("failed", OURS, 9, True, 5, "failed"),
    ],
)
def test_what_the_signs_of_a_run_mean(state, owner, silent_s, gone, idle_s, word):
    status = None if state is None else Status(state=state, attempt=OURS)
    signs = Signs(owner=owner, silent_s=silent_s, gone=gone, idle_s=idle_s, usual_s=7.0)
    verdict = judge(status, signs)
    assert verdict.word == word
    assert verdict.healthy == (word not in ("hanging", "dead"))


@pytest.mark.parametrize(
    ("owner", "age_s", "word"),
    [
        (OURS, 0, "starting"),
        ("elsewhere:1:1:", lock.SILENT_S - 60, "starting"),
        ("elsewhere:1:1:", lock.SILENT_S + 60, "dead"),
        ("no such process", 0, "dead"),
    ],
)
def test_the_signs_are_read_from_the_folder_on_any_node(tmp_path, capsys, owner, age_s, word):
    here = lock.identity()
    owner = {OURS: here, "no such process": f"{here.split(':')[0]}:4194305:1:"}.get(owner, owner)
    write_status(tmp_path, Status(state="running", attempt=owner))
    (tmp_path / ".lock").write_text(owner)
    os.utime(tmp_path / ".lock", (0, time.time() - age_s))
    with pytest.raises(typer.Exit) if word == "dead" else contextlib.nullcontext():
        doctor(tmp_path, json=True)
    assert json.loads(capsys.readouterr().out)["verdict"] == word
