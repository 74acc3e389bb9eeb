"""epmoe's layer in a plain PyTorch model under ``deepspeed.initialize``, ZeRO 2; it learns to reverse eight digits.

    torchrun --nproc-per-node 2 examples/deepspeed_moe.py

``prepare`` tells DeepSpeed which ranks share which experts; without it ``deepspeed.initialize`` stops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epmoe import MoEConfig, build_moe_layer, shard_experts
from epmoe.parallel import runtime
from epmoe.parallel.deepspeed import load_deepspeed, prepare
from epmoe.parallel.mesh import build_mesh

DIGITS, LENGTH, BATCH, WIDTH = 10, 8, 32, 64
MOE = MoEConfig(num_experts=4, router="topk", capacity_factor=None, d_ff=64, losses={"balance": 0.01})
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


class Reverser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS, WIDTH)
        self.mix = nn.Linear(LENGTH, LENGTH)
        self.moe = build_moe_layer(MOE, d_model=WIDTH)
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, digit_BS: Tensor) -> Tensor:
        x_BSD = self.mix(self.embed(digit_BS).transpose(1, 2)).transpose(1, 2)
        y_BSD, report = self.moe(x_BSD)
        loss = F.cross_entropy(self.head(x_BSD + y_BSD).flatten(0, 1), digit_BS.flip(1).flatten())
        return loss + MOE.losses["balance"] * report.losses["balance"] / digit_BS.numel()


def main(steps: int = 60) -> float:
    place = runtime.start("auto", 60.0)
    mesh = build_mesh(place, ep_size=place.world_size)
    torch.manual_seed(0)  # the same weights on every rank; shard_experts then keeps this rank's experts
    model = Reverser().to(place.device)
    shard_experts(model, mesh)
    prepare(model, mesh)
    engine, *_ = load_deepspeed(place.device.type).initialize(model=model, config=CONFIG)
    draws = torch.Generator().manual_seed(place.rank)
    for _ in range(steps):
        loss = engine(torch.randint(DIGITS, (BATCH, LENGTH), generator=draws).to(place.device))
        engine.backward(loss)
        engine.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss of the last step: {main():.4f}")
