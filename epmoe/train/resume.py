"""Going on from a checkpoint: what may differ from the run that wrote it, and what may not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from epmoe import env
from epmoe.checkpoint.manifest import CHECKPOINTS, MANIFEST, Counters, TrainingRecord
from epmoe.checkpoint.store import (
    Checkpoint,
    find_resumable,
    load_checkpoint,
    load_weights,
    open_checkpoint,
    remove_unfinished,
    require_space,
    warn_passed_over,
)
from epmoe.config import Config
from epmoe.data.loader import TrainData
from epmoe.data.prepared import PreparedData
from epmoe.engines.optimizer import scheduled_rate
from epmoe.errors import CheckpointError
from epmoe.metrics.terminal import say
from epmoe.process.runtime import on_rank_zero
from epmoe.train.build import in_groups
from epmoe.train.loss_scale import restored_scale
from epmoe.train.run_folder import RunFolder
from epmoe.train.status import STATUS, newest_saved
from epmoe.train.trainer import Progress, Trainer

SHAPES = (
    "model.",
    "moe.num_experts",
    "moe.every",
    "moe.first_dense",
    "moe.d_ff",
    "moe.activation",
    "moe.shared_experts",
    "optimizer.name",
    "train.freeze",
)
"""Settings that decide which tensors there are or what they mean, but for the harmless ones."""
HARMLESS = (
    "model.dropout",
    "model.init",
    "model.attention:",
    "model.norm:",
    "optimizer.name: adamw -> apex_fused_adam",
    "optimizer.name: apex_fused_adam -> adamw",
)
"""Beginnings of the lines of changes that leave every tensor what it is."""


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys."""
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in flatten(child, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def changed_keys(old: dict[str, Any], new: Config) -> list[str]:
    """``key: old -> new`` for every setting that differs, in the order of the keys."""
    both = (_with_defaults(old), new.model_dump(mode="json"))
    before, after = (_resolved(flatten(env.masked(one))) for one in both)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _with_defaults(old: dict[str, Any]) -> dict[str, Any]:
    """A configuration from before a key existed had what is now its default."""
    try:
        return Config.model_validate(old).model_dump(mode="json")
    except ValidationError:
        return old


def _resolved(flat: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the model that are left to others, spelled out: null and the number it stands for are no change.

    A checkpoint may say anything there.
    """
    width, heads = flat.get("model.d_model"), flat.get("model.num_heads")
    stands_for = {
        "model.num_kv_heads": heads,
        "model.head_dim": width // heads
        if isinstance(width, int) and isinstance(heads, int) and heads
        else None,
        "moe.d_ff": flat.get("model.d_ff"),
    }
    return flat | {key: value for key, value in stands_for.items() if key in flat and flat[key] is None}


def rate_change(old: dict[str, Any], config: Config, step: int) -> str | None:
    """What a resume does to the learning rate of the next step; None where it stays, or nobody knows what it was.

    Args:
        old: The configuration of the checkpoint.
        step: Its step.
    """
    try:
        before = scheduled_rate(Config.model_validate(old), step)
    except ValueError:
        return None
    after = scheduled_rate(config, step)
    if math.isclose(before, after, rel_tol=1e-6):
        return None
    advice = (
        "; optimizer.schedule_steps keeps a schedule's length"
        if config.optimizer.schedule_steps is None
        else ""
    )
    return f"the learning rate goes on at {after:.3g} instead of {before:.3g}{advice}"


def check_resumable(
    record: TrainingRecord, config: Config, *, data_fingerprint: str, tokenizer_hash: str
) -> list[str]:
    """What changed since the checkpoint was written -> ``key: old -> new`` lines for the log.

    Raises:
        CheckpointError: The model has another shape, or the samples are other ones (unless
            ``checkpoint.allow_data_change``).
    """
    changes = changed_keys(record.config, config)
    shapes = [line for line in changes if line.startswith(SHAPES) and not line.startswith(HARMLESS)]
    if shapes:
        raise CheckpointError(
            f"the checkpoint of step {record.step} in {config.out} is of another model or optimizer",
            why="; ".join(shapes[:10]),
            fix="undo these changes, or choose another out= for a new run, which may take its weights: train.init_from",
        )
    if record.tokenizer_hash != tokenizer_hash:
        raise CheckpointError(
            f"the checkpoint of step {record.step} was trained with tokenizer {record.tokenizer_hash[:12]}, "
            f"the data is prepared with {tokenizer_hash[:12]}",
            fix="use the old tokenizer, or choose another out= for a new run",
        )
    if record.data_fingerprint != data_fingerprint and not config.checkpoint.allow_data_change:
        raise CheckpointError(
            f"the samples changed since step {record.step}: fingerprint {record.data_fingerprint[:12]} then, "
            f"{data_fingerprint[:12]} now",
            why="; ".join(line for line in changes if line.startswith(("data.", "seed")))
            or "the text changed",
            fix="undo the change, or set checkpoint.allow_data_change=true to go on with other samples",
        )
    return changes


def resume(folder: RunFolder, trainer: Trainer, data: TrainData, prepared: PreparedData) -> float:
    """Loads the newest good checkpoint, or the weights ``init_from`` names -> training seconds so far. A collective.

    Raises:
        CheckpointError: The checkpoint does not go with the configuration, none of several is usable, or all are gone.
    """
    config, checkpoints = trainer.config, folder.path / CHECKPOINTS
    on_rank_zero(lambda: remove_unfinished(checkpoints), CheckpointError)
    require_space(checkpoints, model=trainer.model, engine=trainer.engine, keep=config.checkpoint.keep)
    found = find_resumable(checkpoints)
    if found.checkpoint is None:
        if found.rejected:
            raise CheckpointError(
                f"none of the {len(found.rejected)} checkpoint(s) in {checkpoints} is usable",
                why="; ".join(found.rejected),
                fix="bring one of them back, or choose another out= to begin anew",
            )
        on_rank_zero(lambda: _require_new(folder.path), CheckpointError)
        _start_from(folder, trainer, prepared)
        return 0.0
    changes = check_resumable(
        found.checkpoint.manifest.record,
        config,
        data_fingerprint=data.fingerprint,
        tokenizer_hash=prepared.tokenizer.sha256,
    )
    progress, seconds = _progress_of(found.checkpoint, config)
    load_checkpoint(found.checkpoint, model=trainer.model, engine=trainer.engine, mesh=trainer.mesh)
    trainer.progress = progress
    if folder.is_writer:
        warn_passed_over(found)
        say(f"resuming from {found.checkpoint.path} (step {progress.step})")
        for line in changes:
            say(f"  changed since: {line}")
        if rate := rate_change(found.checkpoint.manifest.record.config, config, progress.step):
            say(f"  {rate}")
    return seconds


def _require_new(run: Path) -> None:
    """Where there is no checkpoint, none may ever have been: a new run would write over the records of that one."""
    if saved := newest_saved(run):
        raise CheckpointError(
            f"{run / CHECKPOINTS} holds no checkpoint, and {STATUS} says that step {saved} was saved there",
            why="the folder was moved, emptied, or its disk is not mounted",
            fix="bring the checkpoints back, or choose another out= to begin anew",
        )


def _progress_of(checkpoint: Checkpoint, config: Config) -> tuple[Progress, float]:
    """Where training stood, and the seconds it had taken."""
    record = checkpoint.manifest.record
    try:
        counters = Counters.model_validate(record.trainer)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(
            f"{checkpoint.path / MANIFEST}: record.trainer.{problem['loc'][0]}: {problem['msg']}",
            fix="use the version of epmoe that wrote it, or another checkpoint",
        ) from None
    scale = restored_scale(config.train.precision, counters.model_dump(exclude_none=True))
    progress = Progress(
        step=record.step,
        samples=record.samples,
        tokens=record.tokens,
        skipped=counters.skipped,
        skipped_in_a_row=counters.skipped_in_a_row,
        overflowed=counters.overflowed,
        empty=counters.empty,
        loss_scale=scale,
    )
    return progress, counters.seconds


def _start_from(folder: RunFolder, trainer: Trainer, prepared: PreparedData) -> None:
    """Loads the weights ``init_from`` names, if it names any."""
    config = trainer.config
    if config.train.init_from is None:
        return
    start = open_checkpoint(Path(config.train.init_from))
    theirs, ours = start.manifest.record.tokenizer_hash, prepared.tokenizer.sha256
    if theirs != ours:
        raise CheckpointError(
            f"train.init_from={config.train.init_from} was trained with tokenizer {theirs[:12]}, "
            f"the data is prepared with {ours[:12]}",
            why="the rows of its embedding would stand for other tokens",
            fix="data.tokenizer=RUN/tokenizer/tokenizer.json, with RUN the run it comes from",
        )
    new = config.train.init_without
    load_weights(
        start,
        model=trainer.model,
        engine=trainer.engine,
        mesh=trainer.mesh,
        leave=lambda name: in_groups(name, new),
    )
    if folder.is_writer:
        without = f" without {', '.join(new)}, which is new" if new else ""
        say(f"starting from the weights of {start.path}{without}")
