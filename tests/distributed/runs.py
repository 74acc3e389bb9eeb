"""Whole training runs on forked ranks: a small text, a small model, and what a run leaves behind.

A run of two ranks and ten steps takes about a third of a second, because everything slow is imported before the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.utils.tensorboard  # here once instead of in every child
from torch import Tensor

from epmoe.checkpoint.manifest import read_manifest, step_folder
from epmoe.config import Config
from epmoe.config_file import override_config
from epmoe.errors import EpmoeError
from epmoe.train.run import train
from tests.distributed.harness import Outcome, rank_outcomes, run_ranks
from tests.patience import HANGS_S

STEPS = 20
Fault = str | None
"""Value of EPMOE_FAULT."""


@dataclass(frozen=True)
class End:
    """How one attempt ended on one rank."""

    code: int
    """Exit code; 0 = trained to the end."""
    message: str = ""


def write_text(folder: Path, size: int, seed: int = 0) -> Path:
    """A folder with one file of invented sentences."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(60)]
    text = ""
    while len(text) < size:
        text += " ".join(rng.choices(words, k=rng.randint(3, 9))) + ".\n"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(text[:size])
    return folder


def make_config(base: Path, out: str, *overrides: str) -> Config:
    """The small run whose folder is ``base/out``; ``base`` holds the text and the prepared data of all runs."""
    if not (base / "train").exists():
        write_text(base / "train", 12_000)
        write_text(base / "val", 900, seed=1)
    config = Config.model_validate(
        {
            "out": str(base / out),
            "seed": 5,
            "data": {
                "sources": ({"name": "words", "path": str(base / "train"), "val_path": str(base / "val")},),
                "tokenizer": "byte",
                "seq_len": 16,
                "cache": str(base / "cache"),
                "num_workers": 1,
            },
            "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "dropout": 0.1},
            "moe": {"num_experts": 4, "capacity_factor": 1.0, "min_capacity": 1},
            "parallel": {"timeout_s": HANGS_S},
            "optimizer": {"lr": 5e-3, "warmup_steps": 4, "clip_norm": 0.5},
            "train": {"steps": STEPS, "global_batch_size": 4, "device": "cpu", "log_every": 1, "sample": {"tokens": 4}},
            "checkpoint": {"every": 5},
        }
    )  # fmt: skip
    return override_config(config, overrides)


def attempt(rank: int, config: Config, fault: Fault = None) -> End:
    """One attempt in this process."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # no result may depend on torch's own generator
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked child must not ask for more
    os.environ.pop("EPMOE_FAULT", None)
    if fault is not None:
        os.environ["EPMOE_FAULT"] = fault
    try:
        train(config, ["epmoe", "train"])
    except EpmoeError as error:
        return End(error.exit_code, str(error))
    return End(0)


def attempts(rank: int, plan: Sequence[tuple[Config, Fault]]) -> list[End]:
    """Several runs one after the other on the same ranks."""
    return [attempt(rank, config, fault) for config, fault in plan]


def run(base: Path, config: Config, fault: Fault = None, *, world_size: int = 2) -> list[Outcome]:
    """One attempt on fresh ranks -> how each ended; ``result`` is an ``End`` unless the rank died."""
    return rank_outcomes(world_size, attempt, base, config, fault)


def ends(base: Path, config: Config, fault: Fault = None, *, world_size: int = 2) -> list[End]:
    """``run`` where no rank may die."""
    found: list[End] = run_ranks(world_size, attempt, base, config, fault)
    return found


def launched(rank: int, config: Config, fault: str, port: int, world_size: int) -> None:
    """An attempt that makes its own process group, with the configuration's time-out, as under a launcher."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(number) for name, number in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", EPMOE_FAULT=fault)
    train(config, ["epmoe", "train"])


def launch(
    base: Path, config: Config, fault: str, *, world_size: int = 2, grace: float = 3.0
) -> list[Outcome]:
    """``run`` with a process group that the run makes itself; ``error`` is the traceback of a rank that raised."""
    args = (config, fault, free_port(), world_size)
    return rank_outcomes(world_size, launched, base, *args, join_group=False, grace=grace)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def finish(base: Path, config: Config, *, world_size: int = 2) -> Path:
    """Trains to the end -> the run's folder."""
    assert ends(base, config, world_size=world_size) == [End(0)] * world_size
    return Path(config.out)


# ------------------------------------------------------------------------------------------- what is left behind
def status(folder: Path) -> dict[str, Any]:
    """run_status.json without what differs from attempt to attempt."""
    found: dict[str, Any] = json.loads((folder / "run_status.json").read_text())
    return {key: found[key] for key in ("state", "exit_code", "step", "message")}


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints; fails when anything unfinished lies among them."""
    names = sorted(path.name for path in (folder / "ckpt").iterdir())
    steps = [int(name.removeprefix("step_")) for name in names if name.startswith("step_")]
    assert set(names) <= {"latest.json", *map(step_folder, steps)}, names
    return steps


def tensors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, by shard and key."""
    checkpoint = folder / "ckpt" / step_folder(step)
    return {
        f"{name}:{key}": tensor
        for name in sorted(read_manifest(checkpoint).files)
        for key, tensor in safetensors.torch.load_file(checkpoint / name).items()
    }


def history(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "flops_per_second", "seconds_per_step", "seconds", "memory_gib", "mfu")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def different(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Keys whose tensors are not the same bits, or only on one side."""
    return [
        key
        for key in sorted(first.keys() | second.keys())
        if key not in first
        or key not in second
        or first[key].numpy().tobytes() != second[key].numpy().tobytes()
    ]


def assert_same_run(folder: Path, reference: Path, step: int = STEPS) -> None:
    """The same weights, moments and metrics, bit for bit, and every step in the metrics once."""
    assert different(tensors(folder, step), tensors(reference, step)) == []
    assert [line["step"] for line in history(folder)] == list(range(1, step + 1))
    assert history(folder) == history(reference)
    assert status(folder) == {"state": "done", "exit_code": 0, "step": step, "message": ""}


def processes_of(file: Path) -> list[int]:
    """Processes that have the configuration file on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if str(file).encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
