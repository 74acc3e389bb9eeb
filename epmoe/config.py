"""Every knob of epmoe. A field is a YAML key; unknown keys are errors; nothing here imports torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from epmoe.config_routers import GShardTop2Options, RouterOptions, TaskOptions
from epmoe.section import Beta, Count, Fraction, PathText, Positive, Section, Seed


# ---------------------------------------------------------------------------------------------- data
class SourceConfig(Section):
    """One body of text."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] = "stdlib"
    """Name in metrics and file names: letters, digits, ``_``, ``-`` and ``.``."""
    path: PathText = "stdlib"
    """``stdlib`` (Python's own standard library sources), a folder of text files, a ``.jsonl`` file, or the
    prefix of a prepared ``.bin``/``.idx`` pair."""
    format: Literal["auto", "stdlib", "text", "jsonl", "indexed"] = "auto"
    """How to read ``path``; ``auto`` looks at it."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the training samples drawn from this source, relative to the other sources."""
    glob: PathText = "**/*"
    """Which files of a text folder."""
    text_field: str = "text"
    """JSONL: the key that holds the text."""
    loss_field: str | None = None
    """JSONL: key of a list of ``[start, end)`` character ranges that count in the loss; null = all of it."""
    val_path: PathText | None = None
    """Validation text (same format); null: files or documents whose sha256 is 0 modulo 20, or the last twentieth of a
    single text file."""


class DataConfig(Section):
    """What is trained on, and how it becomes samples."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (SourceConfig(),)
    tokenizer: PathText = "bpe"
    """``byte``, ``bpe`` (trained on the training text) or the path of a ``tokenizer.json``."""
    vocab_size: Positive = 4096
    """Entries of a trained ``bpe`` tokenizer."""
    eos_token: str | None = None
    """End-of-text token of a ``tokenizer.json``; null = found by its usual names."""
    vocab_multiple: Positive = 64
    """The model's vocabulary is the tokenizer's rounded up to a multiple of this."""
    seq_len: Annotated[int, Field(ge=2)] = 256
    """Tokens per sample, S. A sample is a window of S+1 tokens of the document stream."""
    cross_document: bool = True
    """False: attention does not look across document boundaries."""
    cache: PathText = ".cache/epmoe"
    """Where small corpora are prepared and kept."""
    num_workers: Count = 0
    """Processes that prepare text; 0 = one per core."""

    @model_validator(mode="after")
    def _unique_names(self) -> DataConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        return self


# --------------------------------------------------------------------------------------------- model
class ModelConfig(Section):
    """The decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases."""

    d_model: Positive = 256
    """Width, D."""
    num_layers: Positive = 4
    num_heads: Positive = 4
    """Query heads, H."""
    num_kv_heads: Positive | None = None
    """Key and value heads; null = num_heads."""
    head_dim: Positive | None = None
    """Width of a head; null = d_model / num_heads."""
    d_ff: Positive = 1024
    """Hidden width of dense feed-forward layers."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    qk_norm: bool = False
    """RMSNorm of queries and keys per head."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """``sdpa``: PyTorch's. ``flash``: flash-attn 3, 4 or 2, whichever suits the GPU; a run that cannot have it does
    not start. ``auto``: flash-attn where it is installed and works, else sdpa; one line says which and why."""
    norm: Literal["torch", "apex"] = "torch"
    """Who computes RMSNorm. ``apex``: NVIDIA apex on a GPU; a run that cannot have it does not start."""
    tie_embeddings: bool = True
    """Output head shares the embedding matrix."""
    init: Literal["normal", "truncated_fan_in", "kaiming"] = "normal"
    """``normal``: N(0, init_std), residual outputs divided by sqrt(2 num_layers). ``truncated_fan_in``: Switch's
    truncated normal with variance 0.1/fan_in. ``kaiming``: N(0, 2/fan_in)."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the embedding and of every residual branch, keyed by sample and position, not by rank."""

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"d_model={self.d_model} is not divisible by num_heads={self.num_heads}")
        if self.head_size % 2:
            raise ValueError(f"RoPE needs an even head_dim, got {self.head_size}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.kv_heads}")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads


# ----------------------------------------------------------------------------------------------- MoE
AUX_LOSSES = (
    "balance",
    "z",
    "importance",
    "load",
    "sequence_balance",
    "device_balance",
    "communication_balance",
    "batchwise_threshold",
)
GROUP_LOSSES = ("device_balance", "communication_balance")
TASK_LOSSES = ("cooperative", "competitive", "mixture_nll", "edd")


