"""What router families share: choosing, random numbers, and the way from choices to a list of assignments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epmoe.config_routers import RouterOptions
from epmoe.ops import philox, route_topk
from epmoe.types import RouterInputs, Routing

UNAVAILABLE = -(2**62)
"""Score below all others."""

PRIORITY_STEPS = 2**30
"""Probabilities are compared for priority in steps of this fraction: equal ones tie whatever their last bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Up to K experts per token, best first, before they become a list in slot order."""

    probs_TE: Tensor
    ids_TK: Tensor
    """int64, valid ids also where inactive."""
    weights_TK: Tensor
    """0 where inactive."""
    active_TK: Tensor
    """bool; a token that can be routed uses its first choice."""


def missing_draws(policy: str) -> ValueError:
    """The error of a random policy that was not told which samples the tokens belong to."""
    return ValueError(
        f"{policy!r} draws random numbers in training and needs TokenContext.sample_B "
        f"(the sample number of each sequence); pass ctx=TokenContext(sample_B=...)"
    )


def numbers_given(inputs: RouterInputs, name: str, shape: tuple[int, ...], policy: str) -> Tensor | None:
    """The random numbers in the field ``name``; None when they are to be drawn from ``inputs.draws``.

    Raises:
        ValueError: Neither numbers nor counters, or both, or numbers of another shape.
    """
    given: Tensor | None = getattr(inputs, name)
    if given is None and inputs.draws is None:
        raise missing_draws(policy)
    if given is not None and inputs.draws is not None:
        raise ValueError(f"give a random policy either counters (draws) or numbers ({name}), not both")
    if given is not None and given.shape != shape:
        raise ValueError(
            f"{name} needs one number per token{' and column' if len(shape) > 1 else ''}, shape {shape}, "
            f"got {tuple(given.shape)}"
        )
    return given


def drawn_uniform(inputs: RouterInputs, stream: int, num_lanes: int) -> Tensor:
    """Draws in [0, 1) -> float32 ``[T, num_lanes]``, from counters that are known to be there."""
    draws = inputs.draws
    assert draws is not None
    return philox.uniform(draws.seed, stream, draws.layer, draws.sample_T, draws.position_T, num_lanes)


def drawn_normal(inputs: RouterInputs, stream: int, num_lanes: int) -> Tensor:
    """Standard normal draws -> ``[T, num_lanes]`` in the dtype of the logits, from counters that are there."""
    draws = inputs.draws
    assert draws is not None
    normal = philox.normal(draws.seed, stream, draws.layer, draws.sample_T, draws.position_T, num_lanes)
    return normal.to(inputs.logits_TE.dtype)


def top_ids(scores_TX: Tensor, k: int) -> Tensor:
    """The k best of each row, at equal scores the lowest first -> int64 ``[T, k]``."""
    return scores_TX.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def choose(
    inputs: RouterInputs,
    top_k: int,
    *,
    normalize: bool,
    logits_TE: Tensor | None = None,
    second_policy: str = "all",
    tau: float = 0.5,
) -> Choices:
    """Top-k of the logits by the fused operator.

    Args:
        logits_TE: Chosen from instead of ``inputs.logits_TE``.
        normalize: Weights are a softmax over the chosen logits; else raw probabilities.
        second_policy: ``all`` | ``random`` | ``threshold`` | ``none``, see ``epmoe.ops.reference.route_topk``.

    Raises:
        ValueError: ``second_policy="random"`` without draws or with both kinds, or draws of the wrong shape.
    """
    draws, uniform_T = inputs.draws, None
    if second_policy == "random":
        uniform_T = numbers_given(inputs, "uniform_T", tuple(inputs.valid_T.shape), "random")
    sample_T, position_T = (None, None) if draws is None else (draws.sample_T, draws.position_T)
    probs_TE, ids_TK, weights_TK, active_TK = route_topk(
        inputs.logits_TE if logits_TE is None else logits_TE,
        inputs.valid_T,
        uniform_T,
        sample_T,
        position_T,
        top_k,
        normalize,
        second_policy,
        tau,
        draws.seed if draws else 0,
        draws.layer if draws else 0,
    )
    return Choices(probs_TE=probs_TE, ids_TK=ids_TK, weights_TK=weights_TK, active_TK=active_TK)


def at_hand(values: Tensor) -> bool:
    """Whether a look at the numbers makes nobody wait: they are in host memory. Compiled and fake tensors have none."""
    return values.device.type == "cpu" and type(values) is Tensor and not torch.compiler.is_compiling()


def without_unusable(logits_TE: Tensor, valid_T: Tensor, usable_T: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with 0 in the rows of tokens that are not usable, and how many real tokens are broken (int64 scalar).

    All -inf says that no expert is available, not that any is broken.
    """
    if at_hand(usable_T) and usable_T.all():  # the usual case: nothing to mask or to count
        return logits_TE, torch.zeros((), dtype=torch.int64, device=usable_T.device)
    broken_T = valid_T & ~usable_T & (logits_TE.amax(-1) != -torch.inf)
    return logits_TE.masked_fill(~usable_T.unsqueeze(1), 0.0), broken_T.sum()


