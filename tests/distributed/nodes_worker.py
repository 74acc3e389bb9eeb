"""One rank of a job over several nodes: trains with each exchange and writes down what it sent to whom.

torchrun ... -m tests.distributed.nodes_worker FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from epmoe.config import Config
from epmoe.moe.router import Router
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from epmoe.types import Routing
from epmoe.verify.synthetic_data import Samples
from tests.patience import HANGS_S

VOCAB, SEQ_LEN, WIDTH, NUM_EXPERTS, STEPS = 64, 64, 128, 8, 4
CAPACITY = 2 * SEQ_LEN // NUM_EXPERTS
"""Slots of an expert for a sequence: factor 1.0 with two experts per token."""


def config(exchange: str, dispatcher: str) -> Config:
    return Config.model_validate(
        {
            "seed": 3,
            "data": {"seq_len": SEQ_LEN},
            "model": {"d_model": WIDTH, "num_layers": 2, "num_heads": 2, "d_ff": 64},
            "moe": {
                "every": 1,
                "num_experts": NUM_EXPERTS,
                "top_k": 2,
                "router": "topk",
                "capacity_factor": 1.0,
                "min_capacity": 1,
                "dispatcher": dispatcher,
            },
            "parallel": {"ep_size": 4, "exchange": exchange},
            "optimizer": {"name": "sgd", "lr": 0.1, "warmup_steps": 0},
            "train": {"steps": STEPS, "global_batch_size": 8, "precision": "fp64", "device": "cpu"},
        }
    )


def train(place: runtime.Runtime, exchange: str, dispatcher: str) -> dict[str, Any]:
    """Some steps -> losses, seconds, messages and bytes per receiver, and rows that each expert's slots took."""
    cfg = config(exchange, dispatcher)
    mesh = build_mesh(place, 4, cfg.parallel)
    messages: Counter[int] = Counter()
    sent: Counter[int] = Counter()

    def observe(peer: int, num_bytes: int) -> None:
        messages[peer] += 1
        sent[peer] += num_bytes

    mesh = replace(mesh, exchange=replace(mesh.exchange, observe=observe))
    kept_E = torch.zeros(NUM_EXPERTS, dtype=torch.int64)

    def count(_: Router, __: object, routing: Routing) -> None:
        """By hand: what a sequence sends to an expert, but no more than fit."""
        for sequence in range(cfg.train.global_batch_size // place.world_size):
            own_A = routing.active_A & (routing.token_A // SEQ_LEN == sequence)
            kept_E.add_(routing.expert_A[own_A].bincount(minlength=NUM_EXPERTS).clamp(max=CAPACITY))

    samples = Samples(vocab_size=VOCAB, seq_len=SEQ_LEN, batch_size=cfg.train.global_batch_size)
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(count)
    trainer = Trainer(cfg, place, mesh, model=model, data=samples, stop=StopFlag())  # type: ignore[arg-type]
    losses, seconds = [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        result = trainer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(result.sums.loss) / result.num_tokens)
    return {"losses": losses, "seconds": seconds, "messages": dict(messages), "bytes": dict(sent),
            "kept": kept_E.tolist()}  # fmt: skip


def main(folder: Path) -> None:
    """Every exchange and dispatcher; each rank writes a file."""
    torch.set_num_threads(1)
    place = runtime.start("cpu", HANGS_S)
    try:
        found = {
            f"{exchange} {dispatcher}": train(place, exchange, dispatcher)
            for exchange in ("flat", "hierarchical")
            for dispatcher in ("all_to_all", "padded")
        }
        (folder / f"rank{place.rank}.json").write_text(json.dumps(found))
    finally:
        runtime.stop(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
