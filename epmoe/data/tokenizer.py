"""Text to token ids and back: bytes, a trained byte-level BPE, or any ``tokenizer.json``.

Texts never encode to the end-of-text token, whatever they spell, and it decodes to nothing: it only ever stands
between documents. ``save`` and ``load_tokenizer`` keep a tokenizer in a folder, byte for byte.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from epmoe.data.controls import hide_controls
from epmoe.data.files import read_json, write_atomically, write_json
from epmoe.errors import ConfigError, DataError

MARKER_FILE = "epmoe_tokenizer.json"
JSON_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<EOS>",
    "[EOS]",
    "<|endofdocument|>",
    "<|end▁of▁sentence|>",
)
"""What published tokenizers call the token between documents, most common first."""

WORD_END = re.compile(r"\S(?=[ \n])")
TRAINING_PART_CHARS = 1 << 16
"""The library gathers some hundred texts before it counts their words."""

Offsets = list[tuple[int, int]]


class Tokenizer(Protocol):
    """What the rest of epmoe knows about a tokenizer."""

    @property
    def name(self) -> str:
        """For people: ``byte``, ``bpe`` or the file it came from."""

    @property
    def size(self) -> int:
        """Every id is below this."""

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""

    @property
    def sha256(self) -> str:
        """Identity: equal exactly when texts become the same ids."""

    @property
    def context_free(self) -> bool:
        """A text may be cut anywhere: the ids of its parts, one after the other, are its own."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any added token."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids, and the ``[start, end)`` characters each of them came from."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; end-of-text and ids of the vocabulary's padding decode to nothing."""

    def save(self, folder: Path) -> None:
        """Writes it into a folder for ``load_tokenizer``."""