def _known_loss(name: str) -> str:
    if name in TASK_LOSSES:
        raise ValueError(
            f"{name} is made from the target and every expert's own prediction of it; in a decoder what an expert says "
            f"is a hidden vector for the layers above, which has no target, so no configuration can have it; for "
            f"experts that predict call it in your own training loop (epmoe.moe.mixture), all experts on one rank "
            f"(ep_size=1). Here: {', '.join(AUX_LOSSES)}"
        )
    if name not in AUX_LOSSES:
        raise ValueError(f"unknown auxiliary loss; choices: {', '.join(AUX_LOSSES)}")
    return name


class Ramp(Section):
    """A coefficient that changes in a straight line and then stays: ``{start: 0.1, end: 0.01, steps: 1000}``."""

    start: float
    """Its value in the first optimizer step."""
    end: float
    """Its value after ``steps`` optimizer steps and from then on."""
    steps: Positive
    """How many optimizer steps the change takes."""

    def at(self, step: int) -> float:
        """Its value in optimizer step ``step``; the first is 0."""
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


if TYPE_CHECKING:
    AnyRouterOptions = RouterOptions
else:
    AnyRouterOptions = Annotated[reduce(or_, RouterOptions.families), Field(discriminator="name")]
"""Whatever ``moe.router`` may hold: every family of ``config_routers``, which is complete here."""


