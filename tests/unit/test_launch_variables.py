"""What launchers set, and what counts as one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from epmoe import env
from tests.patience import HANGS_S

SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008],login",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def variables(monkeypatch):
    """An environment without a launcher, to which a test adds."""

    def set_only(**chosen: str) -> None:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "MASTER_", "LOCAL_"))
        }
        kept.pop("RANK", None)
        kept.pop("WORLD_SIZE", None)
        monkeypatch.setattr(os, "environ", kept | chosen)

    return set_only


def test_tasks_of_slurm_are_ranks(variables):
    variables(**SLURM)
    env.adopt_tasks()
    assert (env.rank(), env.world_size(), env.local_rank(), env.local_world_size()) == (3, 4, 1, 2)
    host, port = env.rendezvous_address().split(":")
    assert host == "gpu007"
    assert 15000 <= int(port) < 30000
    assert env.missing_launch_variables() == []
    assert env.wrong_launch_variable() == ""


def test_two_steps_of_a_job_meet_at_different_ports(variables):
    ports = set()
    for job, step in (("41", "0"), ("41", "1"), ("42", "0")):
        variables(**SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        env.adopt_tasks()
        ports.add(env.rendezvous_address())
    assert len(ports) == 3


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[7,9]", "gpu7"),
        ("gpu[007-010,12]", "gpu007"),
        ("rack1-gpu[3-4]-ib,x", "rack1-gpu3-ib"),
        ("a-1,b[2-3]", "a-1"),
    ],
)
def test_the_first_host_of_a_list_is_the_master(nodes, host, variables):
    variables(**SLURM | {"SLURM_STEP_NODELIST": nodes})
    env.adopt_tasks()
    assert env.rendezvous_address().rpartition(":")[0] == host


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {
            "SLURM_STEP_NUM_TASKS": ""
        },  # a batch script without srun: the job has four tasks, and this is none of them
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "0"},  # torchrun under srun
    ],
)
def test_where_there_is_one_process_or_a_launcher_slurm_is_not_asked(other, variables):
    variables(**SLURM | other)
    env.adopt_tasks()
    assert (env.rank(), env.world_size()) == ((5, 8) if "RANK" in other else (0, 1))


def test_what_the_user_says_of_the_master_stays(variables):
    variables(**SLURM, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    env.adopt_tasks()
    assert env.rendezvous_address() == "10.0.0.1:4000"


def test_processes_of_mpirun_are_ranks_and_over_nodes_need_a_master(variables):
    variables(**MPI)
    env.adopt_tasks()
    assert (env.rank(), env.world_size(), env.local_world_size()) == (1, 2, 2)
    assert env.missing_launch_variables() == []
    variables(**MPI | {"OMPI_COMM_WORLD_SIZE": "4"})
    env.adopt_tasks()
    assert env.missing_launch_variables() == ["MASTER_ADDR"]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK='a' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3, but WORLD_SIZE=2: ranks go from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0, but WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2, but"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        ({"WORLD_SIZE": ""}, ""),
        ({}, ""),
    ],
)
def test_a_wrong_number_is_named_and_an_empty_variable_is_none(chosen, words, variables):
    variables(**chosen)
    assert env.wrong_launch_variable().startswith(words)
    assert bool(env.wrong_launch_variable()) == bool(words)
    env.rank(), env.world_size(), env.local_rank()  # none of them raises


@pytest.mark.parametrize("chosen", [{"RANK": "a", "WORLD_SIZE": "2"}, {"RANK": "3", "WORLD_SIZE": "2"}])
def test_a_wrong_number_ends_a_run_with_code_2(chosen, tmp_path):
    command = [sys.executable, "-m", "epmoe", "train", "configs/quickstart.yaml", f"out={tmp_path}/out"]
    done = subprocess.run(
        command, env=os.environ | chosen, capture_output=True, text=True, check=False, timeout=HANGS_S
    )
    assert done.returncode == 2
    assert f"RANK={chosen['RANK'] if chosen['RANK'].isdecimal() else repr(chosen['RANK'])}" in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_outputs_are_none_of_a_runs_business():
    done = subprocess.run(
        f"{sys.executable} -m epmoe prepare no-such.yaml <&- >&- 2>&-",
        shell=True,
        check=False,
        timeout=HANGS_S,
    )
    assert done.returncode == 2
