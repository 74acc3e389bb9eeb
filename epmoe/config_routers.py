"""The options of every router family; a class here is what ``moe.router`` may hold. Nothing here imports torch.

``docs/routers.md`` has the families side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from epmoe.section import Count, Fraction, Meaning, Positive, Section

Policy = Literal["all", "random", "threshold", "sampling", "relative", "none"]


class SmoothingOptions(Section):
    """Averaging over noise, in training only: on the router's logits, on the layer's input, or on both."""

    gate: Literal["none", "uniform", "normal"] = "none"
    """Noise added to the logits: experts are chosen, and weighted, by the softmax of the noisy ones. ``uniform``:
    U[0, 1) (arXiv:2208.02813); ``normal``: N(0, gate_sigma). The router's weight then starts at zero."""
    gate_sigma: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of ``gate: normal``."""
    draws: Count = 0
    """The layer's output is the mean over so many copies of its input with noise, at so many times the cost; 0 = the
    input itself."""
    sigma: Annotated[float, Field(gt=0)] = 0.1
    """Standard deviation of that noise."""
    reroute: bool = False
    """False: every copy goes where the input itself would go. True: every copy is routed on its own."""

    meaning: ClassVar[Meaning] = {
        "gate_sigma": (lambda own: own.gate == "normal", "only normal noise has it", "set gate: normal"),
        "sigma": (lambda own: own.draws > 0, "the input gets no noise", "set draws above 0"),
        "reroute": (lambda own: own.draws > 0, "there are no noisy copies", "set draws above 0"),
    }


class RouterOptions(Section):
    """Options every router has, and what the rest of the configuration needs to know about a family."""

    slot_order: Literal["choice_major", "token_major"] = "choice_major"
    """Who gets an expert's slots first: all first choices (the GShard paper; a later token may take an earlier
    token's second slot) or token by token (causal)."""
    priority: Literal["position", "batch_prioritized", "random"] = "position"
    """Which tokens of a group come first in that order: earlier ones; those with the largest probability (V-MoE's
    batch-prioritised routing); in training a random permutation. Only the first is causal under capacity."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training the router's own input is multiplied by uniform noise in [1-jitter, 1+jitter)."""
    smoothing: SmoothingOptions | None = None
    """Noise on logits or inputs that is averaged over; null = none."""

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """Of the family."""

    families: ClassVar[list[type[RouterOptions]]] = []
    """Every class with a name, in the order of their definitions."""
    fixed_top_k: ClassVar[int | None] = None
    """Experts per token, where that is part of the family's definition."""
    every_expert: ClassVar[bool] = False
    """Whether every token goes to every expert, so that top_k is their number."""
    no_gate_noise: ClassVar[str | None] = None
    """Why ``smoothing.gate`` is not for this family; None if it is."""
    ignores_input: ClassVar[bool] = False
    """Whether the family decides without a look at the tokens' vectors."""
    balance_count: ClassVar[Literal["top1", "all"]] = "all"
    """Which choices the balance loss counts with ``moe.balance_count: auto``."""
    smooth_load: ClassVar[bool] = False
    """Whether the family estimates its load differentiably, which the loss ``load`` needs."""
    thresholds: ClassVar[bool] = False
    """Whether the family learns thresholds, which the loss ``batchwise_threshold`` trains."""
    default_losses: ClassVar[Mapping[str, float] | None] = None
    """``moe.losses`` where the configuration has none; None = as for every router."""
    no_losses: ClassVar[str | None] = None
    """Why no auxiliary loss can do anything to this router; None if one can."""
    no_capacity: ClassVar[str | None] = None
    """Why ``moe.capacity_factor`` does not apply to this router; None if it does."""
    decides_on_host: ClassVar[bool] = False
    """The decision is taken on the CPU, so that no compiler can make one graph of the layer."""
    without: ClassVar[tuple[str, ...]] = ()
    """Options of every router that mean nothing to this one, and are refused."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "name" in cls.model_fields:
            RouterOptions.families.append(cls)

    @model_validator(mode="before")
    @classmethod
    def _has_a_bias(cls, values: Any) -> Any:
        if isinstance(values, dict) and "bias_rate" in values and "bias_rate" not in cls.model_fields:
            owners = [
                family.model_fields["name"].default
                for family in RouterOptions.families
                if "bias_rate" in family.model_fields
            ]
            raise ValueError(
                f"bias_rate={values['bias_rate']} balances without a loss by moving the bias of every expert, and "
                f"router {cls.model_fields['name'].default} has no bias; routers that have one: "
                f"{', '.join(owners)}; for this one use moe.losses: {{balance: 0.01}}"
            )
        return values

    @model_validator(mode="after")
    def _has_such_a_choice(self) -> Self:
        fields = type(self).model_fields
        for name in self.without:
            value, default = getattr(self, name), fields[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value} does not apply to router {fields['name'].default}, which has no such choice; "
                    f"leave it out"
                )
        return self

    @model_validator(mode="after")
    def _noise_is_seen(self) -> Self:
        if self.no_gate_noise and self.smoothing is not None and self.smoothing.gate != "none":
            raise ValueError(
                f"smoothing.gate={self.smoothing.gate} adds noise to a token's logits, and {self.no_gate_noise}; "
                f"leave it out, or use it with router: topk"
            )
        if self.ignores_input and self.smoothing is not None and self.smoothing.reroute:
            raise ValueError(
                "smoothing.reroute=True has no effect here: this router does not look at its input, so every copy goes "
                "where the input goes; set it to false, or use it with router: topk"
            )
        return self

    @property
    def looks_ahead(self) -> str | None:
        """Why the choice or the slot of a token depends on later tokens, whatever ``slot_order``; None if it does
        not."""
        if self.priority == "position":
            return None
        return f"priority={self.priority} lets later tokens take the slots of earlier ones"

    @property
    def looks_ahead_when_full(self) -> str | None:
        """Why a token's experts depend on later tokens where slots are few; None if only its slots can."""
        return None

    @property
    def expert_groups(self) -> int:
        """Groups of consecutive experts the family knows, which device and communication balance add up over."""
        return 1

    @property
    def group_limit(self) -> int:
        """How many of these groups a token may reach."""
        return self.expert_groups

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Raises ValueError where the options do not go with these numbers."""

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """Learned numbers of one router."""
        return num_experts * d_model

    def for_vocabulary(self, vocab_size: int) -> Self:
        """The options with what they leave to the model's vocabulary filled in."""
        return self


