"""``epmoe prepare``: turns text into token files ahead of training, checks them, and prints what is in them."""

from __future__ import annotations

from pathlib import Path

from epmoe.data.prepare import prepare as prepare_data
from epmoe.data.prepared import (
    PreparedData,
    PreparedSplit,
    check_trainable,
    source_lines,
    text_warning,
    verify_split,
)
from epmoe.data.progress import console_progress
from epmoe.errors import printable
from epmoe.process.stop_signals import stop_on_signals


def prepare(config: Path, overrides: list[str]) -> None:
    """Prepares the data of a configuration, reads it back once completely, and prints statistics.

    Args:
        config: YAML file.
        overrides: ``section.key=value``.
    """
    from epmoe.config_file import load_config

    cfg = load_config(config, overrides).data
    with stop_on_signals() as stopped, console_progress() as progress:
        prepared = prepare_data(cfg, progress=progress, should_stop=stopped)
        check_trainable(prepared, cfg.seq_len)
        for source in prepared.sources:
            for split in (source.train, source.val):
                if split is not None:
                    verify_split(split, prepared.tokenizer, stopped)
    print(printable("\n".join(statistics(prepared))))


def statistics(prepared: PreparedData) -> list[str]:
    """Lines of text: the tokenizer, and one row per source and split."""
    tokenizer = prepared.tokenizer
    lines = [
        f"prepared {prepared.folder}",
        *source_lines(prepared),
        f"tokenizer {tokenizer.name}: {tokenizer.size} entries, {prepared.padded_vocab_size} with padding",
        f"{'source':<16} {'split':<5} {'documents':>10} {'tokens':>13} {'bytes':>14} {'bytes/token':>11} "
        f"{'repaired':>8} {'empty':>6}",
    ]
    for source in prepared.sources:
        lines.append(_row(source.name, "train", source.train))
        if source.val is None:
            lines.append(f"{source.name:<16} val   none: it has no validation text (see val_path)")
        else:
            lines.append(_row(source.name, "val", source.val))
    warning = text_warning(prepared)
    return lines if warning is None else [*lines, warning]


def _row(name: str, split_name: str, split: PreparedSplit) -> str:
    facts = split.facts
    size = "unknown" if facts.utf8_bytes is None else f"{facts.utf8_bytes:,}"
    ratio = "" if facts.utf8_bytes is None else f"{facts.utf8_bytes / max(facts.stream_tokens, 1):.2f}"
    return (
        f"{name:<16} {split_name:<5} {facts.documents:>10,} {facts.stream_tokens:>13,} {size:>14} {ratio:>11} "
        f"{split.replaced:>8,} {split.empty:>6,}"
    )
