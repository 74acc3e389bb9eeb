"""Start-up, agreement between ranks, and what survivors say about a peer that is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epmoe.errors import CheckpointError, CommError, ConfigError, EpmoeError
from epmoe.parallel.mesh import build_mesh, split_expert_id
from epmoe.process.runtime import (
    gather_text,
    on_rank_zero,
    raise_together,
    require_equal,
    start,
    stop,
    watching,
)
from tests.distributed.harness import Outcome, rank_outcomes, run_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _alone(fn: Any, tmp_path: Path, *args: Any, ranks: int = 1) -> list[Outcome]:
    """Ranks without a process group, which they start themselves."""
    return rank_outcomes(ranks, fn, tmp_path, *args, timeout=20, join_group=False)


def _environment(**variables: object) -> None:
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in variables.items()})


def _start_error(rank: int, timeout_s: float, variables: dict[str, object]) -> tuple[str, str, float]:
    _environment(**variables)
    began = time.monotonic()
    try:
        start("cpu", timeout_s)
    except EpmoeError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "started", "", 0.0


# ------------------------------------------------------------------------------------------- start-up
def _single(rank: int) -> list[Any]:
    _environment()
    runtime = start("auto", 5)
    mesh = build_mesh(runtime, 1)
    value = torch.ones(2)
    dist.all_reduce(value, group=mesh.ep_group)
    require_equal("configuration", "x")
    raise_together(None)
    facts = [runtime.rank, runtime.world_size, str(runtime.device), runtime.backend, value.tolist()]
    stop(runtime)
    return [*facts, dist.is_initialized(), gather_text("alone")]


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    (outcome,) = _alone(_single, tmp_path)
    assert outcome.error is None
    assert outcome.result[:2] == [0, 1]
    assert outcome.result[4:] == [[1.0, 1.0], False, ["alone"]]


def _threads(rank: int, local_world_size: int) -> int:
    _environment(LOCAL_WORLD_SIZE=local_world_size)
    os.environ.pop("OMP_NUM_THREADS", None)
    stop(start("cpu", 5))
    return torch.get_num_threads()


def test_ranks_of_a_node_share_its_cores(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    results = [_alone(_threads, tmp_path, ranks_here)[0].result for ranks_here in (1, cores, 10 * cores)]
    assert results == [cores, 1, 1]


def _launched(rank: int, port: int) -> list[str]:
    _environment(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    runtime = start("cpu", 10)
    texts = gather_text(f"I am {runtime.rank}")
    stop(runtime)
    return texts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_launched_ranks_find_each_other(tmp_path: Path) -> None:
    outcomes = _alone(_launched, tmp_path, _free_port(), ranks=2)
    assert [o.result for o in outcomes] == [["I am 0", "I am 1"]] * 2


def test_missing_launcher_variables_are_named_at_once(tmp_path: Path) -> None:
    (outcome,) = _alone(_start_error, tmp_path, 10, {"RANK": 0, "WORLD_SIZE": 2})
    kind, message, seconds = outcome.result
    assert kind == "ConfigError"
    assert "LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in message
    assert "torchrun --nproc-per-node" in message
    assert seconds < 5  # of a limit of 10


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("busy", ["MASTER_PORT", "in use", "torchrun"]),
        ("unknown", ["MASTER_ADDR=no-such-host.invalid", "resolve", "torchrun"]),
        ("lonely", ["rank 0 of 2", "did not find the other ranks", "within 1 s"]),
    ],
)
def test_a_failed_rendezvous_says_what_is_wrong_within_the_time_out(
    trouble: str, words: list[str], tmp_path: Path
) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1] if trouble == "busy" else _free_port()
        host = "no-such-host.invalid" if trouble == "unknown" else "127.0.0.1"
        rank = 1 if trouble == "unknown" else 0
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": host, "MASTER_PORT": port}
        (outcome,) = _alone(_start_error, tmp_path, 1.0, variables)
    kind, message, seconds = outcome.result
    assert kind == "CommError"
    for word in words:
        assert word in message
    assert seconds < 8


def test_cuda_without_a_gpu_is_a_config_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no GPU"):
        start("cuda", 5)


# ------------------------------------------------------------------------------------------- agreement
def _agreement(rank: int) -> list[Any]:
    seen: list[Any] = [gather_text("é" * rank), gather_text("")]

    def outcome_of(action: Any) -> str:
        try:
            action()
        except EpmoeError as error:
            return f"{type(error).__name__}: {error.what}"
        return "fine"

    only_rank_1 = CheckpointError("disk full", fix="delete") if rank == 1 else None
    seen.append(outcome_of(lambda: raise_together(only_rank_1)))
    seen.append(outcome_of(lambda: raise_together(None)))
    seen.append(outcome_of(lambda: require_equal("configuration", "same")))
    seen.append(outcome_of(lambda: require_equal("configuration", f"seed: {rank // 2}")))
    settings = json.dumps({"train": {"steps": 10 + rank // 2, "seed": 0}})
    with pytest.raises(ConfigError, match=r"rank 0 and rank 2: train\.steps is 10, and 11"):
        require_equal("configuration", settings)
    seen.append(outcome_of(lambda: on_rank_zero(lambda: Path("/proc/no/such").mkdir(), ConfigError)))
    return seen


def test_ranks_agree_on_texts_and_raise_together(tmp_path: Path) -> None:
    ranks = run_ranks(3, _agreement, tmp_path)
    for rank, (texts, empty, together, none, same, different, zero) in enumerate(ranks):
        assert texts == ["", "é", "éé"]
        assert empty == ["", "", ""]
        assert together == (
            "CheckpointError: disk full" if rank == 1 else "CheckpointError: rank 1: disk full"
        )
        assert (none, same) == ("fine", "fine")
        assert different == "ConfigError: the configuration of rank(s) [2] differs from rank 0's"
        assert zero.startswith("ConfigError:")
        assert "/proc/no/such cannot be used" in zero


def _groups(rank: int) -> list[Any]:
    mesh = build_mesh(start("cpu", 10), 2)
    ep, edp = (dist.get_process_group_ranks(group) for group in (mesh.ep_group, mesh.edp_group))
    return [mesh.edp_rank, mesh.ep_rank, ep, edp, mesh.device_mesh.mesh.tolist(), mesh.world_size]


def test_neighbours_share_experts(tmp_path: Path) -> None:
    layout = [[0, 1], [2, 3]]
    assert run_ranks(4, _groups, tmp_path) == [
        [0, 0, [0, 1], [0, 2], layout, 4],
        [0, 1, [0, 1], [1, 3], layout, 4],
        [1, 0, [2, 3], [0, 2], layout, 4],
        [1, 1, [2, 3], [1, 3], layout, 4],
    ]


def test_global_expert_ids_are_read_from_names() -> None:
    assert split_expert_id("moe.experts.experts.12.w") == ("moe.experts.experts.*.w", 12)
    assert split_expert_id("experts.3.w") == ("experts.*.w", 3)
    assert split_expert_id("blocks.1.moe.experts.w_in") == ("blocks.1.moe.experts.w_in", None)
    assert split_expert_id("shared_experts.3.w") == ("shared_experts.3.w", None)


# ------------------------------------------------------------------------------------------- lost peers
def _lose(rank: int, victim: int, how: str, limit_s: float, port: int) -> tuple[str, float]:
    """Ranks 0 and 1, 2 and 3 share experts. The others come through their own group and meet in the world's."""
    _environment(RANK=rank, WORLD_SIZE=4, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    runtime = start("cpu", limit_s)
    mesh = build_mesh(runtime, 2)
    dist.barrier()
    began = time.monotonic()
    try:
        with watching(runtime, step=7, phase="training"):
            if rank == victim:
                _perish(how)
            dist.all_reduce(torch.ones(1), group=mesh.ep_group)
            dist.all_reduce(torch.ones(1), group=mesh.world_group)
    except CommError as error:
        return str(error), time.monotonic() - began
    return "nothing happened", 0.0


def _perish(how: str) -> None:
    if how == "raise":
        raise ValueError("token id 70000 is not in the vocabulary")
    if how == "sleep":
        time.sleep(2.5)
        return
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


@pytest.mark.parametrize(
    ("victim", "how", "says"),
    [
        (1, "kill", r"lost rank\(s\) \[1\] at step 7, phase training"),
        (1, "stop", r"lost rank\(s\) \[1\] at step 7, phase training"),
        (1, "raise", r"lost rank 1 .*, which stopped at step 7, phase training: ValueError: token id 70000"),
        (
            3,
            "sleep",
            r"timed out waiting for rank\(s\) \[3\] at step 7(.|\n)*rank 3 is in _perish \(.*test_runtime.py:",
        ),
        (0, "kill", r"at step 7, phase training: the rendezvous store at 127.0.0.1:\d+ is gone"),
    ],
    ids=["kill", "stop", "raise", "busy elsewhere", "kill the store's host"],
)
def test_survivors_name_the_lost_rank(
    victim: int, how: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limit_s = 1.5 if how in ("stop", "sleep") else 12.0  # only those two are found out by the time-out
    outcomes = rank_outcomes(
        4, _lose, tmp_path, victim, how, limit_s, _free_port(), timeout=15, grace=4, join_group=False
    )
    stacks = capfd.readouterr().err
    for survivor in {0, 1, 2, 3} - {victim}:
        assert outcomes[survivor].error is None
        message, seconds = outcomes[survivor].result
        assert message.startswith(f"rank {survivor} ")
        assert re.search(says, message)
        assert seconds < 5  # on a quiet machine 0.7, or that after the time-out
        assert f"[rank {survivor}] a collective failed at step 7" in stacks
    assert stacks.count(" in _lose\n") >= 3  # every survivor's stack
    fates = {"raise": 1, "sleep": 0}  # whoever only slept finds the others gone, and says so
    assert outcomes[victim].exit_code == fates.get(how, -signal.SIGKILL)


def _ordinary(rank: int) -> str:
    runtime = start("cpu", 5)
    try:
        with watching(runtime, step=1, phase="training"):
            raise KeyError("not a collective")
    except KeyError:
        return "passed through"


def test_other_exceptions_pass_through(tmp_path: Path) -> None:
    assert run_ranks(1, _ordinary, tmp_path) == ["passed through"]