class Top2Options(RouterOptions):
    """What ``gshard_top2`` and the routers of sentences and tasks choose their two experts by."""

    second_policy: Policy = "random"
    """The second expert in training. ``all``: the second best, always used. ``random``: used with probability
    min(1, a2/tau). ``threshold``: if a2 > tau. ``relative``: if its probability is at least ``ratio`` times the
    first's. ``sampling``: another expert than the first, drawn by the probabilities. ``none``: never used."""
    second_policy_eval: Literal["all", "threshold", "relative", "none"] = "all"
    """The same in evaluation and generation."""
    tau: Annotated[float, Field(gt=0)] = 0.5
    """Scale of the random policy (0.5 is the paper's) and limit of the threshold policy (below 0.5)."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Limit of the relative policy; 0.2 is ST-MoE's."""
    literal_alg1: bool = False
    """Read the paper's pseudo-code to the letter: a skipped second choice takes a slot (and travels with weight 0).
    To compare with the paper; it wastes capacity."""

    fixed_top_k: ClassVar[int | None] = 2
    balance_count: ClassVar[Literal["top1", "all"]] = "top1"
    meaning: ClassVar[Meaning] = {
        "tau": (
            lambda own: own.second_policy == "random" or "threshold" in own.policies,
            "only the policies random and threshold look at it",
            "set second_policy to one of them",
        ),
        "ratio": (
            lambda own: "relative" in own.policies,
            "only the policy relative looks at it",
            "set second_policy: relative",
        ),
        "literal_alg1": (
            lambda own: not {*own.policies} <= {"all", "sampling"},
            "no second choice is skipped",
            "set second_policy: random",
        ),
    }

    @property
    def policies(self) -> tuple[Policy, Policy]:
        """In training and in evaluation."""
        return self.second_policy, self.second_policy_eval

    @model_validator(mode="after")
    def _threshold_can_be_passed(self) -> Self:
        if "threshold" in self.policies and self.tau >= 0.5:
            raise ValueError(
                f"the threshold policy uses the second expert if a2 > tau, but a2, the smaller of two shares, is at "
                f"most 0.5: tau={self.tau:g} would never let it through; set tau below 0.5, or use policy none"
            )
        return self


