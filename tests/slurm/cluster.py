"""A Slurm cluster of two nodes on this host, in a temporary folder, with its own keys and ports.

No setting makes a job file's work easier: no RequeueExit, no cgroups. Needs Debian's ``slurm-wlm`` and ``munge``.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
CONFIGURATION = """\
ClusterName=epmoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={base}/munge.sock
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
MpiDefault=none
SwitchType=switch/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""
COMMANDS = {"epmoe": "epmoe", "torchrun": "torch.distributed.run"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What Slurm says of a job."""

    state: str
    exit_code: str
    """``code:signal`` of the job script."""
    restarts: int
    starts: str
    """When it began, or may begin."""


class Cluster:
    """Two nodes that run. Everything lies in ``base``."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "PATH": f"{base / 'bin'}:/usr/sbin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_CONF": str(base / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def run(self, *command: str, **variables: str) -> str:
        """Output of a command, which must succeed."""
        done = subprocess.run(
            command,
            env=self.environment | variables,
            cwd=self.base,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def submit(self, *options: str, overrides: Sequence[str] = (), **variables: str) -> str:
        """Submits launch/slurm.sbatch -> number of the job."""
        script = str(ROOT / "launch" / "slurm.sbatch")
        line = self.run("sbatch", "--parsable", "--nodes=2", *options, script, *overrides, **variables)
        return line.strip()

    def job(self, number: str) -> Job:
        """The job as it stands."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        found = dict(re.findall(r"(JobState|ExitCode|Restarts|StartTime)=(\S+)", text))
        return Job(
            state=found["JobState"],
            exit_code=found["ExitCode"],
            restarts=int(found["Restarts"]),
            starts=found["StartTime"],
        )

    def hurry(self, number: str) -> None:
        """Lets a requeued job start in seconds instead of two minutes. (In the same second a node would refuse it.)"""
        job = self.job(number)
        soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 10))
        if job.state == "PENDING" and soon < job.starts < "Unknown":
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def log(self, number: str) -> str:
        """What all starts of a job printed."""
        file = self.base / f"slurm-{number}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def ended(self, number: str, limit_s: float = 240.0) -> Job:
        """The job when it has ended; it never waits in the queue for long."""

        def over() -> bool:
            job = self.job(number)
            self.hurry(number)
            return job.state not in {"PENDING", "RUNNING", "COMPLETING"} and not self.processes(number)

        wait_until(over, limit_s, f"job {number} ends")
        return self.job(number)

    def processes(self, number: str, node: str = "") -> dict[int, str]:
        """Pid -> command line of what runs of a job, the batch script and everything it started, on any node."""
        found = {}
        marks = [f"SLURM_JOB_ID={number}", *([f"SLURMD_NODENAME={node}"] if node else [])]
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit():
                    continue
                variables = (entry / "environ").read_bytes().split(b"\0")
                ours = f"SLURM_CONF={self.base / 'slurm.conf'}".encode() in variables
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if ours and state != "Z" and all(mark.encode() in variables for mark in marks):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = line
        return found

    def kill(self, pids: Sequence[int], last: int = signal.SIGKILL) -> None:
        """A signal to processes, of which some may be gone."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, last)

    def fail_node(self, node: str, number: str) -> None:
        """Takes the power off: the daemon, the parents of a job's steps and all its processes on a node are gone."""
        os.kill(int((self.base / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        processes = self.processes(number, node)
        victims = [pid for pid in {*map(_step_daemon, processes), *processes} if pid is not None]
        self.kill(victims, signal.SIGSTOP)  # none of them sees another one go
        self.kill(victims)

    def start_node(self, node: str) -> None:
        """Switches a node on."""
        self.run("slurmd", "-N", node)
        wait_until(lambda: self.run("sinfo", "-h", "-n", node, "-o", "%T") == "idle\n", 60, f"{node} is idle")

    def start(self) -> None:
        """Starts the daemons; both nodes are idle afterwards."""
        self._write_files()
        key, base = self.base / "munge.key", self.base
        self.run(
            "munged",
            f"--key-file={key}",
            *(f"--{name}-file={base / 'munged'}.{name}" for name in ("pid", "log", "seed")),
            f"--socket={base / 'munge.sock'}",
            "--force",  # a temporary folder belongs to nobody in particular
        )
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)

    def stop(self) -> None:
        """Ends all jobs, and then the daemons."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            self.run("scancel", f"--user={getpass.getuser()}")
            wait_until(lambda: not self.run("squeue", "-h"), 60, "the queue is empty")
        for file in self.base.glob("*.pid"):  # which a daemon that ends takes away
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                os.kill(int(file.read_text()), signal.SIGTERM)
                wait_until(lambda file=file: not file.exists(), 10, f"{file.stem} ends")

    def _write_files(self) -> None:
        base = self.base
        (base / "munge.key").touch(mode=0o600)
        (base / "munge.key").write_bytes(os.urandom(1024))
        for name in ("bin", "state", *(f"spool-{node}" for node in NODES)):
            (base / name).mkdir()
        for name, module in COMMANDS.items():
            (base / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            (base / "bin" / name).chmod(0o755)
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        text = CONFIGURATION.format(base=base, host=host, user=user, ports=_free_ports(3))
        (base / "slurm.conf").write_text(text)


def missing_programs() -> list[str]:
    """Daemons that are not installed."""
    return [name for name in DAEMONS if shutil.which(name, path=f"/usr/sbin:{os.environ['PATH']}") is None]


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster while the block runs; nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="epmoe-slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def _step_daemon(pid: int) -> int | None:
    """The ``slurmstepd`` that started a process, if that was its parent."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
            return parent
    return None


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: It did not come true in time.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {limit_s:g} s still waiting: {what}")
        time.sleep(0.2)
