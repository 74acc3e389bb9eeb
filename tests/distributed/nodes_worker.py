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
from epmoe.parallel import runtime
from epmoe.parallel.mesh import build_mesh
from epmoe.train.loop import Trainer
from epmoe.train.setup import build_model
from epmoe.train.signals import StopFlag
from epmoe.verify.samples import Samples

VOCAB, SEQ_LEN, WIDTH, NUM_EXPERTS, STEPS = 64, 32, 64, 8, 4
CAPACITY_FACTOR = 1.0


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
                "capacity_factor": CAPACITY_FACTOR,
                "min_capacity": 1,
                "dispatcher": dispatcher,
            },
            "parallel": {"ep_size": 4, "exchange": exchange},
            "optimizer": {"name": "sgd", "lr": 0.1, "warmup_steps": 0},
            "train": {"steps": STEPS, "global_batch_size": 8, "precision": "fp64", "device": "cpu"},
        }
    )


def train(place: runtime.Runtime, exchange: str, dispatcher: str) -> dict[str, Any]:
    """Some steps -> losses, seconds of the last ones, messages and bytes per receiver."""
    cfg = config(exchange, dispatcher)
    mesh = build_mesh(place, 4, cfg.parallel)
    messages: Counter[int] = Counter()
    sent: Counter[int] = Counter()

    def observe(peer: int, num_bytes: int) -> None:
        messages[peer] += 1
        sent[peer] += num_bytes

    mesh = replace(mesh, exchange=replace(mesh.exchange, observe=observe))
    samples = Samples(vocab_size=VOCAB, seq_len=SEQ_LEN, batch_size=cfg.train.global_batch_size)
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    trainer = Trainer(cfg, place, mesh, model=model, data=samples, stop=StopFlag())  # type: ignore[arg-type]
    losses, seconds = [], []
    for _ in range(STEPS):
        begin = time.perf_counter()
        result = trainer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(result.sums["loss"]) / result.num_tokens)
    return {"losses": losses, "seconds": seconds, "messages": dict(messages), "bytes": dict(sent)}


def main(folder: Path) -> None:
    """Every exchange and dispatcher; each rank writes a file."""
    torch.set_num_threads(1)
    place = runtime.start("cpu", 60.0)
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
