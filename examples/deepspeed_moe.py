"""epmoe's layer in a plain PyTorch model under ``deepspeed.initialize``, ZeRO 2, the experts spread over all ranks.

    torchrun --nproc-per-node 2 examples/deepspeed_moe.py

``prepare`` tells DeepSpeed which ranks share which experts; without it ``deepspeed.initialize`` stops.
"""

from __future__ import annotations

from reverser import BATCH, Reverser, batch

from epmoe import shard_experts
from epmoe.parallel.deepspeed import load_deepspeed, prepare
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime

CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


def main(steps: int = 80) -> float:
    """Trains -> the loss of the last step."""
    place = runtime.start("auto", 60.0)
    mesh = build_mesh(place, ep_size=place.world_size)
    model = Reverser().to(place.device)
    shard_experts(model, mesh)
    prepare(model, mesh)
    engine, *_ = load_deepspeed(place.device.type).initialize(model=model, config=CONFIG)
    for step in range(steps):
        loss = engine(batch(step, place.rank, place.world_size).to(place.device))
        engine.backward(loss)
        engine.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss of the last step: {main():.4f}")
