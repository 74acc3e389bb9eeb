"""``epmoe eval``: bits per byte and perplexity of a checkpoint, dropless and with the training capacity."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from epmoe.config import Config
from epmoe.data.loader import validation_sets
from epmoe.data.prepare import prepare
from epmoe.data.prepared import TOKENIZER_FOLDER
from epmoe.data.progress import console_progress, plain_progress
from epmoe.errors import CheckpointError, ConfigError, DataError, printable
from epmoe.models.decoder import Decoder
from epmoe.process import runtime
from epmoe.train.evaluate import Evaluation
from epmoe.train.evaluate import evaluate as evaluate_set
from epmoe.train.load_trained import load_trained

OVERRIDABLE = ("train.precision", "train.micro_batch_size", "train.final_eval_samples", "moe.capacity_factor")
"""Keys that may differ from the run's, besides those of the data; the others describe training or the weights."""


def evaluate(checkpoint: Path, overrides: list[str], json: bool) -> None:
    """Evaluates every validation source in one process, without and (for MoE models) with expert capacity.

    Args:
        checkpoint: Run folder or checkpoint.
        overrides: ``section.key=value`` on top of the run's configuration: ``data.*`` or one of ``OVERRIDABLE``.
        json: Print one JSON object.

    Raises:
        ConfigError: An override that evaluation does not depend on.
        CheckpointError: The checkpoint cannot be used, or the data has another tokenizer.
        DataError: The data cannot be used, or has no validation text.
    """
    _check_overrides(overrides)
    place = runtime.start("auto", 60.0)
    try:
        trained = load_trained(checkpoint, device=place.device, overrides=overrides)
        config = trained.config
        with console_progress() as progress:
            prepared = prepare(config.data, progress=progress)
        if prepared.tokenizer.sha256 != trained.tokenizer.sha256:
            folder = trained.checkpoint.path.absolute().parent.parent / TOKENIZER_FOLDER
            raise CheckpointError(
                f"the data is prepared with tokenizer {prepared.tokenizer.sha256[:12]}, the model was trained with "
                f"{trained.tokenizer.sha256[:12]}",
                fix=f"data.tokenizer={folder} uses the run's own",
            )
        validation = validation_sets(prepared, config.data)
        if not validation:
            names = ", ".join(source.name for source in prepared.sources)
            raise DataError(
                "there is nothing to evaluate on",
                why=f"no source has validation text: {names}",
                fix="data.sources.0.val_path=PATH names some",
            )
        results = {
            mode: [
                evaluate_set(
                    trained.model,
                    data,
                    rank=0,
                    world_size=1,
                    batch_size=config.train.eval_batch_size or config.train.micro_batch_size or 16,
                    precision=config.train.precision,
                    device=place.device,
                    max_windows=config.train.final_eval_samples,
                    poll=partial(plain_progress("evaluate", unit="windows"), f"{data.name}, {mode}"),
                )
                for data in validation
            ]
            for mode in _modes(trained.model, config)
        }
    finally:
        runtime.stop(place)
    text = _as_text(str(trained.checkpoint.path), results, sparse=config.moe is not None)
    print(_as_json(results) if json else printable(text))


def _check_overrides(overrides: list[str]) -> None:
    keys = [override.partition("=")[0].strip() for override in overrides]
    refused = [key for key in keys if key not in OVERRIDABLE and not key.startswith("data.")]
    if refused:
        raise ConfigError(
            f"epmoe eval cannot change {', '.join(refused)}",
            why="the model is the one that was trained",
            fix=f"what can be changed: data.*, {', '.join(OVERRIDABLE)}",
        )


def _modes(model: Decoder, config: Config) -> Iterator[str]:
    """The name of each way to evaluate, with the model set to it."""
    factors: dict[str, float | None] = {"dropless": None}
    if config.moe is not None and config.moe.capacity_factor is not None:
        factors[f"capacity factor {config.moe.capacity_factor}"] = config.moe.capacity_factor
    for name, factor in factors.items():
        for layer in model.moe_layers():
            layer.moe = layer.moe.model_copy(update={"capacity_factor_eval": factor})
        yield name


def _as_text(path: str, results: dict[str, list[Evaluation]], *, sparse: bool) -> str:
    lines = [path]
    for mode, evaluations in results.items():
        for one in evaluations:
            dropped = f", drop rate {one.drop_rate:.2%}" if sparse else ""
            bits = "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f} bits per byte, "
            lines.append(
                f"  {one.name}, {mode}: {bits}perplexity {one.perplexity:.3f}, {one.loss:.4f} nats per token, "
                f"{one.num_tokens:,} tokens{dropped}"
            )
            if one.bits_left_out is not None:
                lines.append(f"    no bits per byte: {one.bits_left_out}")
    return "\n".join(lines)


def _as_json(results: dict[str, list[Evaluation]]) -> str:
    listed = {
        mode: [{**asdict(one), "perplexity": one.perplexity} for one in evaluations]
        for mode, evaluations in results.items()
    }
    return json_module.dumps(listed)
