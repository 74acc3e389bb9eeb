"""A cluster with a text and a small model: runs, and what must be true of them."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

from epmoe.config_file import dump_config
from tests.distributed.runs import different, history, make_config, status, tensors
from tests.slurm.cluster import Cluster, wait_until

MODEL = ("data.seq_len=256", "model.d_model=64", "model.num_layers=4")
"""Slow enough for a job to live until it is stopped."""


class Trial:
    """A cluster, a text and a small model; runs are folders beside each other."""

    every = 5
    """Steps between two checkpoints."""

    def __init__(self, cluster: Cluster, steps: int, batch: int) -> None:
        self.cluster, self.steps = cluster, steps
        self.base = cluster.base / "runs"
        self.base.mkdir()
        size = (f"train.steps={steps}", f"train.global_batch_size={batch}", f"checkpoint.every={self.every}")
        self.file = self.base / "tiny.yaml"
        self.file.write_text(dump_config(make_config(self.base, "unused", *MODEL, *size)))

    def submit(self, out: str, *options: str, overrides: tuple[str, ...] = (), **variables: str) -> str:
        """A job that trains in the folder ``out``."""
        known = {"CONFIG": str(self.file), "OUT": str(self.base / out), "RANKS_PER_NODE": "1"}
        return self.cluster.submit(*options, overrides=overrides, **known | variables)

    @cached_property
    def reference(self) -> Path:
        """A run that nobody disturbed."""
        self.expect(self.submit("reference"), "COMPLETED")
        return self.base / "reference"

    def expect(
        self, number: str, state: str, code: int = 0, *, restarts: int = 0, at_least: bool = False
    ) -> None:
        """Waits for the end of a job, and checks it; ``at_least`` allows for more restarts."""
        job = self.cluster.ended(number)
        counted = min(job.restarts, restarts) if at_least else job.restarts
        found, wanted = (job.state, job.exit_code, counted), (state, f"{code}:0", restarts)
        assert found == wanted, f"{found} instead of {wanted}\n{self.cluster.log(number)[-3000:]}"

    def wait_for_step(self, number: str, step: int) -> None:
        """Waits until a job has printed that it did a step."""
        wait_until(lambda: last_step(self.cluster.log(number)) >= step, 120, f"step {step} of job {number}")

    def assert_same(self, out: str) -> None:
        """The run is done, with the weights, moments and losses of the undisturbed one, bit for bit."""
        folder = self.base / out
        assert status(folder)["state"] == "done", status(folder)
        assert different(tensors(folder, self.steps), tensors(self.reference, self.steps)) == []
        assert history(folder) == history(self.reference)


def last_step(log: str) -> int:
    """The last step that a log tells of, of whichever start."""
    return max(map(int, re.findall(r"^step=(\d+)/", log, re.MULTILINE)), default=0)
