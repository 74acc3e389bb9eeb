"""The legend of letters, and the values that travel between the parts of an MoE layer.

Letters (a tensor's suffix names its logical dimensions, in order):

    T  tokens on this rank in this micro-batch      E  experts over all ranks
    B  sequences in it        S  their length       L  experts on this rank
    G  token groups                                 K  experts per token (top_k)
    D  model width                                  A  assignments: (token, expert) pairs
    F  hidden width of an expert                    N  kept assignments, N <= A
    C  capacity per expert and group                R  rows received by this rank
    P  groups of experts                            M  micro-batches of an optimizer step
    W  ranks that share the experts (ep_size)       H  heads      V  vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def register_pytree(cls: type) -> type:
    """Makes a frozen dataclass a pytree, so that compile, checkpointing and tree_map see its tensors."""
    pytree.register_dataclass(cls)
    return cls


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenContext:
    """What is known about the tokens of a micro-batch besides their vectors. Every field is optional.

    Made once per micro-batch by the loader and handed unchanged to every block.
    """

    valid_BS: Tensor | None = None
    """bool; False = padding: never routed, no slot, in no count or mean. None = all valid."""
    sample_B: Tensor | None = None
    """int64 sample number of each sequence, the key of every random draw. None = no draws possible."""
    token_BS: Tensor | None = None
    """int64 token ids."""
    segment_BS: Tensor | None = None
    """int64 document number inside the window."""
    task_B: Tensor | None = None
    """int64 task of each sequence; from the loader, the number of its source."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many tokens share what each expert takes."""

    num_experts: int
    """Experts over all ranks, E."""
    group_size: int
    """Tokens per capacity group; consecutive tokens form a group."""
    capacity: int
    """Slots per expert and group, C; -1 = no limit."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Counters of the stateless random numbers of a layer's tokens (``epmoe.ops.philox``)."""

    seed: int
    layer: int
    sample_T: Tensor
    """int64 sample number of each token's sequence."""
    position_T: Tensor
    """int64 position of each token in its sequence."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class RouterInputs:
    """What a router function decides from."""

    logits_TE: Tensor
    """In the compute dtype (at least float32); NaN for a token whose vector is not finite."""
    valid_T: Tensor
    """bool; False = padding."""
    training: bool = True
    """Chooses between a policy's training and evaluation setting."""
    draws: Draws | None = None
    """Counters from which random policies draw,"""
    uniform_T: Tensor | None = None
    """or their numbers themselves (tests, replayed examples), never both: in [0, 1), for the random second expert;"""
    uniform_TE: Tensor | None = None
    """in [0, 1), for the sampled second expert;"""
    order_T: Tensor | None = None
    """in [0, 1), for ``priority: random``: who draws less comes first;"""
    normal_TE: Tensor | None = None
    """standard normal, for the noise of the logits;"""
    group_normal_TP: Tensor | None = None
    """and for that of the group logits."""
    group_size: int = 0
    """Tokens per capacity group; consecutive tokens form a group. 0 = all of them."""
    capacity: int = -1
    """Slots per expert and group; -1 = no limit."""
    seq_len: int = 0
    """Tokens per sequence; consecutive tokens form a sequence. 0 = all of them."""
    token_T: Tensor | None = None
    """int64 token ids."""
    segment_T: Tensor | None = None
    """int64 document of each token, different in different sequences."""
    task_T: Tensor | None = None
    """int64 task of each token."""
    noise_logits_TE: Tensor | None = None
    """Scale of the noise before softplus."""
    bias_E: Tensor | None = None
    """Added to scores for the selection, not for the weights."""
    threshold_E: Tensor | None = None
    """Learned limits of each expert's score."""
    group_logits_TP: Tensor | None = None
    """Logits of groups of experts."""
    group_noise_logits_TP: Tensor | None = None
    """Scale of their noise before softplus."""
    table_V: Tensor | None = None
    """int64 expert of every token id."""
    task_logits_X: Tensor | None = None
    """Logits of every task and expert, task by task."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A router's decision: a flat list of assignments in priority order.

    Earlier entries get slots first. Token choice has ``A = T*K`` entries, expert choice ``E*C`` per group.
    An inactive entry (padding, skipped second expert, fewer than K available experts) carries a valid expert id, weight
    0 and ``active = False``.
    """

    token_A: Tensor
    """int64 in [0, T)."""
    expert_A: Tensor
    """int64 in [0, E)."""
    weight_A: Tensor
    """Combine weight, differentiable, compute dtype; 0 where inactive."""
    active_A: Tensor
    """bool."""
    choice_A: Tensor
    """int64 from 0: 0 = the token's first choice, or the best of the experts that chose it."""
    probs_TE: Tensor
    """What the router thinks of every expert, summing to 1, differentiable (softmax of the logits in most families);
    zero rows for invalid tokens."""
    logits_TE: Tensor
    """The logits the decision was made on, differentiable; zero rows for invalid tokens."""
    valid_T: Tensor
    """bool: real tokens whose logits are usable."""
    nonfinite_tokens: Tensor
    """int64 scalar: real tokens treated as padding because their vector is not finite or a logit is NaN or +inf."""
    load_E: Tensor | None = None
    """Differentiable estimate of how many tokens choose each expert; None = the family only counts."""
    importance_E: Tensor | None = None
    """Differentiable sum over tokens of each expert's gate, where that is not the sum of its weights."""
    threshold_E: Tensor | None = None
    """Learned limits of each expert's probability, for the loss ``batchwise_threshold``."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """How the rows for some of every rank's experts travel; where nothing overlaps, for all of them."""

    splits: tuple[tuple[int, ...], ...]
    """Rows in each of the W blocks of an exchange (``epmoe.comm.exchange``): as they leave this rank, after each of its
    steps, and so as they arrive here."""
    tokens_per_expert_L: Tensor
    """int64: rows that arrive for each of these experts."""
    rows_per_expert: int | None = None
    """Padded: all experts have this many. None: they differ."""
    expert_order_R: Tensor | None = None
    """int64: received rows (rank-major) in expert-major order; None where the blocks are equal."""
    rank_order_R: Tensor | None = None
    """int64: the inverse."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """Where every kept assignment travels: integers only, a value, never changed after it is made."""

    slot_A: Tensor
    """int64 slot inside (group, expert), -1 = dropped or inactive."""
    demand_GE: Tensor
    """int64 active assignments before capacity."""
    assignment_N: Tensor
    """int64: the kept entries of the routing list, ascending by part, by expert, by group, by slot; padded: one entry
    for every slot, -1 where it is unfilled."""
    token_N: Tensor
    """int64: the token of each of these entries, -1 where there is none."""
    tokens_per_expert_E: Tensor
    """int64: kept entries of each expert, of this rank's tokens."""
    parts: tuple[PartPlan, ...] = ()
    """What travels, one part after the other; each takes the next rows of the list above. On one rank a single part."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBatch:
    """All that experts see: contiguous rows, ascending local expert, and how many belong to each."""

    rows_RD: Tensor
    tokens_per_expert_L: Tensor
    """int64; they add up to R unless ``rows_per_expert`` is given."""
    rows_per_expert: int | None = None
    """Padded: all experts have this many rows, R / L, zeros among them. None: the counts say it."""
    weight_R: Tensor | None = None
    """Combine weight of each row, differentiable, when the experts are to apply it; None: the dispatcher does."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSums:
    """What a layer's router did, summed over tokens; detached. Drop rate, entropy and load are computed from it."""

    demand_E: Tensor
    """int64 active assignments before capacity."""
    kept_E: Tensor
    """int64 assignments after it."""
    assignments: Tensor
    """int64: the former in all."""
    overflow_tokens: Tensor
    """int64: valid tokens without any kept choice."""
    valid_tokens: Tensor
    """int64: tokens that were routed."""
    nonfinite_tokens: Tensor
    """int64: real tokens treated as padding because their vector or their logits are not finite."""
    entropy: Tensor
    """The router's entropies in nats."""
    counted_E: Tensor | None = None
    """int64: what the balance loss counts, with ``balance_scope: global``."""


@register_pytree
@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """What a layer tells the trainer. All values are sums over this rank's tokens, so that ranks, micro-batches
    and steps add up without weights."""

    losses: dict[str, Tensor]
    """Differentiable sums over valid tokens, without coefficients. The trainer divides by the number of
    valid tokens of the step."""
    metrics: LayerSums | None
    """What the router did; None in a pass that is computed again."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of routers, softmax, losses, weights and accumulation: at least float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
