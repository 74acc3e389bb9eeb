"""Ready-made shapes. Each function returns the decoder's configuration and that of its experts (None = dense)."""

from __future__ import annotations

from epmoe.config import ModelConfig, MoEConfig
from epmoe.config_routers import TopKOptions


def quickstart() -> tuple[ModelConfig, MoEConfig | None]:
    """``configs/quickstart.yaml``: learns to write on two CPU cores in minutes; 1.6 million active parameters.

    Two experts of half the dense width are as much work per token as one dense feed-forward layer, which makes
    ``quickstart_dense`` its equal in arithmetic.
    """
    model = ModelConfig(d_model=128, num_layers=4, num_heads=4, d_ff=512)
    return model, MoEConfig(every=2, num_experts=8, d_ff=256)


def quickstart_dense() -> tuple[ModelConfig, MoEConfig | None]:
    """The dense model with the active parameters of ``quickstart`` (but for its routers)."""
    return quickstart()[0], None


def mixtral_tiny() -> tuple[ModelConfig, MoEConfig | None]:
    """Mixtral's structure (arXiv:2401.04088), small enough for tests: every layer MoE, grouped heads, dropless."""
    model = ModelConfig(
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        d_ff=96,
        rope_theta=1e6,
        tie_embeddings=False,
    )
    return model, MoEConfig(
        every=1, num_experts=8, top_k=2, router=TopKOptions(normalize=True), capacity_factor=None
    )


def qwen3_moe_tiny() -> tuple[ModelConfig, MoEConfig | None]:
    """Qwen3-MoE's structure (arXiv:2505.09388), small enough for tests: heads wider than D/H with their own
    norms, a dense first layer, many narrow experts."""
    model = ModelConfig(
        d_model=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        d_ff=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=False,
    )
    return model, MoEConfig(
        every=1,
        first_dense=1,
        num_experts=16,
        top_k=4,
        d_ff=32,
        router=TopKOptions(normalize=True),
        capacity_factor=None,
    )


def gshard_125m() -> tuple[ModelConfig, MoEConfig | None]:
    """For one GPU: 113 million active parameters without the embedding, 283 million in all."""
    model = ModelConfig(d_model=768, num_layers=12, num_heads=12, d_ff=2048)
    return model, MoEConfig(every=2, num_experts=8, capacity_factor=1.0)


def gshard_8x() -> tuple[ModelConfig, MoEConfig | None]:
    """``configs/1node-8gpu.yaml``: 8 GPUs with 4 experts of each MoE layer on every one. 0.55 billion active
    parameters without the embedding, 5.1 billion in all, 0.86 billion on each GPU."""
    model = ModelConfig(d_model=1024, num_layers=24, num_heads=16, d_ff=4096)
    return model, MoEConfig(every=2, num_experts=32, capacity_factor=1.0)
