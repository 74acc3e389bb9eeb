"""Processes that tokenise shards, one job at a time, over pipes.

They are plain child processes, not ``multiprocessing``: forking a process that has run torch's threads deadlocks,
and a spawned one would import the caller's main module, torch included. They ignore SIGINT and SIGTERM, because the
parent decides when to stop; they end when the parent closes their input or dies.

    parent -> worker   one JSON line per job
    worker -> parent   one JSON line per finished job: {"error": null} or {"error": [what, why, fix]}
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmoe import env
from epmoe.data.corpora import Corpus, Piece
from epmoe.data.files import StopFlag, stop_if
from epmoe.data.shards import ShardJob, make_shard
from epmoe.data.tokenizer import Tokenizer, load_tokenizer
from epmoe.errors import DataError, EpmoeError

POLL_S = 0.1
# Signals are ignored before anything slow is imported; the module path is the parent's, wherever it came from.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from epmoe.data.workers import serve; serve()"
)


def make_shards(
    jobs: Sequence[ShardJob], tokenizer: Tokenizer, *, num_workers: int, should_stop: StopFlag
) -> Generator[ShardJob, None, None]:
    """Makes shards in several processes (in this one when one is enough) and yields each job when it is done.

    Raises Preempted when the stop flag goes up, and DataError with the exit code when a worker dies.
    """
    if min(num_workers, len(jobs)) <= 1:
        for job in jobs:
            make_shard(job, tokenizer, should_stop)
            yield job
        return
    waiting = deque(jobs)
    workers = [_start() for _ in range(min(num_workers, len(jobs)))]
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.output, selectors.EVENT_READ, worker)
                _give(worker, waiting.popleft())
            while selector.get_map():
                stop_if(should_stop)
                for key, _ in selector.select(POLL_S):
                    yield _finished(key.data)
                    if waiting:
                        _give(key.data, waiting.popleft())
                    else:
                        selector.unregister(key.fileobj)
    finally:
        # Shards are written atomically: what a worker is in the middle of is lost, nothing is half done.
        for worker in workers:
            worker.process.kill()
            worker.process.communicate()


@dataclass(slots=True, kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    job: ShardJob | None = None

    @property
    def output(self) -> Any:
        return self.process.stdout


def _start() -> _Worker:
    command = [sys.executable, "-c", START, json.dumps(sys.path)]
    return _Worker(process=subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))


def _give(worker: _Worker, job: ShardJob) -> None:
    worker.job = job
    stream = worker.process.stdin
    if stream is None:
        raise RuntimeError("a worker without a pipe")
    try:
        stream.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
        stream.flush()
    except BrokenPipeError:
        raise _died(worker) from None


def _finished(worker: _Worker) -> ShardJob:
    line = worker.output.readline()
    if not line.endswith(b"\n") or worker.job is None:
        raise _died(worker)
    error = json.loads(line)["error"]
    if error is not None:
        raise DataError(error[0], why=error[1], fix=error[2])
    return worker.job


def _died(worker: _Worker) -> DataError:
    code = worker.process.wait()
    names = [] if worker.job is None else [piece.path for piece in worker.job.corpus.pieces]
    return DataError(
        f"a process that tokenises text ended with exit code {code}",
        why=f"it was working on {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; "
        "-9 usually means that the machine ran out of memory",
        fix="run the command again (finished shards are kept), with a smaller data.num_workers if memory is short",
    )


def serve() -> None:
    """The worker: jobs from standard input until it closes, replies to standard output."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    tokenizer: Tokenizer | None = None
    for number, line in enumerate(sys.stdin.buffer):
        job = _parse_job(json.loads(line))
        env.fault("data.worker", step=number)
        error: list[str | None] | None = None
        try:
            tokenizer = tokenizer or load_tokenizer(Path(job.tokenizer))
            make_shard(job, tokenizer)
        except EpmoeError as problem:
            error = [problem.what, problem.why, problem.fix]
        except OSError as problem:
            error = [f"{job.out} cannot be written", str(problem), "free space, or move data.cache"]
        try:
            print(json.dumps({"error": error}), file=replies, flush=True)
        except BrokenPipeError:
            os._exit(0)  # the parent is gone; there is nobody to tell


def _parse_job(values: dict[str, Any]) -> ShardJob:
    corpus = values.pop("corpus")
    pieces = tuple(Piece(**piece) for piece in corpus.pop("pieces"))
    left_out = tuple(corpus.pop("left_out"))
    return ShardJob(corpus=Corpus(pieces=pieces, left_out=left_out, **corpus), **values)
