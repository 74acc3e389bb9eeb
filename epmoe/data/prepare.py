"""From a configuration to prepared data: scan, train the tokenizer, tokenise in several processes, merge, rename.

    <cache>/<key>                     the result; appears by one rename, complete
    <cache>/.<key>.work/tokenizer     kept between runs until the result is there
                       /shards/       one folder per finished shard
                       /result/       becomes <cache>/<key>
    <cache>/.<key>.lock               held by the process that prepares; the others wait and find the result
    <cache>/.<source>.<sha256>.files  sizes, times and hashes of a source's files, so that they are read once

Fault point ``data.prepare``: step n = after the n-th finished shard, number of shards + 1 = before the last rename.

The key is a fingerprint of the text and of every option that changes tokens, so a changed corpus or tokenizer is
prepared anew, while ``seq_len``, weights and the like use what is there. Killed at any point, the next run continues
from the finished shards.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from epmoe import env
from epmoe.config import DataConfig, SourceConfig
from epmoe.data.corpora import (
    Corpus,
    Split,
    also_training,
    is_indexed,
    on_one_side,
    scan,
)
from epmoe.data.files import Report, StopFlag, never_stop, silent, stop_if, sync_folder, write_json
from epmoe.data.foreign import describe_files, facts_path, index_source, stored_tokenizer
from epmoe.data.indexed import IndexedWriter, token_dtype
from epmoe.data.known import KnownFiles
from epmoe.data.passages import documents, read_piece
from epmoe.data.prepared import (
    FORMAT_VERSION,
    RECORD_FILE,
    TOKENIZER_FOLDER,
    Facts,
    PreparedData,
    PreparedRecord,
    PreparedSource,
    SourceRecord,
    SplitRecord,
    open_prepared,
)
from epmoe.data.shards import SPLITS, Counts, ShardJob, merge_shard, plan_shards
from epmoe.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, training_parts
from epmoe.data.workers import make_shards
from epmoe.errors import ConfigError, DataError

MADE_BY = 2
"""Raised when texts become other tokens than before, so that what is kept is made again."""
BPE_TRAINING_CHARS = 256 << 20
"""Text that trains a tokenizer, at most; every source gives an equal share, its first documents."""
LOCK_POLL_S = 0.2
ABANDONED_S = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be prepared."""

    cfg: DataConfig
    corpora: tuple[Corpus, ...]
    """The sources of text, without the indexed ones."""
    tokenizer: Tokenizer | None
    """None: a BPE is trained."""

    @property
    def key(self) -> str:
        """Names the result."""
        indexed = [describe_files(source) for source in self.cfg.sources if is_indexed(source)]
        trained = f"bpe {self.cfg.vocab_size}"
        parts = [
            FORMAT_VERSION,
            MADE_BY,
            [source.name for source in self.cfg.sources],
            [corpus.fingerprint for corpus in self.corpora],
            indexed,
            trained if self.tokenizer is None else self.tokenizer.sha256,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def prepare(
    cfg: DataConfig, *, progress: Report = silent, should_stop: StopFlag = never_stop
) -> PreparedData:
    """Prepares all sources, or finds them prepared -> PreparedData.

    Args:
        cfg: The data section.
        progress: Called with phase, bytes done, bytes in all; ``console_progress`` makes one.
        should_stop: Polled between pieces of work; Preempted when it is true.

    Raises:
        ConfigError: An ``eos_token`` for a tokenizer that has its own.
        DataError: Missing, empty, malformed or changed text; fewer training tokens than one window; a dead worker.
        Preempted: Asked to stop; what is finished is kept.
    """
    plan = _plan(cfg, progress, should_stop)
    cache = Path(cfg.cache).expanduser()
    folder = cache / plan.key
    try:
        # Looked for first: what somebody else prepared may lie where nothing can be written, not even a lock.
        if not (folder / RECORD_FILE).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f".{plan.key}.lock", should_stop):
                if not (folder / RECORD_FILE).is_file():
                    _build(plan, cache / f".{plan.key}.work", folder, progress, should_stop)
    except OSError as error:
        raise DataError(
            f"data cannot be prepared in {cache}",
            why=str(error),
            fix="free space or set data.cache, then run the command again; finished shards are kept",
        ) from error
    prepared = open_prepared(folder, cfg)
    corpora = {corpus.name: corpus for corpus in plan.corpora}
    sources = [
        replace(source, sentence=_sentence(source, corpora.get(source.name))) for source in prepared.sources
    ]
    twice = {name: also_training(plan.corpora, corpus) for name, corpus in corpora.items()}
    remarks = tuple(
        f"{count} validation file(s) or pieces of source {name} are training text too"
        for name, count in twice.items()
        if count
    )
    return replace(prepared, sources=tuple(sources), remarks=remarks)


