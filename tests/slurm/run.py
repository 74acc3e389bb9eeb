"""launch/slurm.sbatch on a real Slurm of two nodes: ``make test-slurm``, and with ``ARGS=--stops=20`` a table of stops.

Every case submits real jobs of two ranks on two nodes, and looks at what Slurm, the run folder and the processes
say. Needs Debian's ``slurm-wlm`` and ``munge``, and minutes rather than seconds.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable

from tests.distributed.runs import checkpoints, different, status, tensors
from tests.slurm.cluster import missing_programs, running_cluster, wait_until
from tests.slurm.stops import stop_often, summary
from tests.slurm.trial import Trial, last_step


# ------------------------------------------------------------------------------------------- cases
def two_nodes(trial: Trial) -> None:
    """Two nodes, one rank on each, to the end."""
    assert status(trial.reference)["exit_code"] == 0
    assert checkpoints(trial.reference)[-1] == trial.steps


def missing_variables(trial: Trial) -> None:
    """What is not set, or does not resolve, is named; the code is that of a wrong usage."""
    for variables, sentence in (
        ({"CONFIG": ""}, "error: CONFIG is not set"),
        ({"OUT": ""}, "error: OUT is not set"),
        ({"RANKS_PER_NODE": ""}, "error: the job has no GPUs"),
        ({"MASTER_ADDR": "nowhere.invalid"}, "error: MASTER_ADDR=nowhere.invalid does not resolve"),
        ({"CONFIG": "/no/such.yaml"}, "/no/such.yaml"),
    ):
        number = trial.submit("unused", **variables)
        trial.expect(number, "FAILED", 2)
        assert sentence in trial.cluster.log(number), trial.cluster.log(number)


def cancelled(trial: Trial) -> None:
    """scancel saves and is final; the same job submitted again goes on."""
    number = trial.submit("cancelled")
    trial.wait_for_step(number, 12)
    trial.cluster.run("scancel", number)
    job = trial.cluster.ended(number)
    assert (job.state, job.restarts) == ("CANCELLED", 0), job  # its code depends on who was quicker
    ended = status(trial.base / "cancelled")
    assert (ended["state"], ended["exit_code"]) == ("stopped", 75), ended
    assert last_step(trial.cluster.log(number)) == ended["step"] == checkpoints(trial.base / "cancelled")[-1]
    trial.expect(trial.submit("cancelled"), "COMPLETED")
    trial.assert_same("cancelled")


def time_limit(trial: Trial) -> None:
    """The signal before the limit saves, the job goes back into the queue and ends as if nothing had been."""
    number = trial.submit("limit", "--time=1", "--signal=B:USR1@45")
    wait_until(lambda: trial.cluster.job(number).restarts > 0, 120, "the limit comes")
    trial.cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    trial.expect(number, "COMPLETED", restarts=1)
    trial.assert_same("limit")


def dead_node(trial: Trial) -> None:
    """A node without power, the job script's own and the other: the job starts again when there are nodes."""
    for node in ("n1", "n2"):
        out = f"without-{node}"
        number = trial.submit(out)
        trial.wait_for_step(number, 12)
        trial.cluster.fail_node(node, number)
        wait_until(lambda number=number: trial.cluster.job(number).restarts > 0, 120, "the loss is noticed")
        trial.cluster.start_node(node)
        # What Slurm still had to tell the lost node can meet the next start there, which then is one more loss.
        trial.expect(number, "COMPLETED", restarts=1, at_least=True)
        trial.assert_same(out)


def seeds(trial: Trial) -> None:
    """An array: one model per task; a task that stops and starts again leaves the others alone."""
    number = trial.submit("seeds", "--array=0-1", overrides=("train.steps=60",))
    trial.wait_for_step(f"{number}_0", 8)
    trial.cluster.run("scancel", "--batch", "--signal=USR1", f"{number}_0")
    trial.expect(f"{number}_0", "COMPLETED", restarts=1)
    trial.expect(f"{number}_1", "COMPLETED")
    weights = [tensors(trial.base / "seeds" / f"seed-{task}", 60) for task in (0, 1)]
    assert different(*weights) != []


def no_progress(trial: Trial) -> None:
    """A rank that dies at the same step every time: three attempts, then 93, which is not requeued."""
    number = trial.submit("stuck", EPMOE_FAULT="point=train.after_backward,rank=1,step=3,action=kill")
    trial.expect(number, "FAILED", 93, restarts=3)
    time.sleep(5)
    trial.expect(number, "FAILED", 93, restarts=3)


def occupied(trial: Trial) -> None:
    """A second job on the same folder is refused, and the first one goes on."""
    number = trial.submit("occupied", "--nodes=1", "--oversubscribe", overrides=("train.steps=120",))
    trial.wait_for_step(number, 3)
    other = trial.submit("occupied", "--nodes=1", "--oversubscribe", overrides=("train.steps=120",))
    trial.expect(other, "FAILED", 2)
    assert "is in use by process" in trial.cluster.log(other)
    trial.expect(number, "COMPLETED")


def without_launcher(trial: Trial) -> None:
    """``srun epmoe train``: Slurm's tasks are the ranks, of one model."""
    task = ("epmoe", "train", str(trial.file), f"out={trial.base / 'tasks'}")
    # Names of nodes have addresses elsewhere, here they have none.
    trial.cluster.run("srun", "--nodes=2", "--ntasks=2", *task, MASTER_ADDR="127.0.0.1")
    trial.assert_same("tasks")


CASES: tuple[Callable[[Trial], None], ...] = (
    two_nodes,
    missing_variables,
    cancelled,
    time_limit,
    dead_node,
    seeds,
    no_progress,
    occupied,
    without_launcher,
)


def run_cases(names: list[str]) -> bool:
    """Runs the cases of these names, or all -> whether all went well."""
    failed = []
    with running_cluster() as cluster:
        trial = Trial(cluster, steps=200, batch=16)
        for case in CASES:
            if names and case.__name__ not in names:
                continue
            began, verdict = time.monotonic(), "ok"
            try:
                case(trial)
            except Exception as error:  # the next case is worth its time
                failed.append(case)
                verdict = f"FAILED\n{type(error).__name__}: {error}"
            print(f"{case.__name__}: {time.monotonic() - began:.0f} s, {verdict}", flush=True)
    return not failed


def run_stops(count: int, seed: int) -> bool:
    """The table of forced stops -> whether no step and no process is left that should not be."""
    with running_cluster() as cluster:
        trial = Trial(cluster, steps=400, batch=32)
        print("| stop | at step | lost | orphans | s |\n|---|---|---|---|---|", flush=True)
        stops = stop_often(trial, count, seed)
        print(summary(stops, trial.every))
        no_progress(trial)
        print("a run without progress: 93, and not requeued")
        return all(stop.lost <= trial.every and stop.orphans == 0 for stop in stops)


def main() -> int:
    """The command line -> exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(case.__name__ for case in CASES))
    parser.add_argument(
        "--stops", type=int, default=0, metavar="N", help="instead: N stops of one job of 400 steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the stops")
    options = parser.parse_args()
    if missing := missing_programs():
        print(f"not installed: {', '.join(missing)}\n  fix: apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster ends with us
    went_well = run_stops(options.stops, options.seed) if options.stops else run_cases(options.cases)
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())
