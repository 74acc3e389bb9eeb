"""epmoe's layer in a plain PyTorch model under FSDP2, the experts spread over all ranks.

    torchrun --nproc-per-node 2 examples/fsdp_moe.py

``prepare`` has FSDP cut the experts over the ranks that hold the same ones, and no others; without it the first
training step stops.
"""

from __future__ import annotations

import torch
from reverser import Reverser, batch
from torch.distributed.fsdp import fully_shard

from epmoe import clip_grad_norm_, shard_experts
from epmoe.parallel.fsdp import prepare
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime


def main(steps: int = 80) -> float:
    """Trains -> the loss of the last step."""
    place = runtime.start("auto", 60.0)
    mesh = build_mesh(place, ep_size=place.world_size)
    model = Reverser().to(place.device)
    shard_experts(model, mesh)
    prepare(model, mesh)
    fully_shard(model)
    # One by one: experts and the rest are cut over different ranks, which torch cannot update in one call.
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, foreach=False)
    for step in range(steps):
        loss = model(batch(step, place.rank, place.world_size).to(place.device))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model, mesh, max_norm=10.0)
        optimizer.step()
    runtime.stop(place)
    return loss.item()


if __name__ == "__main__":
    print(f"loss of the last step: {main():.4f}")
