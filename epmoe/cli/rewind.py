"""``epmoe rewind``: the next start of a run goes on from an earlier checkpoint. Nothing is deleted; no torch needed."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

from epmoe.checkpoint.manifest import CHECKPOINTS, candidates, damaged_files, read_manifest, step_folder
from epmoe.errors import CheckpointError, ConfigError
from epmoe.train import lock
from epmoe.train.status import METRICS

ASIDE = ("run_status.json", "attempts.json", "summary.json")
"""What a run says about its end, which it has not reached then."""


def rewind(run: Path, step: int) -> None:
    """Moves newer checkpoints, and what tells of the steps after them, into a folder beside the older ones.

    Args:
        run: A run folder that no process owns.
        step: Of a checkpoint it holds.

    Raises:
        ConfigError: The folder is not there, or in use.
        CheckpointError: There is no undamaged checkpoint of that step.
    """
    checkpoints = run / CHECKPOINTS
    if not run.is_dir():
        raise ConfigError(f"{run} is no run folder", fix="name the folder that out= named")
    lock.take(run / lock.NAME)
    try:
        _require_good(checkpoints, step)
        newer = [path for path in candidates(checkpoints) if path.name > step_folder(step)]
        aside = _new_folder(checkpoints, step)
        for path in [*newer, *(run / name for name in ASIDE)]:
            if os.path.lexists(path):
                shutil.move(path, aside / path.name)
        if (run / METRICS).exists():
            shutil.copy2(run / METRICS, aside)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be moved: {error.strerror}") from None
    finally:
        lock.give_back(run / lock.NAME)
    print(f"The next start in {run} goes on from step {step}. What came after it is in {aside}.")


def _require_good(checkpoints: Path, step: int) -> None:
    path = checkpoints / step_folder(step)
    found = candidates(checkpoints)
    if path not in found:
        steps = ", ".join(str(int(other.name[5:])) for other in found) or "none"
        raise CheckpointError(f"{checkpoints} has no checkpoint of step {step}", why=f"it has {steps}")
    manifest = read_manifest(path)
    if problems := damaged_files(path, manifest.files):
        raise CheckpointError(f"{path} is damaged: {problems[0]}", fix="choose another step")


def _new_folder(checkpoints: Path, step: int) -> Path:
    for number in itertools.count(1):
        folder = checkpoints / f"after-{step_folder(step)}-{number}"
        if not os.path.lexists(folder):
            folder.mkdir()
            return folder
    raise AssertionError("numbers end")
