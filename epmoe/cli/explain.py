"""``epmoe train --dry-run``: the resolved configuration and what follows from it, without importing torch."""

from __future__ import annotations

from epmoe.config import Config, DataConfig, choose_ep_size
from epmoe.config_file import dump_config
from epmoe.data.prepare import given_tokenizer
from epmoe.data.tokenizer import padded_vocab_size
from epmoe.errors import DataError
from epmoe.models.sizes import count_parameters, flops_per_token

STATE_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16_params": 4, "fp16_autocast": 4, "fp64": 8}
"""Per parameter and tensor: weight or master, gradient and each of Adam's moments."""


def explain(config: Config, world_size: int) -> str:
    """The resolved configuration as YAML, then sizes as comment lines."""
    entries, remark = _entries(config.data)
    vocab_size = padded_vocab_size(entries, config.data.vocab_multiple)
    moe, train = config.moe, config.train
    counts = count_parameters(config.model, moe, vocab_size)
    ep_size = choose_ep_size(config.parallel.ep_size, world_size, moe.num_experts if moe else 1)
    local = counts.dense + counts.expert // ep_size
    if config.parallel.engine == "fsdp":  # what a rank keeps; the block in use is whole besides
        shards = ep_size if config.parallel.fsdp_shard == "hybrid" else world_size
        local = -(-counts.dense // shards) + -(-counts.expert // world_size)
    moments = 0 if config.optimizer.name == "sgd" else 2
    state = STATE_BYTES[train.precision]
    partition = -(-counts.dense // world_size) + -(-counts.expert // world_size)
    per_rank = _bytes_per_rank(config, local, partition, moments)
    checkpoint = counts.total * state * (1 + moments)
    tokens = train.global_batch_size * config.data.seq_len
    flops = flops_per_token(config.model, moe, vocab_size, config.data.seq_len)
    facts = {
        "ranks": f"{world_size}, ep_size {ep_size}, every expert on {world_size // ep_size} rank(s)",
        "vocabulary": f"{vocab_size:,}, which is {entries:,} entries and padding{remark}",
        "parameters": f"{counts.total:,} in all, {counts.active:,} active per token, {local:,} per rank",
        "tokens": f"{tokens:,} per step, {tokens * train.steps:,} in {train.steps:,} steps",
        "arithmetic": f"{flops / 1e6:.1f} MFLOP per token, {flops * tokens * train.steps / 1e12:.1f} TFLOP in all",
        "memory": f"{per_rank / 2**20:,.0f} MiB per rank for parameters, gradients and optimizer, plus activations",
        **_masks(config, world_size),
        "checkpoint": f"{checkpoint / 2**20:,.0f} MiB each, {config.checkpoint.keep} kept",
    }
    return dump_config(config) + "\n".join(f"# {name}: {text}" for name, text in facts.items())


def _bytes_per_rank(config: Config, local: int, partition: int, moments: int) -> int:
    """Parameters, gradients and optimizer.

    Args:
        local: Parameters a rank keeps.
        partition: Of those, its share where DeepSpeed cuts them up.
        moments: Tensors of optimizer state per parameter.
    """
    engine, stage = config.parallel.engine, config.parallel.zero_stage
    state, narrow = STATE_BYTES[config.train.precision], config.train.precision == "bf16_params"
    if engine == "deepspeed" and stage > 0:  # masters are apart from parameters, also where both are float32
        gradients = partition if stage == 2 else local
        return local * (2 if narrow else state) + state * (gradients + partition * (1 + moments))
    # With shards of float32 the narrow parameters exist only of the block in use.
    return local * ((2 if narrow and engine != "fsdp" else 0) + state * (2 + moments))


def _masks(config: Config, world_size: int) -> dict[str, str]:
    """What attention within documents takes: a mask of S x S for every sequence, and a float copy in every layer."""
    if config.data.cross_document:
        return {}
    sequences = config.train.micro_batch_size or -(-config.train.global_batch_size // world_size)
    numbers = sequences * config.data.seq_len**2
    return {
        "attention masks": f"{numbers / 2**20:,.0f} MiB per rank while a batch is computed, and up to "
        f"{4 * numbers / 2**20:,.0f} MiB more in each layer, because data.cross_document is false"
    }


def _entries(data: DataConfig) -> tuple[int, str]:
    """Entries of the tokenizer, and what is uncertain about them."""
    try:
        tokenizer = given_tokenizer(data)
    except DataError as error:
        return data.vocab_size, f" (data.vocab_size; the real number is not known: {error.what})"
    if tokenizer is None:
        return data.vocab_size, " (a very small text gives fewer)"
    return tokenizer.size, ""
