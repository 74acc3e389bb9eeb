"""A whole run: start-up, data, resume, the loop with its checkpoints and evaluations, and the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record as report_to_torchrun

from epmoe import env
from epmoe.checkpoint.manifest import CHECKPOINTS, TrainingRecord
from epmoe.checkpoint.store import save_checkpoint
from epmoe.config import Config, choose_ep_size
from epmoe.config_file import check_layout, dump_config
from epmoe.data.corpora import refuse_as_source
from epmoe.data.files import silent, write_atomically
from epmoe.data.loader import TrainData, validation_sets
from epmoe.data.prepare import prepare
from epmoe.data.prepared import TOKENIZER_FOLDER, PreparedData, source_lines, text_warning
from epmoe.data.progress import console_progress, plain_progress
from epmoe.errors import ConfigError, EpmoeError, MemoryExhausted, Preempted
from epmoe.metrics.step_record import read_records
from epmoe.metrics.terminal import make_display, say
from epmoe.metrics.trackers import JsonlTracker, TensorBoardTracker, Trackers
from epmoe.models.compile import compile_blocks, compiler_problem
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.mesh import build_mesh, flat_after_all
from epmoe.process import runtime
from epmoe.process.lost_peers import is_out_of_memory
from epmoe.process.runtime import Runtime
from epmoe.process.stop_signals import StopFlag, stop_on_signals
from epmoe.train.build import agree_on_accelerators, build_model
from epmoe.train.evaluate import Evaluation, evaluate
from epmoe.train.final_report import finish
from epmoe.train.loss_scale import scale_numbers
from epmoe.train.resume import changed_keys, resume
from epmoe.train.run_folder import (
    RunFolder,
    begin_attempt,
    close_run_folder,
    describe_run,
    open_run_folder,
    record_failure,
    record_state,
)
from epmoe.train.status import METRICS, read_status
from epmoe.train.step_profiler import StepProfiler
from epmoe.train.step_recorder import Recorder
from epmoe.train.trainer import Progress, StopRequested, TimeUp, Trainer

SAME_RUN = (
    *("out:", "data.cache", "data.num_workers", "parallel.", "checkpoint.", "profile.", "train.sample."),
    *("train.steps", "train.device", "train.compile", "train.recompute", "train.micro_batch_size"),
    *("train.log_every", "train.eval_", "train.max_minutes"),
)
"""Beginnings of settings with which a finished run is still the one that was asked for."""
SAME_TEXT = "put data.cache on a disk that all nodes share, or the same text on every node (`stdlib` differs by Python)"
RESOLVED = "config.yaml"
"""The resolved configuration, in the run folder."""


@report_to_torchrun  # its output then ends with the traceback of the rank that failed first
def train(config: Config, argv: Sequence[str]) -> None:
    """Trains, resumes or reports that nothing is left to do. Every rank of the job calls it.

    Args:
        config: The resolved configuration, the same on all ranks.
        argv: The command, for ``run.json``.

    Raises:
        EpmoeError: With the exit code of the process; ``run_status.json`` has it too.
    """
    with stop_on_signals() as stop:
        place = runtime.start(config.train.device, config.parallel.timeout_s)
        try:
            with runtime.watching(place, step=0, phase="start-up"):
                runtime.require_equal("configuration", config.model_dump_json())
                check_layout(config, place.world_size)
                refuse_as_source(config.data, Path(config.out))
                folder = open_run_folder(Path(config.out))
            try:
                _train_in(folder, config, place, stop, argv)
            finally:
                close_run_folder(folder)
        finally:
            runtime.stop(place)


def _train_in(folder: RunFolder, config: Config, place: Runtime, stop: StopFlag, argv: Sequence[str]) -> None:
    with runtime.watching(place, step=0, phase="start-up"):
        # Rank 0's answer counts: another rank may look later, or at another disk.
        done = int(runtime.gather_text(str(_finished_at(folder.path)))[0])
    if done >= config.train.steps:
        runtime.on_rank_zero(lambda: _say_finished(folder.path, config, done), ConfigError)
        return
    record_state(folder, "running")
    run: Run | None = None
    try:
        with runtime.watching(place, step=0, phase="start-up"):
            run = Run(folder, config, place, stop)
            runtime.on_rank_zero(lambda: run.describe(argv), ConfigError)
            begin_attempt(folder, run.progress.step, config.model_dump(mode="json"))
        evaluations = run.loop()
        with runtime.watching(place, step=run.progress.step, phase="final report"):
            finish(
                config,
                folder.path,
                run.prepared,
                run.trainer.model,
                evaluations,
                place=place,
                should_stop=stop,
            )
    except BaseException as error:
        step = run.progress.step if run else None
        if isinstance(error, Preempted):
            record_state(folder, "stopped", exit_code=error.exit_code, step=step, message=error.what)
            raise
        failure = _out_of_memory(config, error) if is_out_of_memory(error) else error
        record_failure(folder, failure, step=step, place=place)
        if failure is error:
            raise
        raise failure from error
    record_state(folder, "done", exit_code=0, step=run.progress.step)


def _finished_at(folder: Path) -> int:
    """The step at which the run in a folder was done, 0 when it is not."""
    status = read_status(folder)
    return status.step or 0 if status and status.state == "done" else 0


def _say_finished(folder: Path, config: Config, done: int) -> None:
    try:
        before = json.loads((folder / "run.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    changes = changed_keys(before, config) if isinstance(before, dict) else []
    if others := [line for line in changes if not line.startswith(SAME_RUN) and ": None -> " not in line]:
        raise ConfigError(
            f"{folder} is finished, and it is another run than this one",
            why="; ".join(others[:10]),
            fix="choose another out= for a new run, or undo these changes",
        )
    say(f"{folder} is finished: {done} steps are done. Nothing to do.")
    for line in changes:
        say(f"  it was trained with another setting of {line}")
    say("To train on, raise train.steps; for a new run, choose another out=.")


def _out_of_memory(config: Config, error: BaseException) -> MemoryExhausted:
    train = config.train
    return MemoryExhausted(
        f"out of memory with micro batches of {train.micro_batch_size or 'all'} x {config.data.seq_len} tokens",
        why=str(error).partition("\n")[0],
        fix="lower train.micro_batch_size (gradients accumulate, results stay the same), moe.capacity_factor, or "
        "data.seq_len; train.recompute=full keeps a fraction of the activations, train.precision=bf16_autocast halves "
        "them",
    )


# ------------------------------------------------------------------------------------------- the run itself
class Run:
    """One attempt: made with everything loaded, then ``loop`` trains to the end."""

    def __init__(self, folder: RunFolder, config: Config, place: Runtime, stop: StopFlag) -> None:
        self.config, self.place, self.folder, self.stop = config, place, folder, stop
        # First: what is not available is known before minutes of data preparation.
        self.accelerators = agree_on_accelerators(config, place.device)
        if config.train.compile:
            runtime.raise_together(compiler_problem())
        self.prepared = _prepare(config, place, stop)
        # The embedded corpus is each node's own Python: other versions hold other text.
        runtime.require_equal("prepared data", _as_numbers(self.prepared), fix=SAME_TEXT)
        data = TrainData(self.prepared, config.data, config.seed)
        num_experts = config.moe.num_experts if config.moe else 1
        ep_size = choose_ep_size(config.parallel.ep_size, place.world_size, num_experts)
        mesh = build_mesh(place, ep_size, config.parallel)
        vocab_size = self.prepared.padded_vocab_size
        model = build_model(
            config, vocab_size, device=place.device, mesh=mesh, accelerators=self.accelerators
        )
        self.compiled = (
            compile_blocks(model, in_shards=config.parallel.engine == "fsdp")
            if config.train.compile
            else None
        )
        """What is compiled, until that is done."""
        self.trainer = Trainer(config, place, mesh, model=model, data=data, stop=stop)
        self.validation = validation_sets(self.prepared, config.data)
        seconds = resume(folder, self.trainer, data, self.prepared)
        self.saved_at = self.progress.step
        """Step of the newest checkpoint."""
        self.recorder = Recorder(config, vocab_size, place.device, place.world_size, seconds)
        self.trackers = Trackers([])
        self.warned_of_empty = False
        """That there are steps in which nothing is learnt has been said."""

    def describe(self, argv: Sequence[str]) -> None:
        """Writes down what is run. Not before it is known that the checkpoint allows it: a refused configuration
        must not replace the description of the run in the folder."""
        path, train = self.folder.path, self.config.train
        describe_run(self.folder, self.config.model_dump(mode="json"), argv)
        write_atomically(path / RESOLVED, dump_config(self.config).encode())
        self.prepared.tokenizer.save(path / TOKENIZER_FOLDER)
        say("\n".join(source_lines(self.prepared)))
        say(_layout(self.config, self.trainer))
        if self.accelerators.note:
            say(f"attention: {self.accelerators.note}")
        if (why := flat_after_all(self.trainer.mesh)) is not None:
            say(f"exchange: flat instead of hierarchical, {why}")
        if warning := text_warning(self.prepared):
            say(f"warning: {warning}")
        if self.trainer.num_micro > 1 and self.config.moe and self.config.moe.balance_scope == "global":
            say(
                f"warning: moe.balance_scope: global with {self.trainer.num_micro} micro-batches per step is an "
                "approximation: each knows the counts of those before it, not of those after it"
            )
        if self.config.optimizer.warmup_steps >= train.steps:
            say(
                f"warning: {train.steps} steps end before the warm-up of {self.config.optimizer.warmup_steps} does"
            )

    @property
    def progress(self) -> Progress:
        """Where training stands."""
        return self.trainer.progress

    def loop(self) -> list[Evaluation]:
        """Steps until the last one, the time limit or a signal -> the final evaluation of every source.

        Raises:
            Preempted: After a signal; the checkpoint is written.
        """
        self.trackers = self._open_trackers()
        try:
            self._steps()
            self._log([])
            self._save()  # before an evaluation that may take long
            evaluations = self._evaluate(self.config.train.final_eval_samples)
            self._log(evaluations)
        except StopRequested:
            self._log([])
            self._save()
            raise Preempted(
                f"stopped after step {self.progress.step} ({self.stop.reason or 'another rank was asked to'}); "
                "a checkpoint is written",
                fix="run the same command to go on",
            ) from None
        finally:
            self.trackers.close()
        return evaluations

    def _steps(self) -> None:
        train, total = self.config.train, self.config.train.steps
        deadline = time.monotonic() + 60 * (train.max_minutes or float("inf"))
        self.recorder.clock.lap()
        with StepProfiler(self.config.profile.steps, self.folder.path, self.place.rank) as profiler:
            while self.progress.step < total:
                number = self.progress.step + 1
                profiler.before_step(number)
                try:
                    with runtime.watching(self.place, step=number, phase="training"), self._compiling():
                        result = self.trainer.step(out_of_time=time.monotonic() > deadline)
                except TimeUp:
                    return
                profiler.after_step(number)
                self.recorder.add(result)
                if number < total:
                    self._between_steps(number)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Around a step: the first one says that it compiles, and how long it took."""
        what, self.compiled = self.compiled, None
        if what is None or not self.folder.is_writer:
            yield
            return
        say(f"compiling {what} ...")
        started = time.monotonic()
        yield
        say(f"compiled, {time.monotonic() - started:.0f} s with the first step")

    def _between_steps(self, step: int) -> None:
        """Evaluation, record and checkpoint, if they are due.

        A checkpoint comes last and never without a record: a run that resumes from it finds every earlier step in the
        metrics, and its own records cover the same steps as those of a run that was never interrupted.
        """
        train, save = self.config.train, _due(self.config.checkpoint.every, step)
        if _due(train.eval_every, step):
            self._log(self._evaluate(train.eval_samples))
        elif save or _due(train.log_every, step):
            self._log([])
        if save:
            self._save()

    def _save(self) -> None:
        if self.saved_at == self.progress.step:
            return
        with (
            self.recorder.paused(),
            runtime.watching(self.place, step=self.progress.step, phase="checkpoint"),
        ):
            save_checkpoint(
                self.folder.path / CHECKPOINTS,
                model=self.trainer.model,
                engine=self.trainer.engine,
                mesh=self.trainer.mesh,
                record=self._training_record(),
                keep=self.config.checkpoint.keep,
            )
        self.saved_at = self.progress.step
        record_state(self.folder, "running", step=self.saved_at, saved=self.saved_at)

    def _training_record(self) -> TrainingRecord:
        progress = self.progress
        counters = {
            "skipped": progress.skipped,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "overflowed": progress.overflowed,
            "empty": progress.empty,
            **scale_numbers(progress.loss_scale),
        }
        return TrainingRecord(
            step=progress.step,
            tokens=progress.tokens,
            samples=progress.samples,
            config=env.masked(self.config.model_dump(mode="json")),
            data_fingerprint=self.trainer.data.fingerprint,
            tokenizer_hash=self.prepared.tokenizer.sha256,
            trainer={"seconds": self.recorder.seconds, **counters},
        )

    def _evaluate(self, max_windows: int | None) -> list[Evaluation]:
        train, place = self.config.train, self.place
        with self.recorder.paused(), runtime.watching(place, step=self.progress.step, phase="evaluation"):
            return [
                evaluate(
                    self.trainer.model,
                    data,
                    rank=self.trainer.mesh.dp_rank,
                    world_size=self.trainer.mesh.dp_size,
                    batch_size=train.eval_batch_size or self.trainer.micro_batch,
                    precision=train.precision,
                    device=place.device,
                    max_windows=max_windows,
                    poll=self._polled(data.name),
                )
                for data in self.validation
            ]

    def _polled(self, source: str) -> Callable[[int, int], None]:
        """Between the passes of an evaluation: a look for signals, and how far it is."""
        report = plain_progress("evaluate", unit="windows") if self.folder.is_writer else silent

        def poll(done: int, total: int) -> None:
            self.trainer.check_stop()
            report(source, done, total)

        return poll

    def _open_trackers(self) -> Trackers:
        if not self.folder.is_writer:
            return Trackers([])
        path, step = self.folder.path, self.progress.step
        for record in read_records(path / METRICS):
            if record.step == step:
                self.recorder.latest = record
        return Trackers(
            [
                lambda: JsonlTracker(path / METRICS, step),
                lambda: TensorBoardTracker(path / "tensorboard", step),
                lambda: make_display(self.config.train.steps),
            ]
        )

    def _log(self, evaluations: list[Evaluation]) -> None:
        record = self.recorder.record(self.progress, {one.name: one.loss for one in evaluations})
        if record is None:
            return
        self.trackers.log(record)
        known = (
            10 * record.step >= self.config.train.steps
        )  # of the first few steps the share would say little
        if record.empty_steps and known and not self.warned_of_empty and self.folder.is_writer:
            self.warned_of_empty = True
            say(empty_warning(record.empty_steps, record.step))


