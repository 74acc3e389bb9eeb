"""The launch files: short, of valid syntax, and for Kubernetes what the published schemas allow and nothing else."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from epmoe.errors import (
    CheckpointError,
    CommError,
    ConfigError,
    DataError,
    MemoryExhausted,
    NoProgress,
    NumericsError,
    Preempted,
)
from tests.patience import HANGS_S

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
FILES = sorted(path for path in LAUNCH.rglob("*") if path.is_file())
SHELL = [path for path in FILES if path.suffix in {".sh", ".sbatch"}]
MANIFESTS = sorted((LAUNCH / "kubernetes").iterdir())
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests" / "schemas").glob("*.json")}
FINAL = (ConfigError, DataError, CheckpointError, NumericsError, MemoryExhausted, NoProgress)
"""Ends that would come again."""


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused wherever the known ones are listed, as ``kubectl`` does by default."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(inner) for key, inner in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def mistakes(document: dict[str, Any]) -> list[str]:
    """What the schema of its kind finds wrong with a Kubernetes object."""
    known = SCHEMAS[document["kind"]]
    assert document["apiVersion"] == known["apiVersion"]
    found = jsonschema.Draft202012Validator(strict(known["schema"])).iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def places(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside, those of free text left out."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from places(inner)
    if isinstance(value, dict):
        yield value


def find(document: Any, key: str) -> list[Any]:
    return [place[key] for place in places(document) if key in place]


def name_of(path: Path) -> str:
    return str(path.relative_to(LAUNCH))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_launch_file_fits_on_a_screen_and_says_how_to_start_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert any(f"launch/{name_of(path)}" in line for line in lines[:6])
    assert "epmoe launch" in path.read_text() or "epmoe, launch" in path.read_text()


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_the_shell_understands_it(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", ["CONFIG", "OUT"])
@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_a_missing_variable_is_named(path: Path, name: str) -> None:
    variables = {"PATH": "/usr/bin:/bin", "CONFIG": "a.yaml", "OUT": "runs/a"}
    del variables[name]
    done = subprocess.run(["bash", path], env=variables, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith(f"error: {name} is not set; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_the_published_schemas_allow_it(path: Path) -> None:
    assert [mistake for document in documents(path) for mistake in mistakes(document)] == []


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_a_misspelt_key_is_found_wherever_it_is(path: Path) -> None:
    """Every key in turn, of every object but those whose keys are free (labels, limits)."""
    free = {"labels", "matchLabels", "limits", "metadata"}
    for document in documents(path):
        for key in sorted({key for place in places(document) for key in place}):
            wrong = copy.deepcopy(document)
            holders = [
                place
                for outer in places(wrong)
                for name, inner in outer.items()
                if name not in free
                for place in (
                    [inner] if isinstance(inner, dict) else inner if isinstance(inner, list) else []
                )
                if isinstance(place, dict) and key in place
            ]
            for place in holders:
                place[f"{key}s"] = place.pop(key)
                assert mistakes(wrong) != [], key
                place[key] = place.pop(f"{key}s")


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_exit_codes_mean_the_same_to_jobset(path: Path) -> None:
    [policy] = [found for document in documents(path) for found in find(document, "failurePolicy")]
    [codes] = [found for document in documents(path) for found in find(document, "onExitCodes")]
    assert codes["values"] == sorted({error.exit_code for error in (*FINAL, Preempted)})

    def action(code: int) -> str:
        """As the controllers do: a Job ends for one of these reasons, and the first rule that matches wins."""
        if code not in codes["values"]:
            return "RestartJobSet"  # BackoffLimitExceeded, which no rule names
        text = f"Container node for pod a/b-node-0-1-x failed with exit code {code} matching FailJob rule at index 0"
        patterns = ((rule["action"], rule["onJobFailureMessagePatterns"]) for rule in policy["rules"])
        return next(name for name, known in patterns if any(re.search(one, text) for one in known))

    assert {action(error.exit_code) for error in FINAL} == {"FailJobSet"}
    assert action(Preempted.exit_code) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {action(code) for code in (1, CommError.exit_code, 137)} == {"RestartJobSet"}


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_a_pod_has_longer_than_its_ranks(path: Path) -> None:
    [grace] = [g for document in documents(path) for g in find(document, "terminationGracePeriodSeconds")]
    [command] = [c for document in documents(path) for c in find(document, "command")]
    [seconds] = [word.removeprefix("--grace=") for word in command if word.startswith("--grace=")]
    assert int(seconds) + 30 <= grace
