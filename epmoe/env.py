"""The only reader of environment variables, and the fault-injection points.

Nothing here imports torch, so configuration mistakes are found before it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for a job of several processes. An empty variable counts as one that is not set."""


def rank() -> int:
    """Rank of this process in the job, 0 when it was not started by a launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """Processes in the job, 1 when it was not started by a launcher."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Rank of this process on its node; picks the GPU."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def launched() -> bool:
    """True under torchrun or any launcher that sets its variables."""
    return bool(os.environ.get("RANK") or os.environ.get("WORLD_SIZE"))


def missing_launch_variables() -> list[str]:
    """Launcher variables that must all be set for a job of several processes, and are not."""
    return [name for name in LAUNCHER if not os.environ.get(name)]


def wrong_launch_variable() -> str:
    """What is wrong with a number that a launcher, or somebody in its place, has set; empty when nothing is."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT"):
        if (text := os.environ.get(name, "")) and not text.isdecimal():
            return f"{name}={text!r} is not a number"
    for small, large in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if os.environ.get(large) and _number(small, 0) >= _number(large, 1):
            last = _number(large, 1) - 1
            return f"{small}={_number(small, 0)}, but {large}={last + 1}: ranks go from 0 to {last}"
    return ""


def adopt_tasks() -> None:
    """Makes tasks that Slurm (``srun -n 8 epmoe train``) or mpirun started look like a launcher's, where there is none.

    Under ``srun torchrun`` Slurm's variables describe torchrun, and RANK is set for the worker; a batch script without
    srun is no task of several, whatever the job was given.
    """
    if launched():
        return
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1 and os.environ.get("SLURM_PROCID", ""):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        number = _number("SLURM_JOB_ID", 0) * 16 + _number("SLURM_STEP_ID", 0)
        os.environ.setdefault("MASTER_ADDR", _first_host(nodes))
        os.environ.setdefault(
            "MASTER_PORT", str(15000 + number % 15000)
        )  # below what systems give away by themselves
    elif _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["OMPI_COMM_WORLD_SIZE"]:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    else:
        return
    for ours, theirs in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True):
        os.environ[ours] = os.environ.get(theirs, "")


def _first_host(nodes: str) -> str:
    """``gpu[007-010,12],login`` -> ``gpu007``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def local_world_size() -> int:
    """Ranks of the job on this node: what torchrun or DeepSpeed's launcher says, else Slurm."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name):
            return _number(name, 1)
    # "4(x2),3": two nodes with four tasks, one with three.
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, times in groups for _ in range(int(times or 1))]
    node = _number("SLURM_NODEID", 0)
    return tasks[node] if node < len(tasks) else 1


def take_place(rank: int, world_size: int) -> None:
    """Makes this process, one of several on this machine with a thread each, look like one of a launcher's."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # a container may not be able to resolve its own name, and all ranks are here
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def threads_chosen() -> bool:
    """True when the user or the launcher said how many threads a process may use."""
    return "OMP_NUM_THREADS" in os.environ


def batch_job() -> str:
    """Slurm's number of this job, the same after a requeue; empty elsewhere."""
    return os.environ.get("SLURM_JOB_ID", "")


def prefer_huge_pages() -> None:
    """Asks PyTorch's CPU allocator for pages of 2 MiB unless the user decided; to be called before torch is imported.

    A step allocates and frees large tensors, and taking them from the system in pages of 4 KiB costs a tenth of it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Lets glibc hand freed memory out again instead of returning it to the system -> whether it now does.

    Otherwise a step takes its large tensors from the system every time, which clears them page by page: on a CPU a
    tenth of the step. What the process had at its peak stays with it, in pages of 2 MiB if those are wanted. Nothing is
    changed where the environment configures glibc's allocator, nor where there is another C library; an allocator that
    was loaded before glibc's goes on as it is.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc, page, heap = ctypes.CDLL(None), 2**21, 2**30
    mmap_max, trim_threshold, huge_pages = -4, -1, 14  # M_MMAP_MAX, M_TRIM_THRESHOLD, MADV_HUGEPAGE
    if not hasattr(libc, "mallopt") or not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)):
        return False
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        libc.malloc.restype = ctypes.c_void_p
        block = libc.malloc(ctypes.c_size_t(heap))  # where the heap will grow; untouched, it takes no memory
        if block:
            libc.madvise(ctypes.c_void_p(-(-block // page) * page), ctypes.c_size_t(heap - page), huge_pages)
            libc.free(ctypes.c_void_p(block))
    return True


def prepare_deepspeed(device_type: str) -> None:
    """Tells DeepSpeed, before it is imported, what it computes on, and that a single process is rank 0 of its node.

    Left alone it guesses, and takes the CPU for a GPU of some kind where packages suggest that.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", "0")