class GShardTop2Options(Top2Options):
    """GShard's top-2 router, arXiv:2006.16668 Algorithm 1."""

    name: Literal["gshard_top2"] = "gshard_top2"


class SwitchOptions(RouterOptions):
    """Switch's top-1 router, arXiv:2101.03961: the gate is the raw probability."""

    name: Literal["switch"] = "switch"
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """The paper's jitter of the router input."""
    attempts: Positive = 1
    """No-token-left-behind (the paper's appendix B): how many experts, best first, a token tries until one has room.
    1 = only its best; the number of experts = all of them."""

    fixed_top_k: ClassVar[int | None] = 1
    balance_count: ClassVar[Literal["top1", "all"]] = "top1"

    @model_validator(mode="after")
    def _attempts_in_order(self) -> SwitchOptions:
        if self.attempts > 1 and self.slot_order != "choice_major":
            raise ValueError(
                f"attempts={self.attempts} hands out all first choices before any second one, which is "
                f"slot_order=choice_major, got {self.slot_order}; drop one of the two"
            )
        return self

    @property
    def looks_ahead_when_full(self) -> str | None:
        """Later tokens' first attempts come before earlier ones' second."""
        if self.attempts == 1:
            return None
        return (
            f"attempts={self.attempts} lets later tokens fill the expert that an earlier one tries next, so its expert "
            f"depends on them where slots are few"
        )

    def check(self, *, num_experts: int, top_k: int) -> None:
        """A token cannot try more experts than there are."""
        if self.attempts > num_experts:
            raise ValueError(
                f"attempts={self.attempts} is larger than num_experts={num_experts}; valid values: 1 to {num_experts}"
            )


class TopKOptions(RouterOptions):
    """Plain top-k routing."""

    name: Literal["topk"] = "topk"
    normalize: bool | None = None
    """True: weights are a softmax over the chosen logits (Mixtral), which is the same as all probabilities rescaled
    so that the chosen ones sum to 1. False: raw probabilities (OLMoE).
    null: normalised for k > 1, raw for k = 1, where a normalised weight would not train the router."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Multiplies every weight."""


class NoisyTopKOptions(RouterOptions):
    """Noisy top-k routing, arXiv:1701.06538 section 2.1, and V-MoE's variant, arXiv:2106.05974."""

    name: Literal["noisy_topk"] = "noisy_topk"
    load_estimator: Literal["paper", "vmoe"] = "paper"
    """``paper``: the noise has a learned scale, weights are a softmax over the chosen logits, and a token's load is
    judged against the others' noisy logits. ``vmoe``: scale 1/E, raw probabilities, one threshold for all experts,
    importance from the probabilities without noise."""
    noise_floor: Annotated[float, Field(ge=0)] = 0.0
    """Added to the learned scale: 0 in the paper, 0.01 in tensor2tensor."""
    normalize: bool | None = None
    """As for ``topk``; null: for ``paper`` normalised for k > 1, raw for k = 1; for ``vmoe`` raw."""

    meaning: ClassVar[Meaning] = {
        "noise_floor": (
            lambda own: own.load_estimator == "paper",
            "the scale of vmoe's noise is 1/E, not learned",
            "set load_estimator: paper",
        ),
    }
    default_losses: ClassVar[Mapping[str, float] | None] = {"importance": 0.1, "load": 0.1}
    smooth_load: ClassVar[bool] = True
    no_gate_noise: ClassVar[str | None] = "these already have the family's own"

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """``paper`` learns as many weights for the noise as for the logits."""
        return (2 if self.load_estimator == "paper" else 1) * num_experts * d_model


