"""Optimizer steps: accumulation, reduction, norm, the decision all ranks take together, update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe import env
from epmoe.config import Config, loss_coefficients
from epmoe.data.loader import Batch, TrainData
from epmoe.engines.optimizer import scheduled_rate
from epmoe.errors import DataError, NumericsError
from epmoe.models.decoder import Decoder
from epmoe.parallel.mesh import ExpertMesh
from epmoe.parallel.norm import clip_coefficient
from epmoe.parallel.reduce_sums import add_sums, all_reduce_sums
from epmoe.process.runtime import Agreed, Runtime, raise_together
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_engine
from epmoe.train.loss_scale import LossScale, new_loss_scale
from epmoe.train.step import StepSums, micro_step, tell_layers


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run is: all a checkpoint remembers besides tensors, since data order and draws are stateless."""

    step: int = 0
    """Finished optimizer steps, skipped ones included."""
    samples: int = 0
    """Sequences used, which is also the number of the next sample."""
    tokens: int = 0
    """Tokens that counted in the loss."""
    skipped: int = 0
    """Steps without an update because something was not finite."""
    skipped_in_a_row: int = 0
    overflowed: int = 0
    """Steps without an update because gradients overflowed under a loss scale that can shrink; not among the former."""
    empty: int = 0
    """Steps without an update because no token counted in the loss."""
    loss_scale: LossScale | None = None
    """``fp16_autocast`` alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step, summed over all ranks and micro-batches."""

    sums: StepSums
    num_tokens: int
    """Tokens that counted in the loss."""
    num_routed: int
    """Tokens that were processed: all but padding."""
    grad_norm: float
    clip: float
    """Factor the gradients were multiplied by."""
    lr: float
    finite: bool
    """False: the update was left out."""
    overflow: bool = False
    """The reason: the loss scale, which is smaller now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepTokens:
    """Tokens of a step over all ranks and micro-batches."""

    in_loss: int
    routed: int


class StopRequested(Agreed):
    """Some rank was asked to stop; raised on all ranks at the same step."""


class TimeUp(Agreed):
    """``train.max_minutes`` are over; raised on all ranks at the same step."""


class Trainer:
    """Everything that changes during training, and one method per optimizer step.

    Args:
        config: The run.
        runtime: This rank's place.
        mesh: Who shares experts with whom.
        model: The decoder with this rank's experts.
        data: Training samples by number.
        stop: Set by signals.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        mesh: ExpertMesh,
        *,
        model: Decoder,
        data: TrainData,
        stop: StopFlag,
    ) -> None:
        self.config, self.runtime, self.mesh = config, runtime, mesh
        self.model, self.data, self.stop = model, data, stop
        self.engine = build_engine(config, model, mesh)
        self.progress = Progress(loss_scale=new_loss_scale(config.train.precision))
        train = config.train
        self.micro_batch = train.micro_batch_size or train.global_batch_size // mesh.dp_size
        self.num_micro = train.global_batch_size // (self.micro_batch * mesh.dp_size)

    def step(self, *, out_of_time: bool = False) -> StepResult:
        """One optimizer step. A collective.

        Raises:
            StopRequested, TimeUp, DataError: On all ranks, before anything of the step was done.
            NumericsError: On all ranks, when the policy for non-finite steps says so.
        """
        number = self.progress.step + 1
        if env.fault("train.step_start", step=number) == "oom":
            raise torch.OutOfMemoryError("injected: out of memory")
        damaged: DataError | None = None
        try:
            batches = [self.data.batch(self.sample_numbers(micro)) for micro in range(self.num_micro)]
        except DataError as error:
            batches, damaged = [], error
        tokens = self._agree(batches, damaged, out_of_time)
        self.model.train()
        self.engine.zero()
        local: StepSums | None = None
        for batch in batches:
            tell_layers(self.model, local)
            sums = micro_step(
                self.model,
                batch.to(self.runtime.device),
                num_tokens=max(tokens.in_loss, 1),
                num_routed=max(tokens.routed, 1),
                coefficients=loss_coefficients(self.config.moe, self.progress.step),
                precision=self.config.train.precision,
                backward=self._backward,
            )
            local = add_sums(local, sums)
        self._poison(env.fault("train.after_backward", step=number))
        self.engine.reduce()
        if self.progress.loss_scale is not None:
            self.engine.clip(torch.tensor(1 / self.progress.loss_scale.factor))
        assert local is not None  # there is a micro-batch
        sums = all_reduce_sums(local, self.mesh.world_group)
        return self._update(sums, tokens, self.engine.norm())

    def _backward(self, objective: Tensor) -> None:
        loss_scale = self.progress.loss_scale
        self.engine.backward(objective if loss_scale is None else objective * loss_scale.factor)

    def sample_numbers(self, micro: int) -> list[int]:
        """Samples of this rank in a micro-batch of the next step. Together the ranks and micro-batches of a step
        cover the same numbers in every layout."""
        start = self.progress.samples + (micro * self.mesh.dp_size + self.mesh.dp_rank) * self.micro_batch
        return list(range(start, start + self.micro_batch))

    def _agree(self, batches: list[Batch], damaged: DataError | None, out_of_time: bool) -> _StepTokens:
        """Tokens of the step over all ranks; the same small all-reduce tells whether anybody has to stop."""
        local = {
            "in_loss": sum(int(batch.loss_BS.sum()) for batch in batches),
            "routed": sum(_num_routed(batch) for batch in batches),
            "damaged": damaged is not None,
            "stop": self.stop.requested,
            "time": out_of_time,
        }
        tensors = {name: torch.tensor(value) for name, value in local.items()}
        agreed = all_reduce_sums(tensors, self.mesh.world_group)
        if agreed["damaged"] > 0:
            raise_together(damaged)
        if agreed["stop"] > 0:
            raise StopRequested
        if agreed["time"] > 0:
            raise TimeUp
        return _StepTokens(in_loss=int(agreed["in_loss"]), routed=int(agreed["routed"]))

    def check_stop(self) -> None:
        """Raises StopRequested on all ranks when any of them was asked to stop. A collective."""
        wish = torch.tensor(self.stop.requested)
        if all_reduce_sums({"stop": wish}, self.mesh.world_group)["stop"] > 0:
            raise StopRequested

    def _poison(self, value: str | None) -> None:
        if value is not None:
            some = next(part.local for part in self.engine.gradients().values() if part.local.numel())
            some.view(-1)[0] = float(value)

    def _update(self, sums: StepSums, tokens: _StepTokens, norm: Tensor) -> StepResult:
        progress, optimizer = self.progress, self.config.optimizer
        lr = scheduled_rate(self.config, progress.step)
        coefficient = clip_coefficient(norm, optimizer.clip_norm)
        grad_norm, clip = torch.stack((norm, coefficient)).tolist()
        broken_tokens = sum(int(layer.nonfinite_tokens) for layer in sums.layers)
        # Loss, norm and counts are the same bits on every rank, so every rank takes the same decision.
        good_forward = math.isfinite(float(sums.loss)) and broken_tokens == 0
        finite = good_forward and math.isfinite(grad_norm)
        loss_scale = progress.loss_scale
        overflow = good_forward and not finite and loss_scale is not None and loss_scale.can_shrink
        if loss_scale is not None and good_forward:
            progress.loss_scale = loss_scale.after_update() if finite else loss_scale.after_overflow()
        if overflow:
            progress.overflowed += 1
        elif not finite:
            self._skip(float(sums.loss), grad_norm, broken_tokens)
        elif tokens.in_loss == 0:  # auxiliary losses alone would move the weights
            progress.empty += 1
        else:
            if clip != 1.0:
                self.engine.clip(coefficient)
            self.engine.step(lr)
            for layer, did in zip(self.model.moe_layers(), sums.layers, strict=True):
                layer.router.after_step(did.demand_E, progress.step)
            progress.skipped_in_a_row = 0
        progress.step += 1
        progress.samples += self.config.train.global_batch_size
        progress.tokens += tokens.in_loss
        return StepResult(
            sums=sums,
            num_tokens=tokens.in_loss,
            num_routed=tokens.routed,
            grad_norm=grad_norm,
            clip=clip,
            lr=lr,
            finite=finite,
            overflow=overflow,
        )

    def _skip(self, loss: float, grad_norm: float, broken_tokens: int) -> None:
        train, progress = self.config.train, self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if train.nonfinite == "skip" and progress.skipped_in_a_row < train.max_nonfinite:
            return
        first = progress.samples
        raise NumericsError(
            f"step {progress.step + 1} is not finite: summed loss {loss}, gradient norm {grad_norm}, "
            f"{broken_tokens} tokens with NaN or +inf router logits; "
            f"{progress.skipped_in_a_row} such step(s) in a row",
            why=f"samples {first} to {first + train.global_batch_size - 1} of this step, or weights that diverged",
            fix="lower optimizer.lr, or start from an earlier checkpoint; "
            "train.nonfinite=skip with a larger train.max_nonfinite goes on for longer",
        )


def _num_routed(batch: Batch) -> int:
    valid_BS = batch.context.valid_BS
    return batch.token_BS.numel() if valid_BS is None else int(valid_BS.sum())
