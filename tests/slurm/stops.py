"""Forced stops of one job at random moments, and what each of them costs."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.slurm.cluster import wait_until
from tests.slurm.trial import Trial

LONGEST_S = 6.0
"""Of training before a stop; the time limit takes up to half a minute more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """One stop and the start after it."""

    kind: str
    step: int
    """The last one done before it."""
    resumed_from: int
    orphans: int
    """Processes of the job that still ran when Slurm called it pending or cancelled."""
    seconds: float
    """From the stop until training went on, Slurm's own delay cut to three seconds."""

    @property
    def lost(self) -> int:
        """Steps that were done again."""
        return self.step - self.resumed_from


# ------------------------------------------------------------------------------------------- kinds
def requeued(trial: Trial, job: str) -> None:
    trial.cluster.run("scontrol", "requeue", job)


def signalled(trial: Trial, job: str) -> None:
    trial.cluster.run("scancel", "--batch", "--signal=USR1", job)


def cancelled(trial: Trial, job: str) -> None:
    trial.cluster.run("scancel", job)


def at_the_limit(trial: Trial, job: str) -> None:
    """A limit of which only the time for saving is left; Slurm looks every half minute."""
    trial.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=3")
    await_queue(trial, job)
    trial.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")


def without_a_node(trial: Trial, job: str) -> None:
    node = random.choice(("n1", "n2"))
    trial.cluster.fail_node(node, job)
    await_queue(trial, job)
    trial.cluster.start_node(node)


def killed(what: str) -> Callable[[Trial, str], None]:
    """SIGKILL of one of the processes with such a command line."""

    def kill(trial: Trial, job: str) -> None:
        processes = trial.cluster.processes(job)
        trial.cluster.kill([random.choice([pid for pid, line in processes.items() if re.search(what, line)])])

    return kill


KINDS: dict[str, Callable[[Trial, str], None]] = {
    "scontrol requeue": requeued,
    "USR1 to the job script": signalled,
    "scancel, then sbatch": cancelled,
    "time limit": at_the_limit,
    "node without power": without_a_node,
    "SIGKILL of a rank": killed(r"python\S* -u -m epmoe train"),
    "SIGKILL of torchrun": killed(r"-m torch\.distributed\.run"),
    "SIGKILL of epmoe launch": killed(r"-m epmoe launch"),
}


# ------------------------------------------------------------------------------------------- the job
def stop_often(trial: Trial, count: int, seed: int) -> list[Stop]:
    """Stops one job ``count`` times, kind after kind, and lets it come to its end.

    Raises:
        AssertionError: It ends otherwise, or not as a run that nobody stopped.
        TimeoutError: It does not go on.
    """
    random.seed(seed)
    stops: list[Stop] = []
    job = trial.submit("stops", "--output=stops.out")
    wait_until(lambda: starts(trial)[-1][1] >= trial.every, 120, "the first checkpoint")
    for kind in (list(KINDS) * count)[:count]:
        time.sleep(random.uniform(0.0, LONGEST_S))
        number, running, began = len(starts(trial)), set(trial.cluster.processes(job)), time.monotonic()
        KINDS[kind](trial, job)
        state = await_queue(trial, job)
        orphans = len(running & set(trial.cluster.processes(job)))
        step = starts(trial)[-1][1]
        if state == "CANCELLED":
            job = trial.submit("stops", "--output=stops.out")
        await_start(trial, job, number + 1)
        seconds = time.monotonic() - began
        stops.append(
            Stop(kind=kind, step=step, resumed_from=starts(trial)[-1][0], orphans=orphans, seconds=seconds)
        )
        print(row(stops[-1]), flush=True)
    trial.cluster.ended(job)
    assert trial.cluster.job(job).state == "COMPLETED", trial.cluster.log(job)[-3000:]
    trial.assert_same("stops")
    return stops


def starts(trial: Trial) -> list[tuple[int, int]]:
    """Of every start of the job that trained: the step it went on from, and the last one it did."""
    file = trial.cluster.base / "stops.out"
    text = file.read_text(errors="replace") if file.exists() else ""
    first, *others = re.split(r"^resuming from .* \(step (\d+)\)$", text, flags=re.MULTILINE)
    found = [(0, first), *((int(step), part) for step, part in zip(others[::2], others[1::2], strict=True))]
    return [
        (step, max(map(int, re.findall(r"^step=(\d+)/", part, re.M)), default=step)) for step, part in found
    ]


def await_queue(trial: Trial, job: str) -> str:
    """Waits until a job is out of its nodes -> its state."""

    def out() -> bool:
        state = trial.cluster.job(job).state
        assert state not in {"FAILED", "COMPLETED", "TIMEOUT"}, f"{state}: {trial.cluster.log(job)[-3000:]}"
        return state in {"PENDING", "CANCELLED"}

    wait_until(out, 180, f"job {job} is stopped")
    return trial.cluster.job(job).state


def await_start(trial: Trial, job: str, number: int) -> None:
    """Waits until the start of that number has done a step."""

    def trains() -> bool:
        trial.cluster.hurry(job)
        found = starts(trial)
        return len(found) == number and found[-1][1] > found[-1][0]

    wait_until(trains, 180, f"start {number} trains")


# ------------------------------------------------------------------------------------------- the table
def row(stop: Stop) -> str:
    """A line of the table."""
    return f"| {stop.kind} | {stop.step} | {stop.lost} | {stop.orphans} | {stop.seconds:.0f} |"


def summary(stops: Sequence[Stop], every: int) -> str:
    """What all of them came to; they are all resumed, or there is none."""
    lost = [stop.lost for stop in stops]
    orphans = sum(stop.orphans for stop in stops)
    seconds = sorted(stop.seconds for stop in stops)[len(stops) // 2]
    return (
        f"{len(stops)} stops, {len(stops)} resumed, {max(lost)} steps lost at most and {sum(lost)} in all "
        f"(checkpoint.every={every}), {orphans} orphans, {seconds:.0f} s each in the middle; the same bits at the end"
    )