def _sentence(source: PreparedSource, corpus: Corpus | None) -> str:
    """What a source was read as."""
    if corpus is not None:
        return corpus.sentence
    return f"a pair of token files, {source.train.facts.stream_tokens:,} training tokens"


def _plan(cfg: DataConfig, progress: Report, should_stop: StopFlag) -> _Plan:
    texts = [source for source in cfg.sources if not is_indexed(source)]
    tokenizer = given_tokenizer(cfg)
    corpora = []
    for source in texts:
        known = KnownFiles(_known_path(cfg, source))
        corpora.append(scan(source, progress, should_stop, known))
        known.save()
    return _Plan(cfg=cfg, corpora=tuple(on_one_side(corpora)), tokenizer=tokenizer)


def _known_path(cfg: DataConfig, source: SourceConfig) -> Path:
    digest = hashlib.sha256(source.model_dump_json().encode()).hexdigest()
    return Path(cfg.cache).expanduser() / f".{source.name}.{digest[:16]}.files"


def given_tokenizer(cfg: DataConfig) -> Tokenizer | None:
    """The tokenizer that is there before any text is read; None = a BPE will be trained.

    Raises ConfigError for an ``eos_token`` that would not be used, DataError when the tokenizer cannot be read.
    """
    if cfg.eos_token is not None and cfg.tokenizer in ("byte", "bpe"):
        raise ConfigError(
            f"data.eos_token={cfg.eos_token!r} has no effect with data.tokenizer={cfg.tokenizer}",
            why="byte and bpe have an end-of-text token of their own",
            fix="leave data.eos_token out, or set data.tokenizer to the path of a tokenizer.json",
        )
    if cfg.tokenizer != "bpe":
        return load_tokenizer(cfg.tokenizer, eos_token=cfg.eos_token)
    # Tokens that exist already fix the tokenizer: a newly trained one could not read them.
    indexed = [source for source in cfg.sources if is_indexed(source)]
    return stored_tokenizer(indexed[0]) if indexed else None


