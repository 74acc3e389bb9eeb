"""Text from a model, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from epmoe.errors import ConfigError, NumericsError
from epmoe.models.attention import KVCache
from epmoe.models.decoder import Decoder


def generate(
    model: Decoder,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> Iterator[int]:
    """Continues a prompt; yields each token as soon as it is drawn.

    Nothing is ever cut: the cache takes ``len(prompt) + max_tokens`` tokens, and the model, whose positions are
    rotary, accepts any length. Beyond the window it was trained on, expect the text to get worse. With a
    capacity in evaluation the prompt is one group and every later token a group of its own. The draws are made on
    the CPU, so a device or a layout changes them only through the rounding of the logits.

    The model runs in evaluation mode and without gradients while a token is computed, and is in its former mode
    whenever a token is handed out.

    Args:
        model: The model; with experts on several ranks, every rank makes the same call.
        prompt: Token ids, at least one.
        max_tokens: How many tokens at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from this many likeliest tokens only; None = all.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Of the draws.
        eos_id: Token that ends the text; it is not yielded.
        vocab_size: Only ids below this are drawn; None = the model's vocabulary, which may be padded.
        agree: With experts on several ranks, makes their draws one (a broadcast): logits that differ in the last
            bit could otherwise send the ranks different ways.

    Raises:
        ConfigError: If an argument is out of its range.
        NumericsError: If a logit is not finite.
    """
    limit = model.vocab_size if vocab_size is None else vocab_size
    _check_tokens(prompt, limit, model.vocab_size)
    if max_tokens < 0 or temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ConfigError(
            f"cannot sample with max_tokens={max_tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p}",
            fix="use max_tokens >= 0, temperature >= 0, top_k >= 1 and 0 < top_p <= 1",
        )

    def tokens() -> Iterator[int]:
        cache = KVCache(model.config, len(prompt) + max_tokens)
        rng = torch.Generator().manual_seed(seed)
        pending = prompt
        for _ in range(max_tokens):
            logits_V = _next_logits(model, pending, cache)[:limit]
            token = choose(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
            if agree is not None:
                token = agree(token)
            if token == eos_id:
                return
            yield token
            pending = [token]

    return tokens()


def choose(
    logits_V: Tensor, *, temperature: float, top_k: int | None, top_p: float, rng: torch.Generator
) -> int:
    """Draws a token: scale by the temperature, keep the ``top_k`` likeliest, of these the ``top_p`` nucleus.

    Of equal logits the lower id counts as likelier. arXiv:1904.09751 for the nucleus, which always holds the
    likeliest token and the one that reaches ``top_p``.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    # Less the maximum, so that a tiny temperature cannot overflow.
    scaled_V = (logits_V - logits_V.max()) / temperature
    sorted_V, id_V = scaled_V.sort(descending=True, stable=True)
    probs_V = sorted_V[:top_k].softmax(dim=0)
    before_V = probs_V.cumsum(dim=0) - probs_V
    probs_V = probs_V.masked_fill(before_V >= top_p, 0.0)
    return int(id_V[torch.multinomial(probs_V, 1, generator=rng)])


def _check_tokens(prompt: list[int], limit: int, vocab_size: int) -> None:
    if not prompt:
        raise ConfigError(
            "the prompt has no tokens", fix="start with at least one, such as the end-of-text token"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ConfigError(
            f"prompt ids lie in [{min(prompt)}, {max(prompt)}], the model knows [0, {vocab_size})",
            why="the prompt was encoded with another tokenizer",
        )
    if not 1 <= limit <= vocab_size:
        raise ConfigError(f"vocab_size={limit} must be in [1, {vocab_size}], the model's")


@torch.no_grad()
def _next_logits(model: Decoder, pending: list[int], cache: KVCache) -> Tensor:
    """Feeds the tokens that are not in the cache yet -> logits ``[V]`` of the next one, float32 on the CPU."""
    was_training = model.training
    model.eval()
    try:
        token_BS = torch.tensor([pending], device=model.embed.weight.device)
        logits_BSV, _ = model(token_BS, None, cache)
    finally:
        model.train(was_training)
    logits_V: Tensor = logits_BSV[0, -1].to("cpu", torch.float32)  # the one host sync per token
    if not logits_V.isfinite().all():
        bad = int((~logits_V.isfinite()).sum())
        raise NumericsError(
            f"{bad} of {logits_V.numel()} logits are not finite at position {cache.length}",
            why="the weights hold NaN or infinity, or the precision is too narrow",
        )
    return logits_V