RECORDED = (
    "NCCL_",
    "CUDA_",
    "TORCH",
    "THP_",
    "OMP_",
    "MALLOC_",
    "GLIBC_",
    "SLURM_",
    "GLOO_",
    "EPMOE_",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
)
SECRET = re.compile(r"key|token|secret|passw|pwd|credential|jwt|auth|sig|cookie", re.IGNORECASE)
"""Variables whose names contain one of these are masked, a few harmless ones among them."""
_NAME = r"(?<![a-z0-9])(?:[\w-]*[_-])?"
_VALUE = r"\s*[\"']?(?:(?:bearer|basic)\s+)?)[^\s&;,\"']+"
ASSIGNED = re.compile(
    rf"(?i)({_NAME}(?:(?:api|access)?key|(?<!eos_)token|secret|passw\w*|pwd|credentials?|jwt|auth|authorization|sig|"
    rf"signature|cookie)[\"']?\s*={_VALUE}"
)
"""``api_key=...`` and ``...&sig=...``; not ``data.eos_token=...``, which is a setting."""
HEADER = re.compile(
    rf"(?i)({_NAME}(?:(?:api|access)[_-]?key|[_-]token|secret|passw\w*|jwt|authorization|signature|cookie)[\"']?\s*:{_VALUE}"
)
"""``Authorization: Bearer ...`` and ``"password": "..."``."""


def recorded() -> dict[str, str]:
    """The variables a run's description may hold: a fixed list of prefixes, secrets masked."""
    kept = {name: value for name, value in sorted(os.environ.items()) if name.startswith(RECORDED)}
    return {name: "<redacted>" if SECRET.search(name) else redact(value) for name, value in kept.items()}


def redact(text: str) -> str:
    """Hides user and password of URLs, and the value of ``...token=``, ``...&sig=``, ``cookie: ...`` and the like."""
    text = re.sub(r"(\w+://)[^/@\s]+@", r"\1<redacted>@", text)
    return HEADER.sub(r"\1<redacted>", ASSIGNED.sub(r"\1<redacted>", text))


def masked(value: Any) -> Any:
    """A tree of dicts and lists, such as a configuration, with ``redact`` applied to every text in it."""
    if isinstance(value, dict):
        return {key: masked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def rendezvous_address() -> str:
    """``host:port`` of the launcher's rendezvous, for error messages."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    return f"{host}:{os.environ.get('MASTER_PORT', '?')}"


def attempt() -> int:
    """How often torchrun has restarted this job."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def launch_notes() -> str:
    """Folder in which ``epmoe launch`` expects notes of what it started; empty without it."""
    return os.environ.get("EPMOE_LAUNCH_NOTES", "")


def for_launcher(notes: str, grace_s: int) -> dict[str, str]:
    """The environment for a launcher under ``epmoe launch``; torchrun gives its workers the same grace."""
    return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_s), **os.environ, "EPMOE_LAUNCH_NOTES": notes}


def supervised() -> bool:
    """Whether a launcher on this node, torchrun's agent or DeepSpeed's, started this process and waits for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ


def die_with_parent() -> None:
    """Asks Linux to send this process SIGTERM when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent is gone, instead of process 1."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kernels() -> str:
    """``auto`` (native kernels where they are built) or ``reference`` (plain PyTorch always)."""
    return os.environ.get("EPMOE_KERNELS", "auto")


FAULT_POINTS = (
    "dispatch.exchange",
    "train.step_start",
    "train.after_backward",
    "train.eval",
    "ckpt.stage",
    "ckpt.mid_shard",
    "ckpt.shard_done",
    "ckpt.before_manifest",
    "ckpt.after_manifest",
    "ckpt.before_rename",
    "ckpt.after_rename",
    "ckpt.before_latest",
    "data.worker",
    "data.prepare",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One planned fault, parsed from ``EPMOE_FAULT``: where, when, and what happens there."""

    point: str
    action: str
    rank: int | None = None
    step: int | None = None
    attempt: int | None = None

    @staticmethod
    def parse(text: str) -> Fault:
        """``point=ckpt.before_rename,rank=1,step=7,action=kill,attempt=0`` -> Fault."""
        fields = dict(part.split("=", 1) for part in text.split(","))
        if fields["point"] not in FAULT_POINTS:
            raise ValueError(f"EPMOE_FAULT names {fields['point']!r}; points: {FAULT_POINTS}")
        numbers = {k: int(fields[k]) for k in ("rank", "step", "attempt") if k in fields}
        return Fault(point=fields["point"], action=fields["action"], **numbers)


def planned_faults() -> list[Fault]:
    """The faults ``EPMOE_FAULT`` asks for, separated by ``;``. Empty in every real run."""
    text = os.environ.get("EPMOE_FAULT", "")
    return [Fault.parse(part) for part in text.split(";") if part]


def fault(point: str, *, step: int | None = None) -> str | None:
    """A named place where tests make a run fail; does nothing unless ``EPMOE_FAULT`` is set.

    ``kill``, ``stop`` and ``term`` signal this process, ``exc`` raises, ``hang`` sleeps, ``enospc`` raises
    the disk-full error. Any other action (``nan``, ``inf``, ``oom``) is returned for the caller to act on.
    """
    if "EPMOE_FAULT" not in os.environ:
        return None
    for planned in planned_faults():
        wanted = (planned.rank, planned.step, planned.attempt)
        actual = (rank(), step, attempt())
        if planned.point != point or any(
            w is not None and w != a for w, a in zip(wanted, actual, strict=True)
        ):
            continue
        print(f"[rank {rank()}] injected fault: {planned}", file=sys.stderr, flush=True)
        return _act(planned)
    return None


def _act(planned: Fault) -> str | None:
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if planned.action in signals:
        os.kill(os.getpid(), signals[planned.action])
        return None
    if planned.action == "exc":
        raise RuntimeError(f"injected exception at {planned.point}")
    if planned.action == "enospc":
        raise OSError(28, "No space left on device (injected)")
    if planned.action == "hang":
        time.sleep(10**6)
    return planned.action
