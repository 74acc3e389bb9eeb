"""Control tokens that no text can spell.

A ``tokenizer.json`` may keep ``</s>`` among the pieces of its model, or match it in a text as an added token; then a
text that writes it would end a document. So the names are replaced before the file is used for texts: each control
token gets one that is made from a hash of the file, and what could build it up is taken away. Ids stay what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

Spec = dict[str, Any]


def hide_controls(source: bytes, eos_token: str) -> bytes:
    """The same tokenizer, to which end-of-text and every special token but the unknown one are not text.

    Args:
        source: A ``tokenizer.json`` that the library reads.
        eos_token: The token that ends a document.
    """
    spec: Spec = json.loads(source)
    model, added = spec["model"], spec.get("added_tokens") or []
    unknown = _unknown(model)
    special = {token["content"] for token in added if token.get("special")}
    controls = ({eos_token} | special | _named_by(spec.get("post_processor"))) - ({unknown} - {eos_token})
    digest = hashlib.sha256(source).hexdigest()
    hidden = {token: f"\ufdd0{digest}-{number}\ufdd1" for number, token in enumerate(sorted(controls))}
    _hide_in_model(model, hidden)
    for token in added:
        if token["content"] in hidden:
            token |= {"content": hidden[token["content"]], "special": True, "normalized": False}
    spec["post_processor"] = _without_templates(spec.get("post_processor"))
    return json.dumps(spec).encode()


def _unknown(model: Spec) -> str | None:
    """The token that stands for text the model does not know."""
    if isinstance(model["vocab"], list):  # Unigram
        unk_id = model.get("unk_id")
        return None if unk_id is None else str(model["vocab"][unk_id][0])
    token = model.get("unk_token")
    return None if token is None else str(token)


def _hide_in_model(model: Spec, hidden: Mapping[str, str]) -> None:
    vocab = model["vocab"]
    if model.get("unk_token") in hidden:  # end-of-text, where unknown text becomes that
        model["unk_token"] = hidden[model["unk_token"]]
    if isinstance(vocab, list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
        return
    model["vocab"] = {hidden.get(piece, piece): number for piece, number in vocab.items()}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, hidden)]


def _touches(merge: str | list[str], hidden: Iterable[str]) -> bool:
    """Whether a merge makes or uses one of these tokens."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in hidden or right in hidden or left + right in hidden


def _named_by(processor: Spec | None) -> set[str]:
    """Control tokens that a post-processor puts around a text."""
    if processor is None:
        return set()
    steps = processor.get("processors") or []
    pairs = [processor[key][0] for key in ("sep", "cls") if key in processor]
    return {*(processor.get("special_tokens") or {}), *pairs}.union(*map(_named_by, steps))


def _without_templates(processor: Spec | None) -> Spec | None:
    """Templates put control tokens around a text, by the names they had; corpora have none put there."""
    if processor is None or processor["type"] in (
        "TemplateProcessing",
        "BertProcessing",
        "RobertaProcessing",
    ):
        return None
    if processor["type"] == "Sequence":
        steps = [_without_templates(step) for step in processor["processors"]]
        return {**processor, "processors": [step for step in steps if step is not None]}
    return processor
