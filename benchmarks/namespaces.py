"""Several nodes on one machine: network namespaces that meet at a switch, each over a link of a chosen rate.

    node 0 (10.77.0.1) --- rate --- switch --- rate --- node 1 (10.77.0.2)
                                      |
                                      +------- rate --- node 2 (10.77.0.3) ...

Every process of a node sees no network but its own link, so the nodes are as apart as machines are: other loopbacks,
other ports, and a wire whose speed is known. Both directions of a link are shaped by a token bucket (tbf). Linux, with
``ip`` and ``tc`` of iproute2 and the right to make namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

LINK = "link0"
"""Name of a node's only network interface besides loopback."""
NETWORK = "10.77.0"
OWN_FILES = Path("/etc/netns")
QUEUE_S = 1.0
"""A packet waits at most this long for its turn on the link; then it would be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One namespace."""

    name: str
    address: str

    def start(
        self, command: Sequence[str], *, environment: Mapping[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Runs a command on the node. Gloo and NCCL are told which interface to use."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            env={**environment, "GLOO_SOCKET_IFNAME": LINK, "NCCL_SOCKET_IFNAME": LINK},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def sent_bytes(self) -> int:
        """Bytes that left over the link so far, with all headers."""
        shown = _run("ip", "-n", self.name, "-s", "-j", "link", "show", LINK)
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def kill(self) -> None:
        """Ends every process of the node."""
        for pid in _run("ip", "netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def why_not() -> str | None:
    """Why this machine cannot have such nodes; None if it can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    try:
        with nodes(1, rate_mbit=100.0):
            return None
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}"
    except OSError as error:
        return str(error)


@contextlib.contextmanager
def nodes(count: int, *, rate_mbit: float, burst_bytes: int = 32768) -> Iterator[list[Node]]:
    """Nodes joined by a switch; afterwards their processes, links and namespaces are gone.

    Args:
        rate_mbit: Megabits per second that a link carries in each direction.
        burst_bytes: What may pass at once after a pause; keep it well below a message, or small messages would seem
            to travel faster than the link.

    Raises:
        subprocess.CalledProcessError: The machine refuses; ``stderr`` says why.
    """
    job = f"epmoe-{uuid.uuid4().hex[:6]}"
    switch = f"{job}-switch"
    made = [Node(name=f"{job}-{i}", address=f"{NETWORK}.{i + 1}") for i in range(count)]
    try:
        for node in made:
            _write_names(node, made)
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "up")
        for number, node in enumerate(made):
            _run("ip", "netns", "add", node.name)
            _join(node, switch, f"port{number}", rate_mbit, burst_bytes)
        yield made
    finally:
        for node in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                node.kill()
        for name in (*(node.name for node in made), switch):
            shutil.rmtree(OWN_FILES / name, ignore_errors=True)
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "delete", name)


def _write_names(node: Node, everybody: Sequence[Node]) -> None:
    """``ip netns exec`` shows these in /etc: without them every look at a peer's name waits for a name server that
    the node cannot reach."""
    lines = ["127.0.0.1 localhost", f"{node.address} {socket.gethostname()}"]
    lines += [f"{prefix}{other.address} {other.name}" for other in everybody for prefix in ("", "::ffff:")]
    folder = OWN_FILES / node.name
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "resolv.conf").write_text("")


def _join(node: Node, switch: str, port: str, rate_mbit: float, burst_bytes: int) -> None:
    peer = ["peer", "name", port, "netns", switch]
    _run("ip", "-n", node.name, "link", "add", LINK, "type", "veth", *peer)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge0", "up")
    _run("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", LINK)
    for interface in (LINK, "lo"):
        _run("ip", "-n", node.name, "link", "set", interface, "up")
    shape = ["rate", f"{rate_mbit}mbit", "burst", str(burst_bytes), "latency", f"{QUEUE_S}s"]
    for name, interface in ((node.name, LINK), (switch, port)):
        # One packet of the link is one packet of the bucket: segments joined by the network card would not fit in it.
        _run("ip", "-n", name, "link", "set", interface, "gso_max_size", str(min(8192, burst_bytes // 2)))
        _run("tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *shape)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------------------- torchrun
def torchrun(
    where: Sequence[Node],
    arguments: Sequence[str],
    *,
    python: str,
    ranks_per_node: int,
    environment: Mapping[str, str],
    logs: Path,
    timeout_s: float,
) -> None:
    """One torchrun agent on every node, static rendezvous at the first; returns when all have ended well.

    Args:
        arguments: After ``torchrun``'s own: a script, or ``-m module``, and what it takes.
        logs: Folder for what each node's processes print.

    Raises:
        RuntimeError: An agent failed or did not end in time; the message ends with its last lines.
    """
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in environment.items() if name not in launcher}
    agents: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for number, node in enumerate(where):
            agent = [python, "-m", "torch.distributed.run", f"--nnodes={len(where)}", f"--node-rank={number}"]
            agent += [f"--nproc-per-node={ranks_per_node}", f"--master-addr={where[0].address}"]
            agent += ["--master-port=29500", *arguments]
            output = stack.enter_context((logs / f"node{number}.log").open("wb"))
            agents.append(node.start(agent, environment=clean, output=output))
        try:
            failed = _first_failure(agents, time.monotonic() + timeout_s)
        finally:
            for node in where:
                node.kill()
            for process in agents:
                process.wait()
    if failed:
        last = [f"--- node {n}\n{_tail(logs / f'node{n}.log')}" for n in range(len(where))]
        raise RuntimeError("\n".join([failed, *last]))


def _first_failure(agents: Sequence[subprocess.Popen[bytes]], deadline: float) -> str | None:
    while True:
        statuses = [agent.poll() for agent in agents]
        for number, status in enumerate(statuses):
            if status:
                return f"torchrun on node {number} ended with status {status}"
        if None not in statuses:
            return None
        if time.monotonic() > deadline:
            running = [number for number, status in enumerate(statuses) if status is None]
            return f"torchrun was not done in time on node(s) {running}"
        time.sleep(0.05)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
