"""``epmoe doctor``: can this machine train, and with what; or, given a run folder, how that run is doing."""

from __future__ import annotations

import ipaddress
import json as jsonlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import epmoe
from epmoe import env
from epmoe.cli.run_report import report_run
from epmoe.errors import ConfigError, printable

GIB = 2**30
NEEDED = ("torch", "numpy", "pydantic", "tokenizers", "safetensors", "tensorboard")
NOT_NEEDED = "not installed, not needed"
INSTALL_TORCH = "pip install torch, then epmoe again with --no-build-isolation, which compiles its kernels"
Status = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing the doctor looked at."""

    part: str
    name: str
    value: str
    status: Status = "ok"
    """``failure`` = training cannot work; ``warning`` = some of it cannot; ``note`` = nothing to worry about."""
    fix: str | None = None


def doctor(run: Path | None, json: bool) -> None:
    """Prints the findings, or the state of a run; exits with 1 when training cannot work on this machine, or the run is
    dead or hangs.

    Args:
        run: A run folder to report on instead of the machine.
        json: One JSON object on stdout instead of tables.
    """
    if run is not None:
        if not report_run(run, json):
            raise typer.Exit(1)
        return
    findings = examine()
    healthy = all(finding.status != "failure" for finding in findings)
    if json:
        print(jsonlib.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_findings(findings)
    if not healthy:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Everything the doctor looks at; a look that itself fails is a finding, not a crash."""
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _devices,
        _cores_and_memory,
        _kernels,
        _rendezvous,
        _storage,
        _optional_packages,
    )
    findings = []
    for look in looks:
        try:
            findings += list(look())
        except ModuleNotFoundError as error:
            value = f"not looked at: {error.name} is not installed"
            told = error.name in NEEDED and _installed(error.name) is None  # among the versions
            status: Status = "note" if told else "failure"
            findings.append(Finding(part=_name(look), name="check", value=value, status=status))
        except Exception as error:
            value = f"{type(error).__name__}: {error}"
            findings.append(Finding(part=_name(look), name="check", value=value, status="failure"))
    return findings


def _name(look: Callable[[], Iterator[Finding]]) -> str:
    return look.__name__.strip("_").replace("_", " ")


# --------------------------------------------------------------------------------------------- machine
def _versions() -> Iterator[Finding]:
    yield Finding(part="versions", name="python", value=platform.python_version())
    yield Finding(part="versions", name="epmoe", value=epmoe.__version__)
    for name in NEEDED:
        found = _installed(name)
        if found is None:
            fix = f"pip install {name}" if name != "torch" else INSTALL_TORCH
            yield Finding(part="versions", name=name, value="not installed", status="failure", fix=fix)
        else:
            yield Finding(part="versions", name=name, value=found)


def _devices() -> Iterator[Finding]:
    import torch

    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        built = (
            f"torch was built for CUDA {cuda}, but sees no GPU" if cuda else "this build of torch has no CUDA"
        )
        status: Status = "warning" if cuda else "note"
        fix = "check nvidia-smi and the driver" if cuda else None
        yield Finding(part="devices", name="cuda", value=built, status=status, fix=fix)
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        value = (
            f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
        )
        yield Finding(part="devices", name=f"cuda:{index}", value=value)
    yield Finding(
        part="devices", name="cpu", value=f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    )


def _cores_and_memory() -> Iterator[Finding]:
    import torch

    usable = len(os.sched_getaffinity(0))
    value = (
        f"{usable} usable of {os.cpu_count()}, torch uses {torch.get_num_threads()} thread(s) in one process"
    )
    yield Finding(part="machine", name="cores", value=value)
    pages = {name: os.sysconf(f"SC_{name}") for name in ("PHYS_PAGES", "AVPHYS_PAGES")}
    total, free = (count * os.sysconf("SC_PAGE_SIZE") / GIB for count in pages.values())
    yield Finding(part="machine", name="memory", value=f"{total:.1f} GiB, {free:.1f} GiB unused")


def _kernels() -> Iterator[Finding]:
    from epmoe.ops.registration import kernel_status

    name, reason = kernel_status()
    yield Finding(part="machine", name="kernels", value=f"{name}: {reason}")


def _rendezvous() -> Iterator[Finding]:
    """torchrun on one node needs a free port on localhost; gloo needs this host's own name to resolve."""
    started = time.perf_counter()
    with socket.create_server(("localhost", 0)) as server:
        server.settimeout(5)
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port), timeout=5) as client:
            peer, _ = server.accept()
            with peer:
                client.sendall(b"epmoe")
                received = peer.recv(5, socket.MSG_WAITALL)
    took = 1000 * (time.perf_counter() - started)
    echoed = received == b"epmoe"
    value = (
        f"localhost answers on port {port} in {took:.1f} ms"
        if echoed
        else "localhost returned something else"
    )
    yield Finding(part="network", name="rendezvous", value=value, status="ok" if echoed else "failure")
    host = socket.gethostname()
    yield _reach(env.rendezvous_address().rpartition(":")[0] if env.launched() else host)
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
        yield Finding(part="network", name="host name", value=f"{host} is {address}")
    except OSError as error:
        fix = f"add '127.0.0.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
        yield Finding(part="network", name="host name", value=f"{host}: {error}", status="warning", fix=fix)
    yield _process_group()


