"""A small decoder with a dense and an MoE block, and the gradients of one training pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epmoe.config import Config
from epmoe.models.decoder import Decoder
from epmoe.train.build import build_model
from epmoe.types import TokenContext

VOCAB, SEQ_LEN, SEQUENCES = 48, 8, 4


def decoder(
    *,
    recompute: str = "none",
    precision: str = "fp64",
    num_layers: int = 2,
    router: str = "gshard_top2",
    smoothing: dict[str, Any] | None = None,
    **moe: Any,
) -> Decoder:
    """With dropout, shared experts, normed heads; every second block has experts."""
    special: dict[str, Any] = {"task": {"num_tasks": SEQUENCES}}
    losses: dict[str, Any] = {
        "soft": {},
        "hash": {},
        "strictly_balanced": {"batchwise_threshold": 0.05, "z": 0.01},
    }
    moe = {
        "every": 2,
        "num_experts": 4,
        "router": {"name": router, "smoothing": smoothing, **special.get(router, {})},
        "d_ff": 24,
        "shared_experts": 1,
        "allow_non_causal": True,
        "losses": losses.get(router, {"balance": 0.05, "z": 0.01}),
        "capacity_factor": None if router == "soft" else 0.75,
        **moe,
    }
    shape = {"d_model": 16, "num_layers": num_layers, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24,
             "qk_norm": True, "init_std": 0.2, "dropout": 0.1}  # fmt: skip
    config = Config.model_validate(
        {
            "data": {"seq_len": SEQ_LEN},
            "model": shape,
            "moe": moe,
            "train": {"precision": precision, "recompute": recompute},
        }
    )
    return build_model(config, VOCAB, device=torch.device("cpu")).train()


def samples() -> tuple[Tensor, TokenContext]:
    """Token ids and their context, some of them padding."""
    generator = torch.Generator().manual_seed(0)
    token_BS = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN), generator=generator)
    number_B = torch.arange(SEQUENCES)
    valid_BS = torch.rand(SEQUENCES, SEQ_LEN, generator=generator) > 0.2
    return token_BS, TokenContext(sample_B=number_B, task_B=number_B, token_BS=token_BS, valid_BS=valid_BS)


def objective(model: Decoder) -> Tensor:
    """Something of logits and auxiliary losses."""
    logits_BSV, reports = model(*samples())
    total = logits_BSV.square().sum()
    for report in reports:
        for value in report.losses.values():
            total = total + 3.0 * value
    return total


def gradients(model: Decoder) -> dict[str, Tensor]:
    """Of two micro-batches' objective, by name."""
    for _ in range(2):
        objective(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
