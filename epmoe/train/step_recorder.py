"""From the sums of a few steps to the record people and trackers see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from epmoe.config import Config
from epmoe.metrics.step_record import LayerHealth, StepRecord
from epmoe.metrics.throughput import Clock, memory_gib, peak_flops
from epmoe.models.sizes import flops_per_token, is_moe_layer
from epmoe.parallel.reduce_sums import add_sums
from epmoe.train.step import StepSums
from epmoe.train.trainer import Progress, StepResult
from epmoe.types import LayerSums


class Recorder:
    """Adds up steps and turns them into one record per logging interval.

    Args:
        config: The run.
        vocab_size: Padded vocabulary, V.
        device: This rank's device.
        world_size: Ranks of the job.
        seconds: Training time of earlier attempts, in seconds.
    """

    def __init__(
        self, config: Config, vocab_size: int, device: torch.device, world_size: int, seconds: float
    ) -> None:
        moe = config.moe
        self.sources = [source.name for source in config.data.sources]
        self.layers = [i for i in range(config.model.num_layers) if moe is not None and is_moe_layer(moe, i)]
        self.flops_per_token = flops_per_token(config.model, moe, vocab_size, config.data.seq_len)
        self.device, self.world_size = device, world_size
        self.seconds = seconds
        """Training time so far, over all restarts; evaluation and checkpoints are not in it."""
        self.clock = Clock()
        self.latest: StepRecord | None = None
        """The last record, or the one a resumed run finds of the step it resumes from."""
        self._clear()

    def _clear(self) -> None:
        self._sums: StepSums | None = None
        self._steps, self._tokens, self._routed, self._seen = 0, 0, 0, 0
        self._last: StepResult | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block does not count as training time."""
        self.clock.pause()
        try:
            yield
        finally:
            self.clock.go_on()

    def add(self, result: StepResult) -> None:
        """Takes one step."""
        self._steps += 1
        self._seen += result.num_routed
        self._last = result
        if result.finite:  # one NaN would hide the other steps of the interval
            self._sums = add_sums(self._sums, result.sums)
            self._tokens += result.num_tokens
            self._routed += result.num_routed

    def record(self, progress: Progress, val: Mapping[str, float]) -> StepRecord | None:
        """The record of the steps since the last one; with no step, but a validation, the last one with that.

        Loss and loads are means and sums over all finite steps; learning rate, norm and clip are the last step's. The
        loss is a mean over the tokens that count in it, auxiliary losses over those that were routed.

        Returns:
            None if there is nothing new.
        """
        result = self._last
        if result is None:
            if self.latest is None or self.latest.step != progress.step or not val:
                return None
            return replace(self.latest, val=dict(val))
        spent = self.clock.lap()
        self.seconds += spent
        sums, tokens, routed = self._sums, self._tokens, max(self._routed, 1)
        if sums is None:  # no step of the interval was finite
            sums, tokens, routed = result.sums, result.num_tokens, max(result.num_routed, 1)
        per_second = self._seen / max(spent, 1e-9)
        flops = per_second * self.flops_per_token
        peak = peak_flops(self.device)
        aux = {name: float(value) / routed for name, value in sums.aux.items()}
        self.latest = StepRecord(
            step=progress.step,
            tokens=progress.tokens,
            samples=progress.samples,
            loss=float(sums.loss) / tokens if tokens else math.nan,
            loss_tokens=tokens,
            source_loss=self._source_loss(sums),
            aux=aux,
            lr=result.lr,
            grad_norm=result.grad_norm,
            clip=result.clip,
            tokens_per_second=per_second,
            flops_per_second=flops,
            seconds_per_step=spent / self._steps,
            mfu=flops / (peak * self.world_size) if peak else None,
            memory_gib=memory_gib(self.device),
            seconds=self.seconds,
            skipped_steps=progress.skipped,
            overflowed_steps=progress.overflowed,
            empty_steps=progress.empty,
            loss_scale=progress.loss_scale.factor if progress.loss_scale else None,
            layers={number: layer_health(did) for number, did in zip(self.layers, sums.layers, strict=True)},
            val=dict(val),
        )
        self._clear()
        return self.latest

    def _source_loss(self, sums: StepSums) -> dict[str, float]:
        if sums.source_loss is None or sums.source_tokens is None:
            return {}
        pairs = zip(sums.source_loss.tolist(), sums.source_tokens.tolist(), strict=True)
        losses = (loss / tokens if tokens else math.nan for loss, tokens in pairs)
        return dict(zip(self.sources, losses, strict=True))


def layer_health(did: LayerSums) -> LayerHealth:
    """What an MoE layer's router did, in plain numbers."""
    kept_E, valid_tokens = tuple(int(n) for n in did.kept_E), int(did.valid_tokens)
    return LayerHealth(
        demand_E=tuple(int(n) for n in did.demand_E),
        kept_E=kept_E,
        assignments=int(did.assignments),
        kept=sum(kept_E),
        overflow_tokens=int(did.overflow_tokens),
        valid_tokens=valid_tokens,
        nonfinite_tokens=int(did.nonfinite_tokens),
        entropy=float(did.entropy) / max(valid_tokens, 1),
    )
