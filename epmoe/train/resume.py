"""Going on from a checkpoint: what may differ from the run that wrote it, and what may not."""

from __future__ import annotations

from typing import Any

from epmoe.config import Config
from epmoe.errors import CheckpointError
from epmoe.train.manifest import TrainingRecord

SHAPES = ("model.", "moe.num_experts", "moe.every", "moe.first_dense", "moe.d_ff", "moe.activation")
"""Settings that decide which tensors there are; dropout and initialisation under ``model.`` are harmless."""
HARMLESS = ("model.dropout", "model.init", "model.norm_eps", "model.rope_theta")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys."""
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in flatten(child, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def changed_keys(old: dict[str, Any], new: Config) -> list[str]:
    """``key: old -> new`` for every setting that differs, in the order of the keys."""
    before, after = flatten(old), flatten(new.model_dump(mode="json"))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


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
            f"the checkpoint of step {record.step} in {config.out} is of another architecture",
            why="; ".join(shapes[:10]),
            fix="undo these changes, or choose another out= for a new run",
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