def empty_warning(empty: int, steps: int) -> str:
    """What a person should know about steps in which no token counted in the loss."""
    return (
        f"warning: {empty} of {steps} steps so far ({empty / steps:.0%}) had no token that counts in the loss and "
        "changed nothing. Ranges of loss_field that are short against data.seq_len do that; a larger "
        "train.global_batch_size gives every step some of them"
    )


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _prepare(config: Config, place: Runtime, stop: StopFlag) -> PreparedData:
    """Rank 0 prepares with a progress display; the others find the result, or make it on a disk of their own.

    Raises:
        EpmoeError: On all ranks, if any of them failed or was asked to stop.
    """
    prepared, error = None, None
    try:
        with runtime.rank_zero_first(place, "prepare data", stop) as should_stop:
            if place.rank > 0:
                prepared = prepare(config.data, should_stop=should_stop)
            else:
                with console_progress() as progress:
                    prepared = prepare(config.data, progress=progress, should_stop=should_stop)
    except EpmoeError as caught:
        error = caught
    runtime.raise_together(error)
    if prepared is None:
        raise AssertionError("no data and no error")
    return prepared


def _as_numbers(prepared: PreparedData) -> str:
    """What of prepared data may differ between ranks, as JSON: documents and tokens of every source, and a hash."""
    numbers: dict[str, object] = {"sha256 of all tokens": prepared.fingerprint}
    for source in prepared.sources:
        for name, split in (("train", source.train), ("val", source.val)):
            if split is not None:
                counts = {"documents": split.facts.documents, "tokens": split.facts.stream_tokens}
                numbers[f"{source.name}, {name}"] = counts
    return json.dumps(numbers)


def _layout(config: Config, trainer: Trainer) -> str:
    """Ranks, experts and sizes in one line."""
    mesh = trainer.mesh
    local = sum(rows_here(parameter).numel() for parameter in trainer.model.parameters())
    return (
        f"{mesh.world_size} rank(s) on {trainer.runtime.device.type}, ep_size {mesh.ep_size} "
        f"({mesh.edp_size} holding each expert), engine {config.parallel.engine}, {local:,} parameters per rank, "
        f"{config.train.precision}, {torch.get_num_threads()} thread(s) per rank"
    )
