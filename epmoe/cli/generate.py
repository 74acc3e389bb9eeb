"""``epmoe generate``: continues a prompt, printing each piece of text as soon as it is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from epmoe.errors import ConfigError, printable
from epmoe.process.runtime import pick_device
from epmoe.train.generate import generate as generate_tokens
from epmoe.train.load_trained import load_trained


def generate(
    checkpoint: Path,
    prompt: str | None,
    prompt_file: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
) -> None:
    """Loads a checkpoint in this process and writes the prompt and its continuation to standard output.

    Args:
        checkpoint: Run folder or checkpoint.
        prompt: Text to continue; None = ``prompt_file``, or the run's own sample prompt.
        prompt_file: File with the prompt, ``-`` = standard input.
    """
    text = _prompt(prompt, prompt_file)
    shown_as = printable if sys.stdout.isatty() else str
    trained = load_trained(checkpoint, device=pick_device("auto"))
    tokenizer = trained.tokenizer
    text = trained.config.train.sample.prompt if text is None else text
    ids = tokenizer.encode(text) or [tokenizer.eos_id]
    produced: list[int] = []
    # Decoded together with the prompt: on its own, the first token of many tokenizers loses its leading space.
    shown = len(tokenizer.decode(ids))
    sys.stdout.write(shown_as(text))
    tokens = generate_tokens(
        trained.model,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.size,
    )
    for token in tokens:
        produced.append(token)
        whole = tokenizer.decode([*ids, *produced])
        # A character may need several tokens; until it is complete, decoding ends in a replacement character.
        if not whole.endswith("\ufffd"):
            sys.stdout.write(shown_as(whole[shown:]))
            sys.stdout.flush()
            shown = len(whole)
    print(shown_as(tokenizer.decode([*ids, *produced])[shown:]))


def _prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    if prompt_file is None:
        return None if prompt is None else _typed(prompt)
    try:
        data = _standard_input() if prompt_file == "-" else Path(prompt_file).read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompt from {prompt_file}", why=str(error)) from None


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ConfigError("standard input is closed", fix="--prompt-file FILE, or --prompt TEXT")
    buffer = getattr(sys.stdin, "buffer", None)  # its bytes: the locale may take them for another encoding
    return sys.stdin.read().encode() if buffer is None else bytes(buffer.read())


def _typed(prompt: str) -> str:
    """A prompt from the command line, whatever the locale took its bytes for."""
    try:
        prompt.encode()
        return prompt
    except UnicodeEncodeError:  # half surrogates stand for bytes that the locale's encoding does not know
        pass
    try:
        return os.fsencode(prompt).decode("utf-8")
    except UnicodeError as error:
        raise ConfigError(
            "the prompt is not UTF-8", why=str(error), fix="type it in UTF-8, or give it with --prompt-file"
        ) from None