class HierarchicalOptions(RouterOptions):
    """Two levels of noisy top-k: groups of experts, then experts inside them (arXiv:1701.06538 appendix B)."""

    name: Literal["hierarchical"] = "hierarchical"
    num_groups: Positive = 2
    """Groups of consecutive experts, P."""
    groups_per_token: Positive = 1
    """Groups chosen per token; moe.top_k counts experts over all of them (the paper: 2 groups, 2 experts in each,
    top_k 4)."""
    noise_floor: Annotated[float, Field(ge=0)] = 0.0
    """Added to the learned scales of the noise."""

    default_losses: ClassVar[Mapping[str, float] | None] = {"importance": 0.1, "load": 0.1}
    smooth_load: ClassVar[bool] = True
    no_gate_noise: ClassVar[str | None] = "these already have the family's own"

    @property
    def expert_groups(self) -> int:
        """The groups of the first level."""
        return self.num_groups

    @property
    def group_limit(self) -> int:
        """Those chosen per token."""
        return self.groups_per_token

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Groups divide the experts, choices divide over the groups."""
        check_groups(self.num_groups, num_experts)
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} is larger than num_groups={self.num_groups}; "
                f"valid values: 1 to {self.num_groups}"
            )
        inside, rest = divmod(top_k, self.groups_per_token)
        size = num_experts // self.num_groups
        if rest or inside > size:
            valid = ", ".join(str(self.groups_per_token * n) for n in range(1, size + 1))
            raise ValueError(
                f"top_k={top_k} experts cannot be spread evenly over groups_per_token={self.groups_per_token} groups "
                f"of {size}; valid top_k: {valid}"
            )

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """Logits and noise of both levels."""
        return 2 * (num_experts + self.num_groups) * d_model


class DeepSeekOptions(RouterOptions):
    """DeepSeek's routers: V1 (arXiv:2401.06066), V2 (arXiv:2405.04434), V3 (arXiv:2412.19437)."""

    name: Literal["deepseek"] = "deepseek"
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """What a logit becomes: ``sigmoid`` in V3, ``softmax`` over all experts in V1 and V2."""
    num_groups: Positive = 1
    """Groups of consecutive experts: nodes in V3, devices in V2."""
    groups_kept: Positive | None = None
    """Groups that a token's experts come from; null = all."""
    group_score: Literal["top2", "max"] = "top2"
    """Which groups those are: by the sum of their two largest biased scores (V3), or by the largest (V2)."""
    normalize: bool | None = None
    """True: a token's weights are rescaled to sum to 1 (V3). False: raw scores (V1, V2). null: true for k > 1."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Multiplies every weight; 2.5 in V3, 16 in V2."""
    bias_rate: Annotated[float, Field(ge=0)] | None = 0.001
    """Balance without a loss (arXiv:2408.15664): how far each expert's bias moves after every optimizer step, up
    where the expert had less than its share, down where it had more. 0 = the bias stays as it is; null = no bias."""
    bias_steps: Positive | None = None
    """The bias moves in the first so many steps; null = in all."""

    default_losses: ClassVar[Mapping[str, float] | None] = {"sequence_balance": 0.0001}
    meaning: ClassVar[Meaning] = {
        "group_score": (
            lambda own: own.group_limit < own.num_groups,
            "no group is left out",
            "set num_groups, and groups_kept below it",
        ),
        "bias_steps": (lambda own: bool(own.bias_rate), "no bias moves", "set bias_rate above 0"),
    }

    @property
    def expert_groups(self) -> int:
        """Nodes or devices."""
        return self.num_groups

    @property
    def group_limit(self) -> int:
        """``groups_kept``."""
        return self.groups_kept or self.num_groups

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Groups divide the experts, and those kept have enough of them."""
        check_groups(self.num_groups, num_experts)
        if self.group_limit > self.num_groups:
            raise ValueError(
                f"groups_kept={self.groups_kept} is larger than num_groups={self.num_groups}; "
                f"valid values: 1 to {self.num_groups}, or null for all"
            )
        size = num_experts // self.num_groups
        if self.group_limit * size < top_k:
            raise ValueError(
                f"groups_kept={self.groups_kept} groups of {size} experts are fewer than top_k={top_k}; "
                f"keep at least {-(-top_k // size)}"
            )


Pooling = Literal["weighted_sum", "max_pick", "max_scaled"]


class ExpertChoiceOptions(RouterOptions):
    """Expert choice, arXiv:2202.09368: every expert takes its best tokens of a group, on average K per token."""

    name: Literal["expert_choice"] = "expert_choice"

    default_losses: ClassVar[Mapping[str, float] | None] = {}
    without: ClassVar[tuple[str, ...]] = ("slot_order", "priority")

    @property
    def looks_ahead(self) -> str | None:
        """An expert compares all tokens of the group."""
        return "experts choose among all tokens of a group, later ones among them"


class BaseOptions(RouterOptions):
    """BASE layers, arXiv:2103.16716: in training the balanced assignment with the largest sum of logits."""

    name: Literal["base"] = "base"

    fixed_top_k: ClassVar[int | None] = 1
    decides_on_host: ClassVar[bool] = True
    balance_count: ClassVar[Literal["top1", "all"]] = "top1"
    default_losses: ClassVar[Mapping[str, float] | None] = {}

    @property
    def looks_ahead(self) -> str | None:
        """A token's expert depends on who else wants it."""
        return "in training the tokens of a group are assigned together"


