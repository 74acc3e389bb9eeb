"""Small tokenizers of every kind that a ``tokenizer.json`` may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from epmoe.data.tokenizer import JsonTokenizer, json_tokenizer, train_bpe
from tests.unit.data.helpers import text

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/[]|.,'"


def _made(inner: tokenizers.Tokenizer, eos_token: str) -> JsonTokenizer:
    return json_tokenizer(inner.to_str().encode(), name="made", eos_token=eos_token)


def unigram(*, special: bool = True, normalizer: normalizers.Normalizer | None = None) -> JsonTokenizer:
    """As T5 and its relatives have it; ``</s>`` is a piece of the model."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -4.0) for letter in "▁" + LETTERS] + [("▁the", -3.0), ("old", -3.0)]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if special:
        inner.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return _made(inner, "</s>")


def word_level() -> JsonTokenizer:
    """Whole words and nothing else."""
    vocab = {word: number for number, word in enumerate(("<unk>", "<eos>", "the", "old", "price", "<mask>"))}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<mask>"])
    return _made(inner, "<eos>")


def word_piece() -> JsonTokenizer:
    """As BERT has it, lower-casing."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "old", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {word: number for number, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer, inner.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _made(inner, "[SEP]")


def bpe_with_end_in_its_merges() -> JsonTokenizer:
    """A plain BPE that learnt its end-of-text from texts that spelled it."""
    vocab = {letter: number for number, letter in enumerate(LETTERS + " ")}
    merges = [("<", "e"), ("o", "s"), ("<e", "os"), ("<eos", ">"), ("<eos>", "a")]
    vocab |= {left + right: len(vocab) + number for number, (left, right) in enumerate(merges)}
    return _made(tokenizers.Tokenizer(models.BPE(vocab, merges)), "<eos>")


def byte_level(*, special: bool) -> JsonTokenizer:
    """A byte-level BPE with an end-of-text that was added."""
    inner = tokenizers.Tokenizer.from_str(
        train_bpe([text(seed, 300) for seed in range(20)], 300).source.decode()
    )
    inner.add_tokens([AddedToken("<end>", special=special, normalized=False)])
    return _made(inner, "<end>")


def byte_fallback() -> JsonTokenizer:
    """As Llama 2 has it: a space in front of every text, and bytes for what has no piece."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {letter: 259 + number for number, letter in enumerate("▁" + LETTERS)}
    vocab["▁a"] = len(vocab)
    inner = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _made(inner, "</s>")


MADE: Mapping[str, Callable[[], JsonTokenizer]] = MappingProxyType(
    {
        "unigram": unigram,
        "unigram without added tokens": lambda: unigram(special=False),
        "word level": word_level,
        "word piece": word_piece,
        "plain bpe": bpe_with_end_in_its_merges,
        "byte level": lambda: byte_level(special=True),
        "byte level, end not special": lambda: byte_level(special=False),
        "byte fallback": byte_fallback,
    }
)
