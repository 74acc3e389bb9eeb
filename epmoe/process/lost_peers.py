"""Who is missing when a collective fails, or takes long.

A rank that loses contact cannot tell a dead peer from one that is itself waiting for the dead one. So every rank has a
small thread that answers a roll call through the rendezvous store, also while the rank waits in a collective: a
killed or stopped process does not answer, one that is busy elsewhere says where. The same thread tells the store
from time to time where its rank is; the two lowest ranks look at the others when they have waited for long.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from epmoe import env
from epmoe.comm import waiting
from epmoe.errors import CommError, EpmoeError, MemoryExhausted

MAX_NOTE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a rank stopped, as it told the others."""

    exit_code: int
    text: str

    def dump(self) -> str:
        """As text for the store."""
        return f"{self.exit_code} {self.text[:MAX_NOTE]}"

    @staticmethod
    def parse(text: str) -> Cause:
        """The other way round."""
        code, _, rest = text.partition(" ")
        return Cause(exit_code=int(code), text=rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class RollCall:
    """What became known about the ranks after a failure."""

    answers: dict[int, str]
    """Where each rank that answered is. Empty when the store does not answer either."""
    causes: dict[int, Cause]
    """What ended each rank that did not answer, as far as it left a note."""
    world_size: int

    @property
    def silent(self) -> list[int]:
        """Ranks that neither answered nor said why."""
        return [r for r in range(self.world_size) if r not in self.answers and r not in self.causes]

    @property
    def elsewhere(self) -> list[int]:
        """Ranks that answered, but are not in a collective."""
        return [rank for rank, answer in sorted(self.answers.items()) if not answer.startswith(WAITING)]


WAITING = "waiting in a collective"


@dataclass(slots=True, kw_only=True)
class Responder:
    """Answers the roll call for one rank, from a thread.

    Args:
        store: The rendezvous store all ranks share.
    """

    rank: int
    world_size: int
    store: Store
    patience_s: float
    """After so long in one place the ranks that are waited for are named; a tenth of the time-out."""
    place: str = "start-up"
    """Step and phase, told by ``watching``."""
    stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _roll: RollCall = field(init=False)

    def __post_init__(self) -> None:
        self._roll = RollCall(answers={}, causes={}, world_size=self.world_size)

    def start(self) -> None:
        """Starts listening; without peers there is nothing to listen for. It ends by itself with the process."""
        if self.world_size > 1:
            self._thread = threading.Thread(target=self._listen, name="epmoe roll call", daemon=True)
            self._thread.start()
            atexit.register(self.stop)  # a thread inside the store must not meet the end of the interpreter

    def stop(self) -> None:
        """Stops listening; call it before the process group is destroyed."""
        atexit.unregister(self.stop)
        self.stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _listen(self) -> None:
        interval_s = max(0.1, self.world_size / 500)  # a few thousand small requests per second at most
        watch = Watch(responder=self)
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody can ask any more
            while not self.stopped.wait(interval_s):
                watch.look()
                if self.store.check([_key("call")]):
                    self.store.set(_key(f"answer/{self.rank}"), _position())
                    # The store may go down with the rank that called: keep what the others say.
                    self._collect(time.monotonic() + 5.0)
                    return

    @property
    def leads(self) -> bool:
        """After a roll call: whether no lower rank answered, and rank 0 has not said why it stopped."""
        return 0 not in self._roll.causes and min(self._roll.answers, default=self.rank) == self.rank

    def leave_note(self, cause: Cause) -> None:
        """Tells the peers, who will only see a closed connection, why this rank is about to stop."""
        with contextlib.suppress(RuntimeError):
            self.store.set(_key(f"cause/{self.rank}"), cause.dump())

    def call(self, where: str, grace_s: float) -> RollCall:
        """Asks all ranks where they are and waits up to ``grace_s`` for the answers."""
        with contextlib.suppress(RuntimeError):  # then what this rank's own thread has heard must do
            self.store.set_timeout(timedelta(seconds=grace_s))
            self.store.set(_key(f"answer/{self.rank}"), f"{WAITING} at {where}")
            self.store.set(_key("call"), "")
            self._collect(time.monotonic() + grace_s)
            time.sleep(0.1)  # the store may live in this process: let the others read before it ends
        return self._roll

    def _collect(self, deadline: float) -> None:
        answers: dict[int, str] = {}
        missing = list(range(self.world_size))
        while missing and time.monotonic() < deadline and not self.stopped.wait(0.02):
            answers |= self.read("answer", missing)
            missing = [rank for rank in range(self.world_size) if rank not in answers]
            causes = {rank: Cause.parse(note) for rank, note in self.read("cause", missing).items()}
            self._roll = RollCall(answers=dict(answers), causes=causes, world_size=self.world_size)
            missing = [rank for rank in missing if rank not in causes]

    def read(self, kind: str, ranks: list[int]) -> dict[int, str]:
        """What ranks wrote under a kind of key; those that wrote nothing are left out."""
        keys = {rank: _key(f"{kind}/{rank}") for rank in ranks}
        return {r: self.store.get(key).decode() for r, key in keys.items() if self.store.check([key])}


@dataclass(slots=True, kw_only=True)
class Watch:
    """Notices, long before the time-out, that this rank is stuck in one call, and names those that it waits for."""

    responder: Responder
    _call: tuple[int, int] = (0, 0)
    _since: float = 0.0
    _told_at: float = 0.0
    _named: bool = False

    def look(self) -> None:
        """Tells where this rank is, a few times per patience; the two lowest ranks look for those that are missing."""
        mine, now = self.responder, time.monotonic()
        if now < self._told_at + mine.patience_s / 4:
            return
        self._told_at, position, call = now, _position(), _innermost_call()
        mine.store.set(_key(f"at/{mine.rank}"), f"{now:.3f} {position}")
        if call != self._call or position != WAITING:
            self._call, self._since, self._named = call, now, False
        elif mine.rank < 2 and not self._named and now - self._since > 0.9 * mine.patience_s:
            self._named = True
            self._name()

    def _name(self) -> None:
        others = [rank for rank in range(self.responder.world_size) if rank != self.responder.rank]
        first = self.responder.read("at", others)
        if self.responder.stopped.wait(self.responder.patience_s / 2):
            return
        second = self.responder.read("at", others)
        silent = [rank for rank in others if first.get(rank) == second.get(rank)]
        busy = {rank: at.partition(" ")[2] for rank, at in second.items() if rank not in silent}
        missing = [f"rank {rank} does not answer" for rank in silent]
        missing += [f"rank {rank} is {at}" for rank, at in busy.items() if at != WAITING]
        if missing:
            told, waited = "; ".join(missing[:8]), time.monotonic() - self._since
            print(
                f"[rank {self.responder.rank}] has waited {waited:.0f} s at {self.responder.place}: {told}",
                file=sys.stderr,
                flush=True,
            )


def _key(name: str) -> str:
    return f"epmoe/roll/{name}"


def _innermost_call() -> tuple[int, int]:
    """Frame and instruction of the main thread: the same for as long as it is stuck in one call."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (id(frame), frame.f_lasti) if frame else (0, 0)


def _position() -> str:
    """Where the main thread is."""
    threads = {ident: traceback.extract_stack(frame) for ident, frame in sys._current_frames().items()}
    threads.pop(threading.get_ident(), None)
    files = {
        frame.filename for stack in threads.values() for frame in stack
    }  # on a GPU, backward has its own threads
    # torchrun's wrapper around the whole run lies there too, and is no collective.
    of_torch = {file for file in files if "torch/distributed/" in file and "/elastic/" not in file}
    if of_torch or {__file__, waiting.__file__} & files:
        return WAITING
    ident = threading.main_thread().ident
    stack = threads.get(ident) if ident is not None else None
    if not stack:
        return "somewhere unknown"
    return f"in {stack[-1].name} ({stack[-1].filename}:{stack[-1].lineno})"


SIGNS = ("gloo/", "NCCL", "pair closure", "Connection closed by peer", "Connection reset by peer")
"""In the texts of failed collectives. After a time-out gloo says no more than that it closed the pair."""


def is_comm_failure(error: BaseException) -> bool:
    """Whether an exception comes from a collective. gloo raises plain RuntimeErrors that name its source files."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception of its own; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if is_out_of_memory(error):
        return MemoryExhausted.exit_code
    return error.exit_code if isinstance(error, EpmoeError) else 1


def comm_error(responder: Responder, where: str, error: Exception, timeout_s: float) -> CommError:
    """A failed collective as an error that names the missing ranks. The stacks of this process go to stderr."""
    rank = responder.rank
    _dump_stacks(f"[rank {rank}] a collective failed at {where}; stacks of this process:")
    # Long enough for every responder to look several times; ranks that time out do so at slightly different moments.
    grace_s = timeout_s / 100 if "timed out" in str(error).lower() or "timeout" in str(error).lower() else 0.5
    roll = responder.call(where, min(5.0, max(0.5, grace_s, responder.world_size / 200)))
    slow = f"if it was only slow, raise parallel.timeout_s (now {timeout_s:g})"
    first, code = None, CommError.exit_code
    if not roll.answers:
        what = (
            f"rank {rank} lost the job at {where}: the rendezvous store at {env.rendezvous_address()} is gone"
        )
        fix = "rank 0, or the launcher that hosts the store, has most likely died: look at its log first"
    elif roll.causes:
        first, cause = min(roll.causes.items())
        code = cause.exit_code
        what = f"rank {rank} lost rank {first} at {where}, which stopped at {cause.text}"
        fix = f"the log of rank {first} has the whole traceback"
    elif roll.silent:
        first = roll.silent[0]
        what = f"rank {rank} lost rank(s) {roll.silent} at {where}: dead or stopped"
        fix = f"look at the logs of rank(s) {roll.silent}, and for the kernel's out-of-memory killer"
    elif roll.elsewhere:
        first = roll.elsewhere[0]
        others = "; ".join(f"rank {r} is {roll.answers[r]}" for r in roll.elsewhere[:4])
        what = f"rank {rank} timed out waiting for rank(s) {roll.elsewhere} at {where}"
        fix = f"{others}; {slow}"
    else:
        what = f"rank {rank} failed to communicate at {where}, though all ranks answer"
        fix = f"check the network between the nodes; {slow}"
    lost = CommError(what, why=str(error).partition("\n")[0][:300], fix=fix)
    lost.rank, lost.exit_code = first, code  # every rank ends with the code of the first cause
    return lost


def _dump_stacks(title: str) -> None:
    """Writes the stacks of all threads to stderr in one piece: several ranks that do so at once stay readable."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        stacks = file.read().decode(errors="replace")
    print(f"{title}\n{stacks}", file=sys.stderr, flush=True)