class SinkhornOptions(RouterOptions):
    """Sinkhorn routing (S-BASE, arXiv:2202.01169): in training the K best of a balanced transport plan."""

    name: Literal["sinkhorn"] = "sinkhorn"
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """A group's plan is done when its experts' factors change by less than this, on average, in an iteration."""
    iterations: Positive = 100
    """A group's plan is done after so many iterations at the latest."""

    default_losses: ClassVar[Mapping[str, float] | None] = {}

    @property
    def looks_ahead(self) -> str | None:
        """The plan is that of a whole group."""
        return "in training the plan is made for all tokens of a group"


class StrictlyBalancedOptions(RouterOptions):
    """Strictly balanced gating, arXiv:1701.06538 appendix F: in training every expert keeps equally many tokens."""

    name: Literal["strictly_balanced"] = "strictly_balanced"

    thresholds: ClassVar[bool] = True
    default_losses: ClassVar[Mapping[str, float] | None] = {"batchwise_threshold": 0.01}

    @property
    def looks_ahead(self) -> str | None:
        """An expert compares all tokens of the group."""
        return "in training experts keep the best among all tokens of a group"

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """A threshold for every expert."""
        return num_experts * d_model + num_experts


class HashOptions(RouterOptions):
    """Hash layers, arXiv:2106.04426: a fixed table says which expert a token id belongs to; nothing is learned."""

    name: Literal["hash"] = "hash"
    table: Literal["mod", "random", "balanced"] = "mod"
    """``mod``: id modulo E. ``random``: a permutation of the ids, drawn from the seed, modulo E. ``balanced``: ids by
    descending count, each to the expert with the smallest sum of counts so far."""
    counts: str | None = None
    """``balanced``: a text file, on line i how often id i occurs."""
    vocab_size: Positive | None = None
    """Entries of a table; null = the vocabulary of the model."""

    fixed_top_k: ClassVar[int | None] = 1
    default_losses: ClassVar[Mapping[str, float] | None] = {}
    no_losses: ClassVar[str | None] = "it has no weights that a loss could train"
    no_gate_noise: ClassVar[str | None] = "a table has none"
    ignores_input: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ("jitter",)
    meaning: ClassVar[Meaning] = {
        "vocab_size": (
            lambda own: own.table != "mod",
            "the table mod has no entries",
            "set table: random or balanced",
        ),
        "priority": (
            lambda own: own.priority == "random",
            "the probability of every token's expert is 1",
            "set priority: random",
        ),
    }

    @model_validator(mode="after")
    def _counts_belong_to_a_table(self) -> Self:
        if (self.table == "balanced") != (self.counts is not None):
            raise ValueError(
                f"table={self.table} and counts={self.counts} do not go together: the balanced table is made from the "
                f"counts, the others know none; set both or neither"
            )
        return self

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """None."""
        return 0

    def for_vocabulary(self, vocab_size: int) -> Self:
        """A table of the model's size."""
        return self if self.vocab_size else self.model_copy(update={"vocab_size": vocab_size})


class SentenceOptions(Top2Options):
    """All tokens of a document share their experts: ``gshard_top2`` of the mean of their logits (lingvo)."""

    name: Literal["sentence"] = "sentence"

    no_gate_noise: ClassVar[str | None] = "the mean over a document leaves little of it"

    @property
    def looks_ahead(self) -> str | None:
        """The mean is over the whole document."""
        return "a document's tokens share the mean of their logits, later ones included"


class TaskOptions(Top2Options):
    """All tokens of a task share their experts: ``gshard_top2`` of the task's own logits (arXiv:2110.03742)."""

    name: Literal["task"] = "task"
    num_tasks: Positive = 1
    """Tasks, numbered from 0. In training from a configuration these are ``data.sources``, in their order."""
    default_task: Count = 0
    """The task, in evaluation and generation, of tokens that are not said to belong to one."""

    no_gate_noise: ClassVar[str | None] = "these are the task's, which no token changes"
    without: ClassVar[tuple[str, ...]] = ("jitter",)
    ignores_input: ClassVar[bool] = True

    @model_validator(mode="after")
    def _default_is_a_task(self) -> Self:
        if self.default_task >= self.num_tasks:
            raise ValueError(f"default_task={self.default_task} must be below num_tasks={self.num_tasks}")
        return self

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """A logit per task and expert."""
        return self.num_tasks * num_experts