def probabilities(logits_TE: Tensor, usable_T: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with 0 in the rows of tokens that are not usable, and their softmax, which is 0 in these rows."""
    unusable_T1 = ~usable_T.unsqueeze(1)
    clean_TE = logits_TE.masked_fill(unusable_T1, 0.0)
    return clean_TE, clean_TE.softmax(-1).masked_fill(unusable_T1, 0.0)


def scored(logits_TE: Tensor, usable_T: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and log-probabilities for comparing tokens -> ``probs_TE`` (zero rows where not usable) and int64
    ``score_TE``, in steps of 1/PRIORITY_STEPS from float64: equal ones tie whatever their last bits.

    Where an expert is not available, or a token not usable, the score is ``UNAVAILABLE``.
    """
    clean_TE, probs_TE = probabilities(logits_TE, usable_T)
    closed_TE = ~usable_T.unsqueeze(1) | (clean_TE == -torch.inf)
    log_TE = clean_TE.detach().double().log_softmax(-1).masked_fill(closed_TE, 0.0)
    score_TE = (log_TE * PRIORITY_STEPS).round().long()
    return probs_TE, score_TE.masked_fill(closed_TE, UNAVAILABLE)


def groups_of(inputs: RouterInputs) -> tuple[int, int]:
    """Capacity groups, and tokens in each.

    Raises:
        ValueError: The tokens do not divide into groups.
    """
    num_tokens = inputs.valid_T.shape[0]
    size = inputs.group_size or num_tokens
    if num_tokens % max(size, 1):
        raise ValueError(f"{num_tokens} tokens do not divide into groups of {size}")
    return num_tokens // max(size, 1), size


def token_order(inputs: RouterInputs, options: RouterOptions, probs_TE: Tensor) -> Tensor | None:
    """Tokens in the order in which they ask for slots -> int64 ``[T]``; None = as they stand.

    Batch-prioritised: largest probability first, earlier tokens first among equals (V-MoE, arXiv:2106.05974).
    """
    if options.priority == "batch_prioritized":
        score_T = (probs_TE.double().amax(-1) * PRIORITY_STEPS).round().long()
        return score_T.argsort(descending=True, stable=True)
    if options.priority == "random" and inputs.training:
        shape = tuple(inputs.valid_T.shape)
        given_T = numbers_given(inputs, "order_T", shape, "priority: random")
        uniform_T = drawn_uniform(inputs, philox.PRIORITY, 1)[:, 0] if given_T is None else given_T
        return uniform_T.argsort(stable=True)
    return None


def as_routing(
    inputs: RouterInputs,
    options: RouterOptions,
    choices: Choices,
    *,
    logits_TE: Tensor | None = None,
    usable_T: Tensor | None = None,
    load_E: Tensor | None = None,
    importance_E: Tensor | None = None,
    threshold_E: Tensor | None = None,
) -> Routing:
    """Choices as a flat list in the order of ``options.slot_order`` and ``options.priority``.

    Args:
        logits_TE: What the decision was made on, if not ``inputs.logits_TE``.
        usable_T: Tokens that can be routed, where they need not have a choice; else those with a first one.
        load_E, importance_E, threshold_E: As in ``Routing``.
    """
    logits_TE = inputs.logits_TE if logits_TE is None else logits_TE
    active_TK = choices.active_TK
    num_tokens, width = active_TK.shape
    usable_T = active_TK[:, 0] if usable_T is None else usable_T
    logits_TE, nonfinite_tokens = without_unusable(logits_TE, inputs.valid_T, usable_T)
    token_T = torch.arange(num_tokens, device=active_TK.device)
    choice_TK = torch.arange(width, device=active_TK.device).expand(num_tokens, width)
    order_T = token_order(inputs, options, choices.probs_TE)

    def listed(values_TK: Tensor) -> Tensor:
        if order_T is not None:
            values_TK = values_TK.index_select(0, order_T)
        return (values_TK.t() if options.slot_order == "choice_major" else values_TK).reshape(-1)

    return Routing(
        token_A=listed(token_T.unsqueeze(1).expand(num_tokens, width)),
        expert_A=listed(choices.ids_TK),
        weight_A=listed(choices.weights_TK),
        active_A=listed(active_TK),
        choice_A=listed(choice_TK),
        probs_TE=choices.probs_TE,
        logits_TE=logits_TE,
        valid_T=usable_T,
        nonfinite_tokens=nonfinite_tokens,
        load_E=load_E,
        importance_E=importance_E,
        threshold_E=threshold_E,
    )