def padded_vocab_size(size: int, multiple: int) -> int:
    """Rows of the model's embedding: the tokenizer's size rounded up to a multiple."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8 and end-of-text."""

    name: str = "byte"
    size: int = 257
    eos_id: int = 256
    context_free: bool = True

    @property
    def sha256(self) -> str:
        """Fixed: there is one byte tokenizer."""
        return hashlib.sha256(b"epmoe byte tokenizer: 256 bytes, end of text = 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The bytes; each byte of a character spans that character."""
        offsets = [(i, i + 1) for i, char in enumerate(text) for _ in char.encode()]
        return self.encode(text), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes as UTF-8, with U+FFFD for what is none."""
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Writes the marker file; there is nothing else to keep."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MARKER_FILE, {"kind": "byte", "name": self.name, "eos_token": None})


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``; made by ``json_tokenizer``."""

    name: str
    size: int
    eos_id: int
    eos_token: str
    source: bytes
    """The file, byte for byte."""
    inner: tokenizers.Tokenizer
    """Reads texts: the file with its control tokens hidden."""
    context_free: bool = False

    @property
    def sha256(self) -> str:
        """Of the file and of which token ends a text."""
        return hashlib.sha256(self.source + b"\0" + self.eos_token.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin-of-text and the like.

        Where unknown text would become end-of-text, which no text may, it is left out.
        """
        # The batch call does not track offsets, which saves a quarter of the time.
        with _library_errors(f"{self.name} cannot encode a text"):
            ids = list(self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return [i for i in ids if i != self.eos_id] if self.eos_id in ids else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids and the characters they came from."""
        with _library_errors(f"{self.name} cannot encode a text"):
            encoding = self.inner.encode(text, add_special_tokens=False)
        ids, offsets = list(encoding.ids), list(encoding.offsets)
        if self.eos_id not in ids:
            return ids, offsets
        kept = [number for number, token in enumerate(ids) if token != self.eos_id]
        return [ids[number] for number in kept], [offsets[number] for number in kept]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        known = [i for i in ids if 0 <= i < self.size and i != self.eos_id]
        with _library_errors(f"{self.name} cannot decode its tokens"):
            return str(self.inner.decode(known, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Writes ``tokenizer.json`` unchanged, then the marker that says which token ends a text."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / JSON_FILE, self.source)
        write_json(folder / MARKER_FILE, {"kind": "json", "name": self.name, "eos_token": self.eos_token})


def json_tokenizer(source: bytes, *, name: str, eos_token: str | None = None) -> JsonTokenizer:
    """Bytes of a ``tokenizer.json`` -> tokenizer.

    Args:
        source: The file's bytes.
        name: What to call it in messages.
        eos_token: Its end-of-text token; None = the first of the usual names it has.
    """
    with _library_errors(f"{name} is no tokenizer.json"):
        given = tokenizers.Tokenizer.from_buffer(source)
        vocab: dict[str, int] = given.get_vocab(with_added_tokens=True)
    candidates = END_OF_TEXT_NAMES if eos_token is None else (eos_token,)
    found = next((token for token in candidates if token in vocab), None)
    if found is None:
        special = [t.content for t in given.get_added_tokens_decoder().values() if t.special]
        raise DataError(
            f"{name} has no end-of-text token: looked for {', '.join(candidates)}",
            why=f"its special tokens are {', '.join(special) or 'none'}",
            fix="name the one that ends a document: data.eos_token=...",
        )
    size = max(vocab.values()) + 1
    if size > 2 * len(vocab):
        raise DataError(
            f"{name} has {len(vocab):,} entries with ids up to {size - 1:,}",
            why="every id up to the largest needs a row of the embedding",
            fix="number its entries without gaps, or use another tokenizer.json",
        )
    with _library_errors(f"{name} is no tokenizer.json"):
        inner = tokenizers.Tokenizer.from_buffer(hide_controls(source, found))
    # A file may ask for cut or filled-up texts; a corpus wants neither. Special tokens spelled in a text are text.
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    return JsonTokenizer(
        name=name, size=size, eos_id=vocab[found], eos_token=found, source=source, inner=inner
    )


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """What the library raises as DataError: bare Exception, or the panic of its Rust side, which is none."""
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            what,
            why=str(error),
            fix="use another tokenizer.json; one that knows every text is byte-level or has an unknown token",
        ) from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Trains a byte-level BPE: same texts in the same order -> same file, on any number of cores.

    Args:
        texts: Training documents.
        vocab_size: Wanted entries; a very small corpus gives fewer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + 1
    if vocab_size < smallest:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small for a byte-level BPE",
            why="256 bytes and the end-of-text token need an entry each",
            fix=f"use {smallest} or more, or data.tokenizer=byte",
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return json_tokenizer(inner.to_str().encode(), name="bpe", eos_token=END_OF_TEXT)


def training_parts(blocks: Iterable[str]) -> Iterator[str]:
    """A long text in parts that train the same BPE: they end where a word does, behind which no token goes on."""
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        for word_end in WORD_END.finditer(rest):
            if word_end.end() - start >= TRAINING_PART_CHARS:
                yield rest[start : word_end.end()]
                start = word_end.end()
        rest = rest[start:]
    if rest:
        yield rest


def load_tokenizer(where: str | Path, *, eos_token: str | None = None) -> Tokenizer:
    """``byte``, a folder that ``save`` wrote, a folder with a ``tokenizer.json``, or such a file -> tokenizer.

    Args:
        where: Name, folder or file.
        eos_token: End-of-text token of a foreign ``tokenizer.json``; None = by its usual names.
    """
    if str(where) == "byte":
        return ByteTokenizer()
    path = Path(where).expanduser()
    if (path / MARKER_FILE).is_file():
        return _load_saved(path)
    file = path / JSON_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"tokenizer {str(where)!r} is neither 'byte' nor a file, and no folder with a {JSON_FILE}",
            fix="set data.tokenizer to byte, bpe or the path of a tokenizer.json",
        )
    return json_tokenizer(file.read_bytes(), name=str(file), eos_token=eos_token)


def _load_saved(folder: Path) -> Tokenizer:
    marker: Any = read_json(folder / MARKER_FILE)
    kind = marker.get("kind") if isinstance(marker, dict) else None
    if kind == "byte":
        return ByteTokenizer()
    name, eos_token = (marker.get("name"), marker.get("eos_token")) if kind == "json" else (None, None)
    if not isinstance(name, str) or not isinstance(eos_token, str):
        raise DataError(f"{folder / MARKER_FILE} does not describe a tokenizer", why=f"it holds {marker!r}")
    file = folder / JSON_FILE
    if not file.is_file():
        raise DataError(f"{file} is missing", why=f"{MARKER_FILE} beside it says there is one")
    return json_tokenizer(file.read_bytes(), name=name, eos_token=eos_token)
