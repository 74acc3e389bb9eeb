"""A trained model from its run folder or checkpoint, in one process, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from epmoe.checkpoint.store import Checkpoint, load_weights, open_checkpoint
from epmoe.config import Config
from epmoe.config_file import override_config
from epmoe.data.prepared import TOKENIZER_FOLDER
from epmoe.data.tokenizer import Tokenizer, load_tokenizer
from epmoe.errors import CheckpointError
from epmoe.models.decoder import Decoder
from epmoe.train.build import build_model

EMBEDDING = "model.embed.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model with what it was trained with."""

    model: Decoder
    tokenizer: Tokenizer
    config: Config
    """With the overrides it was loaded with."""
    checkpoint: Checkpoint


def load_trained(path: Path, *, device: torch.device, overrides: Sequence[str] = ()) -> Trained:
    """Loads a run's newest good checkpoint, or a named one, with all experts on one device, to compute with PyTorch.

    Args:
        path: Run folder, its ``ckpt`` folder, or one checkpoint.
        overrides: ``section.key=value`` on top of the checkpoint's configuration, before the model is built.

    Raises:
        ConfigError: An override is wrong.
        CheckpointError: There is none, it is damaged, its configuration is not understood, or the run's tokenizer
            is missing or another one.
    """
    checkpoint = open_checkpoint(path)
    record = checkpoint.manifest.record
    try:
        config = Config.model_validate(record.config)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint.path} has a configuration this version does not understand",
            why=str(error.errors()[0]["msg"]),
            fix="use the version of epmoe that wrote it",
        ) from None
    # How the run computed is no request to this machine: the weights are the same with PyTorch's own kernels.
    plain = config.model.model_copy(update={"attention": "sdpa", "norm": "torch"})
    config = config.model_copy(update={"model": plain})
    if overrides:
        config = override_config(config, overrides)
    tokenizer_folder = _tokenizer_folder(path, checkpoint.path)
    tokenizer = load_tokenizer(tokenizer_folder)
    if tokenizer.sha256 != record.tokenizer_hash:
        raise CheckpointError(
            f"{tokenizer_folder} has hash {tokenizer.sha256[:12]}, "
            f"{checkpoint.path.name} was trained with {record.tokenizer_hash[:12]}"
        )
    embedding = checkpoint.manifest.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        found = "not in it" if embedding is None else f"{list(embedding.shape)}, not [entries, width]"
        raise CheckpointError(
            f"{checkpoint.path} is not a checkpoint of a language model of epmoe: {EMBEDDING} is {found}"
        )
    vocab_size = embedding.shape[0]
    model = build_model(config, vocab_size, device=device, init=False)
    load_weights(checkpoint, model=model)
    return Trained(model=model.eval(), tokenizer=tokenizer, config=config, checkpoint=checkpoint)


def _tokenizer_folder(named: Path, checkpoint: Path) -> Path:
    """The tokenizer of the run that was named, or, where links lead elsewhere, of the run a checkpoint lies in."""
    # Absolute: the name may be relative to the checkpoints' folder, and "step_..." alone has no parents.
    here = named.absolute()
    around = [here, *here.parents[:3], *checkpoint.resolve().parents[:3]]
    for folder in around:
        if (folder / TOKENIZER_FOLDER).is_dir():
            return folder / TOKENIZER_FOLDER
    raise CheckpointError(
        f"{checkpoint.absolute().parent.parent / TOKENIZER_FOLDER} is missing",
        why="a checkpoint is read together with its run's tokenizer folder",
        fix="name the run's folder, or put a copy of its tokenizer folder beside the ckpt folder",
    )
