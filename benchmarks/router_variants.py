"""The models that ``bench_routers.py`` compares: one per causal router and the dense one, of equal arithmetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epmoe.config import Config, MoEConfig, router_classes
from epmoe.data.prepared import PreparedData
from epmoe.data.stream import open_stream
from epmoe.models.sizes import flops_per_token

DENSE = "dense FFN"
"""Name of the model without experts; the mixture in which all experts run is router ``dense``."""
TOLERANCE = 0.02
"""Largest difference of floating-point operations per token from the dense model."""
STEPS_OF_WIDTH = 64
"""Expert widths are whole multiples of the dense width divided by this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One model of the comparison."""

    name: str
    config: Config
    flops: int
    """Per token, forward and backward, of the whole model: ``epmoe.models.sizes.flops_per_token``."""
    why: str
    """How its options differ from those of the configuration it is made from, and why."""

    def with_seed(self, seed: int) -> Config:
        """The configuration of one run."""
        return self.config.model_copy(update={"seed": seed})

    @property
    def experts(self) -> str:
        """``K x F``: experts per token and their width."""
        moe = self.config.moe
        return f"1 x {self.config.model.d_ff}" if moe is None else f"{moe.top_k} x {moe.d_ff}"


def causal_routers() -> list[str]:
    """Names of the routers that a decoder takes as they are."""
    return [name for name, options in router_classes().items() if options().looks_ahead is None]


def left_out() -> dict[str, str]:
    """The other routers -> why a decoder does not take them."""
    reasons = {name: options().looks_ahead for name, options in router_classes().items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def make_variants(base: Config, prepared: PreparedData) -> list[Variant]:
    """The dense model first, then one per causal router, whose experts are as wide as equal arithmetic allows.

    Args:
        base: The sparse model they are made from; its router, top_k, losses and expert width are replaced.
        prepared: Its data.

    Raises:
        ValueError: ``base`` has no experts, or an expert width cannot come within 2% of the dense model's arithmetic.
    """
    if base.moe is None:
        raise ValueError("the configuration to start from has no experts (moe=null); choose a sparse one")
    shared = base.moe.model_dump(exclude_unset=True, exclude={"router", "top_k", "losses", "d_ff"})
    special = _special_options(base, _write_counts(base, prepared))
    vocab_size = prepared.padded_vocab_size
    target = _flops(base, None, vocab_size)
    dense = base.model_copy(update={"moe": None})
    variants = [Variant(name=DENSE, config=dense, flops=target, why="one feed-forward block for all tokens")]
    for name in causal_routers():
        options, why = special.get(name, ({}, "its defaults, with the configuration's capacity"))
        moe = _matched(base, {**shared, "router": name, **options}, target, vocab_size)
        flops = _flops(base, moe, vocab_size)
        if abs(flops / target - 1) > TOLERANCE:
            raise ValueError(
                f"router {name} with experts of width {moe.d_ff} needs {flops / target - 1:+.1%} of the dense model's "
                f"operations per token, more than {TOLERANCE:.0%} off; choose a wider model"
            )
        config = base.model_copy(update={"moe": moe})
        variants.append(Variant(name=name, config=config, flops=flops, why=why))
    return variants


def _special_options(base: Config, counts: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What a router needs besides its name -> keys of the section ``moe``, and the reason in words."""
    tasks = len(base.data.sources)
    return {
        "hierarchical": (
            {"router": {"name": "hierarchical", "num_groups": 2}},
            "two groups; a token goes to one of them and to two experts inside; the losses of its paper",
        ),
        "deepseek": (
            {"router": {"name": "deepseek", "bias_rate": 0.01}, "capacity_factor": None},
            "as V3 (sigmoid, bias, dropless), but the bias moves ten times as fast, since the run is short",
        ),
        "hash": (
            {"router": {"name": "hash", "table": "balanced", "counts": str(counts)}},
            "the balanced table, made from the counts of the training tokens",
        ),
        "task": (
            {"router": {"name": "task", "num_tasks": tasks}, "capacity_factor": None, "losses": {}},
            f"a task is a source of the data, here {tasks}: each has two experts of its own and the others stay "
            "unused; dropless and without losses, because its tokens have nowhere else to go",
        ),
        "dense": (
            {"capacity_factor": None, "losses": {}},
            "every expert runs for every token, so they are narrow, and there is nothing to drop or to balance",
        ),
    }


def _matched(base: Config, values: dict[str, Any], target: int, vocab_size: int) -> MoEConfig:
    """The section with the expert width whose arithmetic is nearest to ``target``; it is linear in the width."""
    unit = max(1, base.model.d_ff // STEPS_OF_WIDTH)
    one, two = (
        _flops(base, MoEConfig.model_validate({**values, "d_ff": unit * n}), vocab_size) for n in (1, 2)
    )
    widths = max(1, 1 + round((target - one) / (two - one)))
    return MoEConfig.model_validate({**values, "d_ff": unit * widths})


def _flops(base: Config, moe: MoEConfig | None, vocab_size: int) -> int:
    return flops_per_token(base.model, moe, vocab_size, base.data.seq_len)


def _write_counts(base: Config, prepared: PreparedData) -> Path:
    """How often every token id occurs in the training data, a line each, in a file of the data cache."""
    total_V = np.zeros(prepared.tokenizer.size, dtype=np.int64)
    for source in prepared.sources:
        tokens = open_stream(source.train, prepared.tokenizer).pair.tokens
        total_V += np.bincount(tokens, minlength=len(total_V))
    path = Path(base.data.cache) / f"counts-{prepared.fingerprint[:16]}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, total_V, fmt="%d")
    return path


def run_key(config: Config, data_fingerprint: str) -> str:
    """Names a run: equal when configuration and data are, wherever its files lie."""
    values = config.model_dump(mode="json", exclude={"out": True, "data": {"cache"}})
    router = (values["moe"] or {}).get("router", {})
    if router.get("counts"):
        router["counts"] = "of the training data"
    text = json.dumps([values, data_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(variants: Sequence[Variant]) -> str:
    """A line for every router: the options it has, and those that are left out."""
    lines = [f"- {variant.name}: {variant.why}" for variant in variants]
    lines += [f"- left out, not causal: {name} ({reason})" for name, reason in left_out().items()]
    return "\n".join(lines)
