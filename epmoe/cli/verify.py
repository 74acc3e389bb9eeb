"""``epmoe verify``: proves that every layout of a configuration trains the same model."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from epmoe import env
from epmoe.cli import print_error
from epmoe.config import Config
from epmoe.config_file import check_layout, load_config
from epmoe.errors import ConfigError, EpmoeError, NotProven
from epmoe.verify.small_config import Scale, Subject, make_subject

if TYPE_CHECKING:  # torch is imported when it is known that the configuration can be verified
    from epmoe.verify.self_test import Trial
    from epmoe.verify.subjobs import Ranks

RANKS_HERE = 4
"""Processes without a launcher: enough for every kind of layout,"""
PRETENDED_NODE = 2
"""Ranks of a node where there is only one: a hierarchical exchange then has something to do."""
RANKS_FOR_FAULTS = 2
"""and for every fault."""


def verify(
    config: Path,
    overrides: list[str],
    *,
    full: bool,
    scale: Scale,
    ranks: int | None,
    json: Path | None,
    faults: bool,
) -> None:
    """Runs the proof on the ranks of the launcher, or on processes that it starts here.

    Args:
        config: YAML file.
        overrides: ``section.key=value``.
        full: The whole matrix.
        scale: How much of the model is kept.
        ranks: Processes to start, where there is no launcher.
        json: File for the results.
        faults: Test the proof instead of the code.

    Raises:
        ConfigError: A mesh that is impossible, or ranks that were given different things.
        NotProven: Something is not the same in every layout.
    """
    cfg = load_config(config, overrides)
    if env.launched() and ranks is not None:
        raise ConfigError("--ranks starts processes, and a launcher already has", fix="leave --ranks out")
    world_size = env.world_size() if env.launched() else ranks or (RANKS_FOR_FAULTS if faults else RANKS_HERE)
    if world_size == 1:
        raise ConfigError("one process has only one layout", fix="torchrun --nproc-per-node 2 or more")
    node = env.local_world_size() if env.launched() else world_size
    subject = make_subject(
        cfg, world_size, scale, ranks_per_node=node if node < world_size else PRETENDED_NODE
    )
    check_layout(subject.config, world_size)
    from epmoe.parallel.deepspeed import load_deepspeed
    from epmoe.verify.subjobs import assemble, run_here, why_no_deepspeed

    def on_rank() -> None:
        device = cfg.train.device if ranks_are_given else "cpu"
        arguments = jsonlib.dumps({"config": cfg.model_dump(mode="json"), "full": full, "scale": scale})
        all_ranks = assemble(device, cfg.parallel.timeout_s, same=arguments)
        here = replace(subject, no_deepspeed=why_no_deepspeed(all_ranks))
        if faults:
            _test_the_proof(all_ranks, here, json)
        else:
            _prove(all_ranks, here, cfg, full=full, json=json)

    ranks_are_given = env.launched()
    if ranks_are_given:
        on_rank()
        return
    with suppress(ConfigError):
        load_deepspeed("cpu")  # once here, which takes seconds, instead of in every process
    if code := run_here(world_size, lambda: _exit_code(on_rank), cfg.parallel.timeout_s):
        sys.exit(code)  # a rank has said why


def _exit_code(work: Callable[[], None]) -> int:
    try:
        work()
    except EpmoeError as error:
        print_error(error)
        return error.exit_code
    return 0


def _prove(ranks: Ranks, subject: Subject, cfg: Config, *, full: bool, json: Path | None) -> None:
    from epmoe.verify.cases import make_plan
    from epmoe.verify.proof import prove
    from epmoe.verify.report import describe_plan, describe_violation, print_verdict, write_json

    plan = make_plan(subject, full=full, precisions=("fp64", "fp32"))
    speaks = ranks.rank == 0
    if speaks:
        print(describe_plan(subject, plan, f"{ranks.world_size} ranks, {ranks.backend}"), flush=True)
    progress = _Progress(len(plan.cells)) if speaks else _silent
    shared = Path(cfg.out).parent if ranks.world_size > env.local_world_size() else None
    if speaks and shared is not None:
        shared.mkdir(parents=True, exist_ok=True)
    verdict = prove(ranks, subject, plan, progress, shared=shared)
    if speaks:
        print_verdict(verdict)
        if json is not None:
            write_json(json, subject, plan, verdict)
    if verdict.violations:
        first = verdict.violations[0]
        raise NotProven(
            f"{len(verdict.violations)} violation(s) in {len(verdict.items)} item(s); the first: "
            + describe_violation(first),
            fix="until this is understood, trust runs of one layout only",
        )
    if speaks:
        text = f"proven: {len(verdict.rows)} cells agree with one process, in {verdict.seconds:.0f} s"
        if not any(row["settings"]["parallel.engine"] == "deepspeed" for row in verdict.rows):
            asked = ", which this configuration asks for" if subject.engine == "deepspeed" else ""
            text += f" (engines native and fsdp, not deepspeed{asked})"
        whole = plan.num_possible * verdict.seconds / len(verdict.rows)
        print(text if full else f"{text}; --full has {plan.num_possible} of them, about {whole:.0f} s")


def _silent(*_: object) -> None:
    pass


class _Progress:
    """A line on stderr for everything that is done, with what is left."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._spent = total, 0, 0.0

    def __call__(self, name: str, seconds: float, fine: bool) -> None:
        is_cell = not name.startswith(("reference", "resize"))
        self._done += is_cell
        self._spent += seconds if is_cell else 0.0
        left = (self._total - self._done) * self._spent / max(self._done, 1)
        count = f"[{self._done}/{self._total}, about {left:.0f} s left]" if self._done else "[start]"
        print(f"{count} {name}: {'ok' if fine else 'WRONG'}, {seconds:.2f} s", file=sys.stderr, flush=True)


def _test_the_proof(ranks: Ranks, subject: Subject, json: Path | None) -> None:
    from epmoe.verify.report import describe_violation, print_trials
    from epmoe.verify.self_test import self_test, subject_for_faults

    speaks, started = ranks.rank == 0, time.monotonic()

    def say(trial: Trial) -> None:
        if speaks:
            outcome = trial.absent or ", ".join(trial.caught_by) or "nothing"
            print(f"{trial.fault}: {outcome}", file=sys.stderr, flush=True)

    trials = self_test(ranks, subject_for_faults(subject), say)
    if speaks:
        print_trials(trials, time.monotonic() - started)
        if json is not None:
            json.write_text(jsonlib.dumps([asdict(trial) for trial in trials], indent=2), encoding="utf-8")
    if trials[0].first is not None:
        raise NotProven(f"nothing was planted, and yet: {describe_violation(trials[0].first)}")
    if missed := [trial.fault for trial in trials[1:] if trial.missed]:
        raise NotProven(f"{len(missed)} planted fault(s) went unnoticed: {'; '.join(missed)}")