class MoEConfig(Section):
    """Which layers are mixtures of experts, and how they route."""

    every: Positive = 2
    """Layer i is an MoE layer when (i + 1) % every == 0."""
    first_dense: Count = 0
    """This many first layers stay dense whatever ``every`` says."""
    num_experts: Positive = 8
    """Experts over all ranks, E."""
    top_k: Positive = 2
    """Experts per token, K. Set by the router where its definition fixes it."""
    router: AnyRouterOptions = GShardTop2Options()
    """Router name, or a mapping with its name and options."""
    d_ff: Positive | None = None
    """Hidden width of an expert, F; null = model.d_ff."""
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the hidden units of routed experts (Switch Transformer's expert dropout), keyed by sample, position
    and expert, not by rank. Every row then travels with eight more columns that say whose it is."""
    shared_experts: Count = 0
    """Experts every token passes through, with weight 1 (together one FFN of shared_experts * F hidden units)."""
    group: Literal["sequence", "rank"] = "sequence"
    """Tokens that share a capacity: one sequence (no layout changes what is dropped), or a rank's micro-batch."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = 1.25
    """Slots per expert relative to an even spread, in training; null = dropless."""
    capacity_factor_eval: Annotated[float, Field(gt=0)] | None = None
    """The same in evaluation and generation."""
    capacity_unit: Literal["per_assignment", "per_token"] = "per_assignment"
    """What a factor of 1 means: K*S/E slots (DeepSpeed, Megatron, V-MoE) or S/E slots (GShard, Switch, ST-MoE)."""
    min_capacity: Count = 4
    capacity_multiple: Positive = 1
    dispatcher: Literal["auto", "local", "all_to_all", "padded"] = "auto"
    """How rows reach their experts: reordered on a rank that holds all of them; exactly the kept rows between ranks;
    or blocks of the full capacity, whose static shapes need no word from the device (one rank or several; dropless
    passes are ragged). ``auto``: padded on CUDA with a capacity factor, else local or all_to_all."""
    save: Literal["output", "hidden"] = "output"
    """What a layer keeps of the experts' work for the backward pass besides the rows and their pre-activation: their
    results, or (``hidden``) nothing, because the combine weights are applied inside the experts. One row less for
    every row that the experts get; with experts on several ranks one more small exchange in each pass, of a weight for
    every row. Experts that are modules of yours keep what they keep, and their results."""
    losses: dict[Annotated[str, AfterValidator(_known_loss)], float | Ramp] = Field(
        default={"balance": 0.01, "z": 0.001}
    )
    """Auxiliary losses and their coefficients: numbers, or ``{start, end, steps}`` for one that changes during
    training. With 0 a loss is measured and not trained on; ``{}`` is no loss at all. In a file and on the command line
    a loss that is not named keeps its default, which for some routers is a loss of their own or none."""
    balance_count: Literal["auto", "top1", "all"] = "auto"
    """Which choices the balance loss counts; auto = top1 for gshard_top2, switch, base, sentence and
    task, all for the others. A router that sends every token to one expert has only first choices to count."""
    balance_scope: Literal["group", "sequence", "micro_batch", "global"] = "group"
    """Over which tokens the balance loss wants balance: those that share a capacity (``group``), a sequence, a
    rank's micro-batch, or the tokens of all ranks. ``global`` adds one all-reduce of counts per layer and
    micro-batch; with accumulation it knows the micro-batches so far."""
    allow_non_causal: bool = False
    """Allow a decoder a router whose choices or slots depend on later tokens; its loss may then be better than the
    text it can write."""

    @model_validator(mode="before")
    @classmethod
    def _router_by_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        router = values.get("router", "gshard_top2")
        if isinstance(router, str):
            values["router"] = router = {"name": router}
        if isinstance(router, dict):
            values["router"] = router = {"name": "gshard_top2", **router}
        family = router_classes().get(str(router.get("name"))) if isinstance(router, dict) else None
        if family is not None or isinstance(router, RouterOptions):
            _fill_in(values, family or type(router))
        return values

    @model_validator(mode="after")
    def _consistent(self) -> MoEConfig:
        router = self.router
        if router.fixed_top_k not in (None, self.top_k):
            raise ValueError(
                f"router {router.name} sends every token to {router.fixed_top_k} expert(s), got top_k={self.top_k}; "
                f"leave top_k out, or use router: topk"
            )
        if router.every_expert and self.top_k != self.num_experts:
            raise ValueError(
                f"router {router.name} sends every token to all {self.num_experts} experts, got top_k={self.top_k}; "
                f"leave top_k out, or use router: topk"
            )
        if self.top_k > self.num_experts:
            valid = f"valid values of top_k: 1 to {self.num_experts}"
            if router.fixed_top_k is not None:
                valid = f"router {router.name} needs num_experts of at least {self.top_k}"
            raise ValueError(f"top_k={self.top_k} is larger than num_experts={self.num_experts}; {valid}")
        router.check(num_experts=self.num_experts, top_k=self.top_k)
        if "load" in self.losses and not router.smooth_load:
            raise ValueError(
                f"losses=load needs a router that estimates its load smoothly, {router.name} only counts; "
                f"routers that do: {_names(lambda options: options.smooth_load)}; for this one use balance"
            )
        self._check_losses_and_capacity()
        if self.expert_dropout and router.no_capacity:
            raise ValueError(
                f"expert_dropout={self.expert_dropout} is keyed by the token of each row, and router {router.name} "
                f"gives its experts mixtures of tokens; set it to 0, or use model.dropout"
            )
        by_group = [name for name in GROUP_LOSSES if name in self.losses]
        if by_group and router.expert_groups == 1:
            raise ValueError(
                f"losses={by_group[0]} balances groups of experts, and router {router.name} has one group; "
                f"set num_groups of a router that has it: {_names(lambda o: 'num_groups' in o.model_fields)}"
            )
        return self

    def _check_losses_and_capacity(self) -> None:
        router = self.router
        if self.losses and router.no_losses:
            raise ValueError(
                f"losses={', '.join(self.losses)} can do nothing with router {router.name}: {router.no_losses}; "
                f"set losses: {{}}"
            )
        if "batchwise_threshold" in self.losses and not router.thresholds:
            raise ValueError(
                f"losses=batchwise_threshold trains thresholds, and router {router.name} has none; "
                f"routers that do: {_names(lambda options: options.thresholds)}; for this one use balance"
            )
        if router.no_capacity and (self.capacity_factor or self.capacity_factor_eval):
            raise ValueError(
                f"capacity_factor does not apply to router {router.name}: {router.no_capacity}; "
                f"set capacity_factor and capacity_factor_eval to null"
            )
        if router.no_capacity and self.dispatcher not in ("auto", "padded"):
            raise ValueError(
                f"dispatcher={self.dispatcher} sends lists of tokens, and router {router.name} has none; "
                f"its slots travel in equal blocks: dispatcher auto or padded"
            )


def loss_coefficients(moe: MoEConfig | None, step: int) -> dict[str, float]:
    """The coefficient of every auxiliary loss in optimizer step ``step``; the first is 0."""
    losses = moe.losses if moe else {}
    return {name: value.at(step) if isinstance(value, Ramp) else value for name, value in losses.items()}


def default_losses(moe: MoEConfig) -> dict[str, float | Ramp]:
    """The auxiliary losses of a section that names none."""
    own = moe.router.default_losses
    return dict(MoEConfig.model_fields["losses"].default if own is None else own)


def router_classes() -> dict[str, type[RouterOptions]]:
    """The options class of every router family, by its name."""
    return {family.model_fields["name"].default: family for family in RouterOptions.families}


def _fill_in(values: dict[str, Any], family: type[RouterOptions]) -> None:
    """What a router's definition says about the rest of the section, where the section does not."""
    if family.fixed_top_k is not None:
        values.setdefault("top_k", family.fixed_top_k)
    if family.every_expert:
        values.setdefault("top_k", values.get("num_experts", MoEConfig.model_fields["num_experts"].default))
    if family.default_losses is not None:
        values.setdefault("losses", dict(family.default_losses))
    if family.no_capacity:
        values.setdefault("capacity_factor", None)


def _names(wanted: Callable[[type[RouterOptions]], bool]) -> str:
    return ", ".join(name for name, cls in router_classes().items() if wanted(cls))


def causality_problem(moe: MoEConfig | None) -> tuple[str, str] | None:
    """Why a decoder must not have this MoE section, and what it may have instead; None if it may.

    Slots in ``choice_major`` order are not in question here: they look at later tokens only where capacity drops
    something, and evaluation is dropless unless it is told otherwise.
    """
    if moe is None or moe.allow_non_causal:
        return None
    reason, router = moe.router.looks_ahead, moe.router
    fix = f"use priority: position and one of {_names(lambda options: options().looks_ahead is None)}"
    if reason is None and (moe.capacity_factor or moe.capacity_factor_eval):
        reason = router.looks_ahead_when_full
        fix = f"set capacity_factor and capacity_factor_eval to null, use {router.name} without it"
    if reason is None:
        return None
    return (
        f"router {router.name} is not causal and a decoder predicts the next token: {reason}",
        f"{fix}, or set moe.allow_non_causal: true",
    )


# ------------------------------------------------------------------------------------------ training
class ParallelConfig(Section):
    """How ranks share the work."""

    engine: Literal["native", "fsdp", "deepspeed"] = "native"
    """Who holds weights, gradients and optimizer state. ``native``: the dense ones every rank, experts their owner.
    ``fsdp``: everything in shards (PyTorch's FSDP2), weights gathered block by block while they are used.
    ``deepspeed``: DeepSpeed's ZeRO 0, 1 or 2, with epmoe's layers; ``pip install 'epmoe[deepspeed]'``."""
    fsdp_shard: Literal["full", "hybrid"] = "full"
    """Over which ranks ``fsdp`` cuts dense tensors: all of them, or (``hybrid``) the ranks that share the experts, with
    a copy in each such group. Experts are cut over the ranks that hold the same ones, either way."""
    zero_stage: Literal[0, 1, 2] = 1
    """What ``deepspeed`` cuts into partitions: nothing, optimizer state, or (2) reduced gradients too."""
    ep_size: Positive | Literal["auto"] = "auto"
    """Ranks over which the experts are spread; auto = the largest common divisor of world size and experts."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """A collective that takes longer than this ends the job."""
    exchange: Literal["flat", "hierarchical"] = "flat"
    """How rows travel between the ranks that share the experts: from each to each; or first inside a node, then between
    nodes, with one message for each other node instead of one for each of its ranks. The same bits."""
    ranks_per_node: Positive | Literal["auto"] = "auto"
    """For ``hierarchical``; auto = what the launcher says."""
    wire_dtype: Literal["bf16", "fp16"] | None = None
    """Dtype of rows while they travel, in both directions and passes; null = that of the layer."""
    overlap_chunks: Positive = 1
    """Rows travel in this many parts, each for some of every rank's experts: one is computed while others are on the
    way, forward and backward. At most the experts on a rank."""
    overlap_shared: bool = False
    """Shared experts are computed while rows travel."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _no_stage_3(cls, value: object) -> object:
        if value == 3:
            raise ValueError(
                "DeepSpeed gathers the weights of its own layers only, and refuses a model with other experts at "
                "stage 3; use zero_stage 0, 1 or 2, or engine: fsdp, which cuts weights too"
            )
        return value

    @model_validator(mode="after")
    def _stages_need_deepspeed(self) -> ParallelConfig:
        if self.zero_stage != 1 and self.engine != "deepspeed":
            raise ValueError(
                f"zero_stage={self.zero_stage} applies only to engine: deepspeed, and this is {self.engine}; "
                f"set engine: deepspeed, or leave zero_stage out"
            )
        return self

    @model_validator(mode="after")
    def _shards_need_fsdp(self) -> ParallelConfig:
        if self.fsdp_shard != "full" and self.engine != "fsdp":
            raise ValueError(
                f"fsdp_shard={self.fsdp_shard} applies only to engine: fsdp, and this is {self.engine}, which cuts no "
                f"dense tensor; set engine: fsdp, or leave fsdp_shard out"
            )
        return self


class OptimizerConfig(Section):
    """AdamW (fused) or SGD, learning-rate schedule, clipping."""

    name: Literal["adamw", "sgd", "apex_fused_adam"] = "adamw"
    """``apex_fused_adam``: AdamW by NVIDIA apex on a GPU, with the same state, so a run may change between the two;
    a run that cannot have it does not start."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to matrices (experts one by one are matrices), not to norms and embeddings."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null = no clipping."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay; warm-up, stable, linear decay; constant."""
    schedule_steps: Positive | None = None
    """Steps after which the schedule is at its end, and stays there; null = train.steps. Set it where a run may be made
    longer later."""
    warmup_steps: Count = 100
    decay_fraction: Fraction = 0.2
    """With wsd: share of the steps in the final decay."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the end, relative to the peak."""


class SampleConfig(Section):
    """The text generated at the end of training."""

    prompt: str = "def "
    tokens: Count = 120
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


ParameterGroup = Literal[
    "embedding", "head", "attention", "norms", "dense_ffn", "router", "experts", "shared_experts"
]


class TrainConfig(Section):
    """The training run."""

    steps: Annotated[int, Field(gt=0, le=10**9 - 1)] = 1000
    global_batch_size: Positive = 16
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: Positive | None = None
    """Sequences per rank and forward pass; null = global_batch_size / ranks (no accumulation)."""
    precision: Literal["fp32", "bf16_autocast", "bf16_params", "fp16_autocast", "fp64"] = "fp32"
    """Of weights and arithmetic. fp64 is for proofs, not for speed; fp16_autocast multiplies the loss by a factor that
    follows the gradients."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What a block does not keep for its backward pass: nothing is left out; what is cheap to make again; all but its
    input and what its router decided. The gradients are the same."""
    compile: bool = False
    """Compile the blocks for training with torch.compile, which takes its time in the first step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop cleanly, with checkpoint and final evaluation, after this long; the schedule still counts ``steps``."""
    eval_every: Count = 0
    """Steps between evaluations; 0 = only at the end."""
    eval_samples: Positive | None = None
    """Windows per source in an evaluation during training; null = all."""
    eval_batch_size: Positive | None = None
    """Windows per rank and forward pass of an evaluation; null = as many as in training. Results are the same."""
    final_eval_samples: Positive | None = None
    """Windows per source in the final evaluation; null = all, which bits per byte need."""
    log_every: Positive = 10
    nonfinite: Literal["skip", "stop"] = "skip"
    """What all ranks do together when a loss or gradient is not finite."""
    max_nonfinite: Positive = 5
    """With ``skip``: stop after this many such steps in a row."""
    init_from: PathText | None = None
    """Checkpoint or run folder whose weights (not optimizer, not step) the run starts from."""
    init_without: tuple[ParameterGroup, ...] = ()
    """Groups of parameters that ``init_from`` leaves as they are drawn: ``[router]`` for a new router, of the same
    family or another, over trained experts. The checkpoint need not have them."""
    freeze: tuple[ParameterGroup, ...] = ()
    """Groups of parameters that are not trained and cost no optimizer state: ``[router]``, ``[router, experts]``. A
    frozen router's buffers stay as they are too. Norms of queries and keys belong to ``norms``."""
    sample: SampleConfig = SampleConfig()


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: Count = 500
    """Steps between checkpoints; 0 = only at the end and when asked to stop."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    allow_data_change: bool = False
    """Resume although data, seed or sequence length, and so the samples, are not those of the checkpoint."""


BPE_ENTRIES_BELOW = 257
"""Entries of a byte-level BPE that has learnt nothing: the bytes and end-of-text."""


class ProfileConfig(Section):
    """Traces of torch.profiler."""

    steps: str | None = None
    """``10-13``: write a Chrome trace of these steps."""


class Config(Section):
    """A run of ``epmoe train``."""

    out: PathText = "runs/default"
    """Folder of the run: checkpoints, metrics, report. The same command in the same folder resumes."""
    seed: Seed = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    moe: MoEConfig | None = MoEConfig()
    """The mixture-of-experts layers; null = a dense model."""
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _a_task_for_every_source(self) -> Config:
        router, sources = self.moe.router if self.moe else None, self.data.sources
        if isinstance(router, TaskOptions) and router.num_tasks < len(sources):
            raise ValueError(
                f"moe.router.num_tasks={router.num_tasks} is less than the {len(sources)} data.sources, each of which "
                f"is a task; set num_tasks to at least {len(sources)}"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_can(self) -> Config:
        if self.parallel.engine != "deepspeed":
            return self
        precision, stage = self.train.precision, self.parallel.zero_stage
        if precision not in ("fp32", "bf16_autocast", "bf16_params"):
            raise ValueError(
                f"engine: deepspeed knows no train.precision={precision}: its optimizer keeps weights, gradients and "
                f"moments in float32, and no loss scale is shared with it; use fp32, bf16_autocast or bf16_params, or "
                f"engine: native"
            )
        if precision == "bf16_params" and stage == 0:
            raise ValueError(
                "engine: deepspeed at zero_stage=0 has no float32 copy of bfloat16 parameters and would add gradients "
                "up in bfloat16; use zero_stage 1 or 2, train.precision fp32 or bf16_autocast, or engine: native"
            )
        if self.optimizer.name == "apex_fused_adam":
            raise ValueError(
                "engine: deepspeed does not drive optimizer.name=apex_fused_adam; use adamw or sgd, or engine: native"
            )
        return self

    @model_validator(mode="after")
    def _task_trains_the_router(self) -> Config:
        moe = self.moe
        if moe is not None and moe.top_k == 1 and getattr(moe.router, "normalize", None):
            raise ValueError(
                f"moe.top_k=1 with router {moe.router.name} and normalize=true gives every token's only expert the "
                f"weight 1, so the task never trains the router; leave normalize out, or set it to false"
            )
        return self

    @model_validator(mode="after")
    def _losses_are_added(self) -> Config:
        if self.moe is not None and getattr(self.moe.router, "router_loss", False):
            raise ValueError(
                "moe.router.router_loss says that a training loop of your own trains the router, and epmoe train has "
                "none; leave it out, or use epmoe.moe.mixture in Python"
            )
        return self


def profiled_steps(text: str) -> tuple[int, int] | None:
    """``10-13`` -> (10, 13); None when it is not a range of steps, which count from 1."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    return (first, last) if 1 <= first <= last else None


def choose_ep_size(ep_size: int | Literal["auto"], world_size: int, num_experts: int) -> int:
    """Ranks over which the experts are spread; ``auto`` = the largest common divisor of both numbers.

    Raises:
        ValueError: ``ep_size`` does not divide both; the message lists the values that do.
    """
    largest = math.gcd(world_size, num_experts)
    if ep_size == "auto":
        return largest
    if largest % ep_size:
        valid = ", ".join(str(n) for n in range(1, largest + 1) if largest % n == 0)
        raise ValueError(
            f"ep_size={ep_size} must divide the world size {world_size} and num_experts={num_experts}; "
            f"valid values: {valid}"
        )
    return ep_size


def choose_node_size(ranks_per_node: int, world_size: int, ep_size: int) -> int:
    """Ranks of an ep group that share a node: all of them, or as many as a node has.

    Raises:
        ValueError: Nodes of different sizes, or ep groups that hold parts of nodes; the message lists what is valid.
    """
    if ranks_per_node >= world_size:
        return ep_size
    if world_size % ranks_per_node:
        valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"ranks_per_node={ranks_per_node} must divide the world size {world_size}; valid values: {valid}"
        )
    if ranks_per_node % ep_size == 0:
        return ep_size
    if ep_size % ranks_per_node == 0:
        return ranks_per_node
    sizes = (n for n in range(1, world_size + 1) if world_size % n == 0)
    valid = ", ".join(str(n) for n in sizes if n % ranks_per_node == 0 or ranks_per_node % n == 0)
    raise ValueError(
        f"ep_size={ep_size} and ranks_per_node={ranks_per_node}: the ranks that share the experts hold parts of nodes, "
        f"and a hierarchical exchange needs whole ones; valid values of ep_size: {valid}"
    )
