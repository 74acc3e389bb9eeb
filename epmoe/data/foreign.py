"""Pairs that somebody prepared before: by ``epmoe prepare``, with facts beside them, or by Megatron's tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from epmoe.config import SourceConfig
from epmoe.data.fidelity import count_text_bytes, decoded_parts, gives_text_back
from epmoe.data.files import StopFlag, crc32_of, stop_if
from epmoe.data.indexed import (
    IndexedPair,
    bin_path,
    idx_path,
    mask_path,
    open_indexed,
    pair_prefix,
)
from epmoe.data.prepared import (
    TOKENIZER_FOLDER,
    Facts,
    PreparedSplit,
    SourceRecord,
    SplitRecord,
    check_vocabulary,
    parse_record,
    verify_split,
)
from epmoe.data.stream import lacks_end
from epmoe.data.tokenizer import Tokenizer, load_tokenizer
from epmoe.errors import DataError


def facts_path(prefix: Path) -> Path:
    """The sidecar of a pair."""
    return Path(f"{prefix}.json")


def stored_tokenizer(source: SourceConfig) -> Tokenizer:
    """The tokenizer in the folder of an indexed source; DataError when there is none."""
    folder = pair_prefix(source.path).parent / TOKENIZER_FOLDER
    if not folder.is_dir():
        raise DataError(
            f"source {source.name} holds tokens, but {folder} does not exist, so their tokenizer is unknown",
            fix="set data.tokenizer to byte or to the tokenizer.json the tokens were made with",
        )
    return load_tokenizer(folder)


def describe_files(source: SourceConfig) -> list[object]:
    """Sizes and times of an indexed source's files: cheap to read, and different when a file was changed."""
    prefixes = [pair_prefix(path) for path in (source.path, source.val_path) if path is not None]
    files = [path(prefix) for prefix in prefixes for path in (bin_path, idx_path, mask_path, facts_path)]
    return [source.name, *([str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file())]


def index_source(source: SourceConfig, tokenizer: Tokenizer, should_stop: StopFlag) -> SourceRecord:
    """Checks an indexed source completely, once: every byte and every id."""
    train = _index_split(pair_prefix(source.path), tokenizer, should_stop, count_bytes=False)
    val = None
    if source.val_path is not None:
        val = _index_split(pair_prefix(source.val_path), tokenizer, should_stop, count_bytes=True)
    return SourceRecord(name=source.name, train=train, val=val)


def _index_split(
    prefix: Path, tokenizer: Tokenizer, should_stop: StopFlag, *, count_bytes: bool
) -> SplitRecord:
    facts = _known_facts(prefix)
    if facts is not None:
        verify_split(PreparedSplit(prefix=prefix, facts=facts, replaced=0, empty=0), tokenizer, should_stop)
        if count_bytes and facts.lost_share is None and gives_text_back(tokenizer):
            facts = facts.model_copy(update={"lost_share": 0.0})
        return SplitRecord(prefix=str(prefix), facts=facts, replaced=0, empty=0)
    pair = open_indexed(prefix)
    check_vocabulary(pair, tokenizer.size, should_stop)
    utf8_bytes = loss_bytes = lost_share = None
    if count_bytes:
        exact = count_text_bytes(pair, tokenizer)
        utf8_bytes, loss_bytes = exact or _decoded_bytes(pair, tokenizer, should_stop)
        lost_share = None if exact is None else 0.0
    facts = Facts(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.size,
        eos_id=tokenizer.eos_id,
        documents=pair.num_documents,
        tokens=len(pair.tokens),
        missing_eos=int(np.count_nonzero(lacks_end(pair, tokenizer.eos_id))),
        utf8_bytes=utf8_bytes,
        loss_utf8_bytes=loss_bytes,
        lost_share=lost_share,
        bin_crc32=crc32_of(bin_path(prefix), should_stop),
        idx_crc32=crc32_of(idx_path(prefix)),
        mask_crc32=None if pair.mask is None else crc32_of(mask_path(prefix), should_stop),
    )
    return SplitRecord(prefix=str(prefix), facts=facts, replaced=0, empty=0)


def _known_facts(prefix: Path) -> Facts | None:
    """What ``epmoe prepare`` wrote beside a pair; a file of that name from somebody else says nothing about it."""
    path = facts_path(prefix)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "tokenizer_sha256" not in found:
        return None
    return parse_record(
        Facts, path, fix=f"copy {path} again, or move it away to have the pair looked at anew"
    )


def _decoded_bytes(pair: IndexedPair, tokenizer: Tokenizer, should_stop: StopFlag) -> tuple[int, int]:
    """Bytes of the decoded text: all of it, and what counts in the loss."""
    total = counted = 0
    for start, end in zip(pair.document_offsets[:-1], pair.document_offsets[1:], strict=True):
        stop_if(should_stop)
        ids = pair.tokens[start:end]
        marked = ids if pair.mask is None else ids[pair.mask[start:end] != 0]
        total += sum(len(part.encode()) for part in decoded_parts(tokenizer, ids))
        counted += sum(len(part.encode()) for part in decoded_parts(tokenizer, marked))
    return total, counted