class DenseOptions(RouterOptions):
    """The dense mixture of Jacobs et al. 1991, and with groups that of Jordan and Jacobs 1994: every expert runs for
    every token."""

    name: Literal["dense"] = "dense"
    pooling: Pooling = "weighted_sum"
    """The output in training. ``weighted_sum``: all experts, each times its probability. ``max_scaled``: the most
    probable expert times its probability. ``max_pick``: that expert as it is, which gives the router no gradient from
    the task."""
    pooling_eval: Pooling | None = None
    """The same in evaluation, where experts of weight 0 do not run; null = as in training."""
    router_loss: bool = False
    """Your own training loop adds a loss that trains the router (``epmoe.moe.mixture``): competitive, mixture
    likelihood, EDD. ``max_pick`` in training needs one."""
    num_groups: Positive = 1
    """Two-level gate: groups of consecutive experts have a gate of their own, and an expert's probability is its
    group's times its own inside the group. 1 = one level."""

    every_expert: ClassVar[bool] = True

    @model_validator(mode="after")
    def _router_is_trained(self) -> DenseOptions:
        if self.pooling == "max_pick" and not self.router_loss:
            raise ValueError(
                "pooling=max_pick passes one expert on unscaled, so the task never trains the router; use max_scaled "
                "or weighted_sum, or pooling_eval: max_pick for evaluation alone, or set router_loss: true and add "
                "such a loss in your own training loop"
            )
        return self

    @property
    def expert_groups(self) -> int:
        """The groups of the first level."""
        return self.num_groups

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Groups divide the experts."""
        check_groups(self.num_groups, num_experts)

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """Logits of experts and, with several, of groups."""
        return (num_experts + (self.num_groups if self.num_groups > 1 else 0)) * d_model


class EddOptions(Section):
    """Expert diversification and dispatching, a loss of ``epmoe.moe.mixture``."""

    weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the whole loss, relative to the task's."""
    alpha: Fraction = 0.1
    """Share of diversification; the rest is dispatching."""
    similarity: Literal["cosine", "rbf"] = "cosine"
    """How alike two experts' outputs are: the squared cosine, or exp(-distance^2 / 2)."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """Dispatching wants softmax(-loss / temperature); null = the expert with the smallest loss alone."""

    meaning: ClassVar[Meaning] = {
        "similarity": (lambda own: own.alpha > 0, "alpha=0 leaves out diversification", "set alpha above 0"),
        "temperature": (lambda own: own.alpha < 1, "alpha=1 leaves out dispatching", "set alpha below 1"),
    }


def check_groups(num_groups: int, num_experts: int) -> None:
    """Raises ValueError where groups of experts would not be of equal size."""
    if num_experts % num_groups:
        valid = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise ValueError(
            f"num_groups={num_groups} must divide num_experts={num_experts}; valid values: {valid}"
        )


# -------------------------------------------------------------- experts choose, assignments, tables, units
class SoftOptions(RouterOptions):
    """Soft MoE, arXiv:2308.00951: experts get mixtures of a group's tokens, tokens mixtures of their results."""

    name: Literal["soft"] = "soft"
    slots: Positive = 1
    """Mixtures per expert and group, P: the paper's round(cf S / E) for S tokens in a group."""

    fixed_top_k: ClassVar[int | None] = 1
    default_losses: ClassVar[Mapping[str, float] | None] = {}
    no_losses: ClassVar[str | None] = "nothing is chosen, so that there is nothing to balance"
    no_capacity: ClassVar[str | None] = "every expert computes router.slots mixtures per group; set those"
    without: ClassVar[tuple[str, ...]] = ("slot_order", "priority", "jitter", "smoothing")

    @property
    def looks_ahead(self) -> str | None:
        """A mixture holds every token of the group."""
        return "experts see mixtures of all tokens of a group"

    def num_weights(self, *, d_model: int, num_experts: int) -> int:
        """A vector per slot, and the scale."""
        return num_experts * self.slots * d_model + 1