@contextmanager
def _locked(path: Path, should_stop: StopFlag) -> Iterator[None]:
    """Holds an advisory lock; the system releases it when the process dies, however it dies."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop_if(should_stop)
                time.sleep(LOCK_POLL_S)
        yield


def _build(plan: _Plan, work: Path, folder: Path, progress: Report, should_stop: StopFlag) -> None:
    """Makes the result in the work folder and renames it into place."""
    shards, result = work / "shards", work / "result"
    shards.mkdir(parents=True, exist_ok=True)
    for unfinished in shards.glob(".*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(unfinished)
    tokenizer = _work_tokenizer(plan, work / TOKENIZER_FOLDER, progress, should_stop)
    jobs = [job for corpus in plan.corpora for job in plan_shards(corpus, shards, work / TOKENIZER_FOLDER)]
    _finish_shards(plan, jobs, tokenizer, progress, should_stop)

    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    records, corpora = [], {corpus.name: corpus for corpus in plan.corpora}
    for source in plan.cfg.sources:
        if source.name in corpora:
            own = [job for job in jobs if job.corpus.name == source.name]
            records.append(_merge_source(corpora[source.name], own, result, tokenizer, should_stop))
        else:
            records.append(index_source(source, tokenizer, should_stop))
    tokenizer.save(result / TOKENIZER_FOLDER)
    record = PreparedRecord(tokenizer_sha256=tokenizer.sha256, sources=records)
    write_json(result / RECORD_FILE, record.model_dump())
    env.fault("data.prepare", step=len(jobs) + 1)
    os.rename(result, folder)
    sync_folder(folder.parent)
    shutil.rmtree(work, ignore_errors=True)
    _sweep(folder.parent)


def _sweep(cache: Path) -> None:
    """Removes what preparations of other configurations left here and nobody went on with for a week."""
    for work in cache.glob(".*.work"):
        lock = work.with_suffix(".lock")
        with suppress(OSError), lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            places = (work, *work.iterdir())
            if time.time() - max(place.stat().st_mtime for place in places) > ABANDONED_S:
                shutil.rmtree(work)


def _work_tokenizer(plan: _Plan, folder: Path, progress: Report, should_stop: StopFlag) -> Tokenizer:
    if folder.is_dir():
        return load_tokenizer(folder)
    tokenizer = plan.tokenizer or train_bpe(
        _training_texts(plan.corpora, progress, should_stop), plan.cfg.vocab_size
    )
    temporary = folder.with_name(f".{folder.name}")
    tokenizer.save(temporary)
    os.rename(temporary, folder)
    return tokenizer


def _training_texts(corpora: Sequence[Corpus], progress: Report, should_stop: StopFlag) -> Iterator[str]:
    done = 0
    for corpus in corpora:
        room = BPE_TRAINING_CHARS // len(corpora)
        for piece in corpus.pieces:
            if piece.split == "val" or room <= 0:
                continue
            stop_if(should_stop)
            for first, others in documents(read_piece(corpus, piece)):
                if first.split == "train":
                    for text in training_parts(passage.text for passage in chain([first], others)):
                        stop_if(should_stop)
                        room -= len(text)
                        yield text
            done += piece.end - piece.start
            progress("reading text for the tokenizer", done, 0)


def _finish_shards(
    plan: _Plan, jobs: Sequence[ShardJob], tokenizer: Tokenizer, progress: Report, should_stop: StopFlag
) -> None:
    missing = [job for job in jobs if not Path(job.out).is_dir()]
    total = sum(job.corpus.num_bytes for job in jobs)
    done = total - sum(job.corpus.num_bytes for job in missing)
    workers = plan.cfg.num_workers or _cores()
    finished = make_shards(missing, tokenizer, num_workers=workers, should_stop=should_stop)
    with closing(finished):
        for number, job in enumerate(finished, start=len(jobs) - len(missing) + 1):
            done += job.corpus.num_bytes
            progress("tokenising", done, total)
            env.fault("data.prepare", step=number)


def _cores() -> int:
    """Cores this process may use; a batch system often gives fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _merge_source(
    corpus: Corpus, jobs: Sequence[ShardJob], result: Path, tokenizer: Tokenizer, should_stop: StopFlag
) -> SourceRecord:
    splits = [_merge_split(corpus, jobs, split, result, tokenizer, should_stop) for split in SPLITS]
    return SourceRecord(name=corpus.name, train=splits[0], val=splits[1])


def _merge_split(
    corpus: Corpus,
    jobs: Sequence[ShardJob],
    split: Split,
    result: Path,
    tokenizer: Tokenizer,
    should_stop: StopFlag,
) -> SplitRecord:
    """Joins one split of the shards, in order, into one pair with its facts beside it."""
    prefix, counts = result / f"{corpus.name}.{split}", Counts()
    writer = IndexedWriter(prefix, token_dtype(tokenizer.size), with_mask=corpus.loss_field is not None)
    for job in jobs:
        stop_if(should_stop)
        counts.add(merge_shard(job, split, writer))
    sums = writer.finish()
    facts = Facts(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.size,
        eos_id=tokenizer.eos_id,
        documents=counts.documents,
        tokens=counts.tokens,
        missing_eos=0,
        utf8_bytes=counts.utf8_bytes,
        loss_utf8_bytes=counts.loss_utf8_bytes,
        lost_share=counts.lost_chars / max(counts.chars, 1) if split == "val" else None,
        bin_crc32=sums.bin_crc32,
        idx_crc32=sums.idx_crc32,
        mask_crc32=sums.mask_crc32,
    )
    write_json(facts_path(prefix), facts.model_dump())
    return SplitRecord(prefix=prefix.name, facts=facts, replaced=counts.replaced, empty=counts.empty)