def _reach(host: str) -> Finding:
    """The rendezvous trusts everybody who reaches it (SECURITY.md)."""
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
    except OSError as error:
        return Finding(part="network", name="reach", value=f"{host}: {error}", status="note")
    public = [address for address in addresses if ipaddress.ip_address(address.partition("%")[0]).is_global]
    if not public:
        return Finding(part="network", name="reach", value=f"{host} is {', '.join(addresses)}: not routable")
    return Finding(
        part="network",
        name="reach",
        value=f"the rendezvous at {host} is {', '.join(public)}, which can be reached from outside; "
        "whoever reaches it can run code in the job",
        status="warning",
        fix="MASTER_ADDR on a private interface, and a firewall or NetworkPolicy around its ports",
    )


def _process_group() -> Finding:
    from epmoe.process.runtime import start, stop

    started = time.perf_counter()
    stop(start("cpu", 10.0))
    took = 1000 * (time.perf_counter() - started)
    return Finding(part="network", name="process group", value=f"gloo starts in {took:.0f} ms")


def _storage() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / GIB
    with tempfile.TemporaryFile(dir="."):
        pass  # a folder that cannot be written to raises, and that is the finding
    status: Status = "warning" if free < 2 else "ok"
    yield Finding(
        part="storage",
        name="this folder",
        value=f"{free:.1f} GiB free",
        status=status,
        fix="a checkpoint takes 12 bytes per parameter in fp32; set `out` to a larger disk"
        if free < 2
        else None,
    )
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).total / GIB if shared.is_dir() else 0.0
    small = size < 0.25
    yield Finding(
        part="storage",
        name="/dev/shm",
        value=f"{size:.2f} GiB",
        status="warning" if small else "ok",
        fix="NCCL exchanges data there; in Docker: --shm-size=1g" if small else None,
    )


# ----------------------------------------------------------------------------------- optional packages
def _optional_packages() -> Iterator[Finding]:
    """Imports only what could run here: some of these take seconds to load or compile things."""
    found = (_installed("deepspeed") or "installed") if find_spec("deepspeed") else NOT_NEEDED
    yield Finding(part="optional", name="deepspeed", value=found, status="note")
    yield flash_finding()
    yield apex_finding()


def flash_finding() -> Finding:
    """What ``model.attention=auto`` would take here for heads of 128 in bfloat16, and why."""
    import torch

    from epmoe.config import ModelConfig
    from epmoe.models.accelerators import choose_accelerators, compute_capability, flash_is_installed

    if not flash_is_installed():
        return Finding(part="optional", name="flash-attn", value=NOT_NEEDED, status="note")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = choose_accelerators(ModelConfig(head_dim=128), device=device, dtype=torch.bfloat16)
    unusable = found.attend is None and compute_capability(device) is not None
    value = f"{_installed('flash-attn') or 'installed'}; attention: {found.note}"
    return Finding(part="optional", name="flash-attn", value=value, status="warning" if unusable else "note")


def apex_finding() -> Finding:
    """Which package called apex is there, and whether NVIDIA's works."""
    import torch

    from epmoe.engines.optimizer import load_fused_adam
    from epmoe.models.accelerators import compute_capability, find_apex

    kind = find_apex()
    if kind == "missing":
        return Finding(part="optional", name="apex", value=NOT_NEEDED, status="note")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        load_fused_adam(device, torch.float32)
    except ConfigError as error:
        unusable = kind == "unrelated" or compute_capability(device) is not None
        return Finding(
            part="optional",
            name="apex",
            value=error.why or error.what,
            status="warning" if unusable else "note",
            fix="pip uninstall apex; NVIDIA's apex is not needed: torch's fused AdamW is the default"
            if kind == "unrelated"
            else None,
        )
    return Finding(part="optional", name="apex", value="NVIDIA's, its FusedAdam works", status="note")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---------------------------------------------------------------------------------------------- output
def _print_findings(findings: list[Finding]) -> None:
    styles = {"ok": "green", "note": "dim", "warning": "yellow", "failure": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    part = ""
    for finding in findings:
        text = Text(printable(finding.value))
        if finding.fix:
            text.append(printable(f"\nfix: {finding.fix}"), style="bold")
        status = Text(finding.status, style=styles[finding.status])
        table.add_row(finding.part if finding.part != part else "", finding.name, status, text)
        part = finding.part
    console = Console()
    console.print(table)
    bad = sum(finding.status == "failure" for finding in findings)
    verdict = f"{bad} problem(s): training cannot work here yet" if bad else "training can work here"
    console.print(Text(verdict, style="bold red" if bad else "bold green"))
