"""``epmoe doctor RUN``: whether a run starts, trains, hangs, is dead or over, from its folder alone, on any node."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epmoe.errors import ConfigError, printable
from epmoe.metrics.router_health import RouterHistory
from epmoe.metrics.step_record import StepRecord, read_records, record_to_json
from epmoe.metrics.terminal import plain_line
from epmoe.train import lock
from epmoe.train.status import METRICS, STATUS, Status, read_status

LATE = 10.0
"""A record that is this many times later than the ones before it is missed; evaluations and checkpoints take a few."""
LATE_S = 60.0
"""The same, in seconds: nothing sooner is missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What a run folder shows of the process that owns it."""

    owner: str | None
    """Of the lock; None without one."""
    silent_s: float
    """Since the owner last touched the lock."""
    gone: bool
    """Whether the owner is over."""
    idle_s: float | None
    """Since the newest record of this attempt; None when there is none yet."""
    usual_s: float | None
    """Between the two newest records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What that means."""

    word: str
    """``absent`` | ``starting`` | ``running`` | ``hanging`` | ``dead`` | ``done`` | ``stopped`` | ``failed``."""
    text: str
    healthy: bool = True


def judge(status: Status | None, signs: Signs) -> Verdict:
    """How a run is doing.

    Args:
        status: run_status.json; None when there is none that can be read.
        signs: Of life.
    """
    owner = signs.owner
    alive = owner is not None and not signs.gone
    if status is None and owner is None:
        return Verdict(word="absent", text=f"no {STATUS} that can be read: no run, or one that never started")
    if alive and (status is None or status.attempt != owner):
        return Verdict(word="starting", text=f"rank 0 is {_who(owner)}")
    if status is None or (status.state == "running" and not alive):
        last = "" if owner is None else f", last sign of life {signs.silent_s:.0f} s ago"
        text = f"rank 0 ({_who(owner or (status.attempt if status else ''))}) is gone without an end{last}"
        return Verdict(
            word="dead", text=f"{text}; the same command goes on from the newest checkpoint", healthy=False
        )
    if status.state != "running":
        return Verdict(word=status.state, text=f"exit code {status.exit_code}", healthy=True)
    if signs.idle_s is None:
        return Verdict(word="starting", text=f"rank 0 is {_who(owner)}, no step is recorded yet")
    if signs.idle_s > max(LATE_S, LATE * (signs.usual_s or 0)):
        usual = "" if signs.usual_s is None else f"; they came every {signs.usual_s:.1f} s"
        text = f"the last record is {signs.idle_s:.0f} s old{usual}. A long evaluation, or a rank that hangs"
        return Verdict(
            word="hanging", text=f"{text}: py-spy dump --pid ... on its node shows where", healthy=False
        )
    return Verdict(
        word="running", text=f"rank 0 is {_who(owner)}, the last record is {signs.idle_s:.0f} s old"
    )


def _who(owner: str | None) -> str:
    host, pid, *_ = [*(owner or "").split(":"), "?"]
    return f"process {pid} on {host}" if host else "not known"


def read_signs(run: Path, status: Status | None, records: Sequence[StepRecord]) -> Signs:
    """Looks at the lock and the metrics of a run folder."""
    owner, silent_s = lock.owner_of(run / lock.NAME), lock.age_s(run / lock.NAME)
    began_at = (run / STATUS).stat().st_mtime if status else 0.0
    recorded_at = (run / METRICS).stat().st_mtime if records else 0.0
    of_this_attempt = records and recorded_at >= began_at
    return Signs(
        owner=owner,
        silent_s=silent_s,
        gone=owner is not None and lock.is_gone(owner, silent_s),
        idle_s=time.time() - recorded_at if of_this_attempt else None,
        usual_s=records[-1].seconds - records[-2].seconds if len(records) > 1 else None,
    )


def report_run(run: Path, json: bool) -> bool:
    """Prints how a run is doing -> False when it is dead or hangs.

    Args:
        run: Its folder.
        json: One JSON object instead of text.
    """
    if not run.is_dir():
        raise ConfigError(
            f"{run} is not a run folder", fix="give the folder that `out` names, e.g. runs/default"
        )
    status, records = read_status(run), list(read_records(run / METRICS))
    history = RouterHistory()
    for record in records:
        history.add(record)
    last, routers = records[-1] if records else None, history.summary()
    verdict = judge(status, read_signs(run, status, records))
    known = status.model_dump(exclude_none=True) if status else {}
    if json:
        health = [{"layer": r.layer, "flagged": r.flagged, "text": r.sentence()} for r in routers]
        report: dict[str, object] = {
            "run": str(run),
            "verdict": verdict.word,
            "text": verdict.text,
            "status": known,
        }
        report |= {"last": last and jsonlib.loads(record_to_json(last)), "routers": health}
        print(jsonlib.dumps(report, indent=2))
        return verdict.healthy
    lines = [f"run {run}", f"  {verdict.word}: {verdict.text}"]
    lines += [f"  {key}: {value}" for key, value in known.items() if value not in ("", None)]
    lines.append(f"  last metrics: {plain_line(last, last.step) if last else 'none'}")
    lines += [f"  {'WARNING ' if router.flagged else ''}{router.sentence()}" for router in routers]
    print(printable("\n".join(lines)))
    return verdict.healthy
