"""The end of a run: what was reached, how the routers are, and a sample of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epmoe.config import Config
from epmoe.data.files import write_json
from epmoe.data.prepared import PreparedData
from epmoe.data.yardsticks import Yardsticks, yardsticks
from epmoe.errors import Preempted
from epmoe.metrics.router_chart import write_chart
from epmoe.metrics.router_health import RouterHistory
from epmoe.metrics.terminal import say
from epmoe.models.decoder import Decoder
from epmoe.process.runtime import Runtime
from epmoe.train.evaluate import Evaluation
from epmoe.train.generate import generate
from epmoe.train.status import METRICS

CHART = "router.svg"
SUMMARY = "summary.json"


def finish(
    config: Config,
    folder: Path,
    prepared: PreparedData,
    model: Decoder,
    evaluations: list[Evaluation],
    *,
    place: Runtime,
    should_stop: Callable[[], bool],
) -> None:
    """Prints and stores the results of a run. Every rank calls it; rank 0 prints.

    Writes ``summary.json`` and ``router.svg``.
    """
    text = sample_text(config, prepared, model, place)
    if place.rank > 0:
        return
    results: list[dict[str, Any]] = []
    for evaluation in evaluations:
        try:
            sticks = yardsticks(prepared, evaluation.name, should_stop=should_stop)
        except Preempted:
            raise Preempted(
                "stopped during the final report; training is done and its checkpoint is written",
                fix="run the same command to get the report",
            ) from None
        say("\n".join(_verdict(evaluation, sticks, sparse=config.moe is not None)))
        results.append(
            {**asdict(evaluation), "perplexity": evaluation.perplexity, "yardsticks": asdict(sticks)}
        )
    if not evaluations:
        say("no validation loss: no source has validation text (data.sources[].val_path names some)")
    history = RouterHistory.from_jsonl(folder / METRICS)
    health = history.summary()
    if health:
        say("router health over the last 20% of the steps:")
        for layer in health:
            say(f"  {'!' if layer.flagged else ' '} {layer.sentence()}")
    write_chart(history, folder / CHART, title=str(folder))
    say(f"chart of loss and expert load: {folder / CHART}")
    if text:
        say(f"a sample, prompt {config.train.sample.prompt!r}:\n{text}")
    summary = {
        "validation": results,
        "router_health": [
            {"layer": layer.layer, "flagged": layer.flagged, "sentence": layer.sentence()} for layer in health
        ],
        "sample": text,
    }
    write_json(folder / SUMMARY, summary)


def _verdict(evaluation: Evaluation, sticks: Yardsticks, *, sparse: bool) -> list[str]:
    """Bits per byte and what they mean, line by line."""
    bits = evaluation.bits_per_byte
    dropped = f", drop rate {evaluation.drop_rate:.1%}" if sparse else ""
    lines = [
        f"validation {evaluation.name}: {evaluation.loss:.4f} nats per token, perplexity {evaluation.perplexity:.2f}"
        f"{'' if bits is None else f', {bits:.4f} bits per byte'} "
        f"({evaluation.num_tokens:,} tokens{dropped})"
    ]
    if bits is None:
        return [*lines, f"  no bits per byte: {evaluation.bits_left_out}"]
    named = {
        "unigram model of the same tokens": sticks.unigram,
        "xz -9e of the validation text": sticks.xz,
        "xz -9e, given the training text": sticks.xz_after_train,
    }
    for name, value in named.items():
        if value is not None:
            side = "below" if bits < value else "above"
            apart = abs(1 - bits / value) if value else math.inf  # 0: the training text has all of it
            lines.append(f"  {apart:6.1%} {side} {value:.4f}, the {name}")
    if sticks.xz_left_out is not None:
        lines.append(f"  no comparison with xz of the validation text: {sticks.xz_left_out}")
    return lines


def sample_text(config: Config, prepared: PreparedData, model: Decoder, place: Runtime) -> str:
    """A continuation of ``train.sample.prompt``, prompt included; empty when no tokens are asked for.

    With experts on several ranks it is a collective; rank 0's draws count.
    """
    sample, tokenizer = config.train.sample, prepared.tokenizer
    if sample.tokens == 0:
        return ""

    def agree(token: int) -> int:
        drawn = torch.tensor([token], device=place.device)
        dist.broadcast(drawn, 0)
        return int(drawn)

    prompt = tokenizer.encode(sample.prompt) or [tokenizer.eos_id]
    tokens = generate(
        model,
        prompt,
        max_tokens=sample.tokens,
        temperature=sample.temperature,
        top_p=sample.top_p,
        seed=config.seed,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.size,
        agree=agree,
    )
    return tokenizer.decode([*prompt, *tokens])
