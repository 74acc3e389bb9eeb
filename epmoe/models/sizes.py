"""Parameters and arithmetic of a model, counted from its configuration without building it (and without torch)."""

from __future__ import annotations

from dataclasses import dataclass

from epmoe.config import ModelConfig, MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int
    """Those one token meets: ``dense`` plus top_k of the num_experts routed experts of every MoE layer."""
    expert: int
    """Routed experts, over all ranks."""
    dense: int
    """All others: embedding, head, norms, attention, dense feed-forward layers, routers, shared experts."""


def is_moe_layer(moe: MoEConfig, layer: int) -> bool:
    """Whether block ``layer`` (from 0) is a mixture of experts."""
    return layer >= moe.first_dense and (layer + 1) % moe.every == 0


def expert_width(model: ModelConfig, moe: MoEConfig) -> int:
    """Hidden width of one expert, F."""
    return moe.d_ff or model.d_ff


def num_moe_layers(model: ModelConfig, moe: MoEConfig | None) -> int:
    """How many blocks are mixtures of experts."""
    if moe is None:
        return 0
    return sum(is_moe_layer(moe, layer) for layer in range(model.num_layers))


def count_parameters(model: ModelConfig, moe: MoEConfig | None, vocab_size: int) -> ParameterCount:
    """Counts the parameters of ``Decoder(model, moe, vocab_size=vocab_size)``."""
    per_expert = _expert_matrices(model, moe)
    sparse = num_moe_layers(model, moe)
    num_experts, top_k = (moe.num_experts, moe.top_k) if moe else (0, 0)
    heads = 1 if model.tie_embeddings else 2
    norms = (2 * model.num_layers + 1) * model.d_model
    if model.qk_norm:
        norms += 2 * model.num_layers * model.head_size
    dense = heads * vocab_size * model.d_model + norms + _dense_matrices(model, moe)
    expert = sparse * num_experts * per_expert
    return ParameterCount(
        total=dense + expert, active=dense + sparse * top_k * per_expert, expert=expert, dense=dense
    )


def flops_per_token(model: ModelConfig, moe: MoEConfig | None, vocab_size: int, seq_len: int) -> int:
    """Floating-point operations of training, forward and backward, per token of a full window.

    ``6 * M + 12 * num_layers * num_heads * head_dim * (S + 1) / 2``: a weight of a matrix multiplication costs
    2 operations forward and 4 backward, and M counts those that one token meets: attention projections, dense
    feed-forward layers, routers, shared experts, top_k experts and the head (tied or not), but not the embedding
    lookup and the norms. A query costs 4 * head_dim operations forward per key it looks at (score and weighted
    sum) and twice that backward; on average it looks at (S + 1) / 2 keys, since attention is causal.

    Dropped assignments, skipped second experts and document masks save work that is not subtracted;
    recomputation is not added.
    """
    active_experts = num_moe_layers(model, moe) * moe.top_k if moe else 0
    matmul = _dense_matrices(model, moe) + active_experts * _expert_matrices(model, moe)
    matmul += vocab_size * model.d_model
    return 6 * matmul + 6 * model.num_layers * model.num_heads * model.head_size * (seq_len + 1)


def _expert_matrices(model: ModelConfig, moe: MoEConfig | None) -> int:
    """Weights of one routed expert."""
    if moe is None:
        return 0
    return (3 if moe.activation == "swiglu" else 2) * model.d_model * expert_width(model, moe)


def _dense_matrices(model: ModelConfig, moe: MoEConfig | None) -> int:
    """Weights of all matrices but the routed experts, the embedding and the head."""
    sparse = num_moe_layers(model, moe)
    attention = 2 * model.d_model * (model.num_heads + model.kv_heads) * model.head_size
    weights = model.num_layers * attention + (model.num_layers - sparse) * 3 * model.d_model * model.d_ff
    if moe is not None:
        shared = 3 * model.d_model * expert_width(model, moe) * moe.shared_experts
        router = moe.router.num_weights(d_model=model.d_model, num_experts=moe.num_experts)
        weights += sparse * (router + shared)
    return weights
