"""Image classification with small convolutional networks as experts: dense, sparse and top-1 mixtures.

    pip install 'epmoe[examples]'
    python examples/digits.py

Trains every combination of mixture and objective on scikit-learn's bundled digits (1,797 images of 8 x 8) and prints
the accuracy on the fifth of them that was not trained on. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epmoe import ModuleExperts, MoEConfig, MoELayer, TokenContext, build_moe_layer
from epmoe.config_routers import EddOptions
from epmoe.moe.expert_outputs import ExpertOutputs, run_experts
from epmoe.moe.mixture import (
    EDD_PRESETS,
    competitive_loss,
    cross_entropies,
    edd_loss,
    edd_terms,
    mixture_nll,
)

PIXELS, CLASSES = 64, 10
BALANCE = 0.01
BATCH = 128

DENSE: Mapping[str, object] = {"name": "dense"}
SPARSE: Mapping[str, object] = {"name": "topk", "normalize": True}
TOP1: Mapping[str, object] = {"name": "topk", "normalize": False}
GATE_NOISE, INPUT_NOISE = {"gate": "uniform"}, {"draws": 10, "sigma": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the table."""

    name: str
    router: Mapping[str, object]
    top_k: int | None = None
    probes: int = 0
    edd: EddOptions | None = None
    objective: str = "cooperative"
    """``cooperative``: cross-entropy of the mixture's output. ``competitive``, ``likelihood``: of every expert's."""


def variants() -> list[Variant]:
    """Three mixtures, each plain, with both presets of EDD and with both kinds of smoothing; then the objectives."""
    found = []
    for name, router, top_k, probes in (
        ("dense", DENSE, None, 0),
        ("sparse, top 2", SPARSE, 2, 1),
        ("top 1", TOP1, 1, 1),
    ):
        found.append(Variant(name=name, router=router, top_k=top_k))
        for preset, edd in EDD_PRESETS.items():
            found.append(
                Variant(name=f"{name}, EDD {preset}", router=router, top_k=top_k, probes=probes, edd=edd)
            )
        for kind, smoothing in (("gate noise", GATE_NOISE), ("10 noisy inputs", INPUT_NOISE)):
            router_S = {**router, "smoothing": smoothing}
            found.append(Variant(name=f"{name}, {kind}", router=router_S, top_k=top_k))
    found += [
        Variant(name=f"dense, {name}", router=DENSE, objective=name) for name in ("competitive", "likelihood")
    ]
    pick = {**DENSE, "pooling": "max_pick", "router_loss": True}
    found.append(Variant(name="dense, max pick, EDD strong", router=pick, edd=EDD_PRESETS["strong"]))
    return found


class SmallCNN(nn.Module):
    """One expert: an image as a row of 64 pixels -> logits of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * 16, CLASSES)

    def forward(self, rows_ND: Tensor) -> Tensor:
        """``[n, 64]`` -> ``[n, 10]``."""
        images = rows_ND.view(-1, 1, 8, 8)
        features: Tensor = self.head(self.conv(images).relu().flatten(1))
        return features


def build(variant: Variant, num_experts: int, seed: int) -> MoELayer:
    """The whole model: a layer that sends an image, its one token, to classifiers."""
    torch.manual_seed(seed)
    fields = {} if variant.top_k is None else {"top_k": variant.top_k}
    moe = MoEConfig.model_validate(
        {
            "num_experts": num_experts,
            "router": variant.router,
            "capacity_factor": None,
            "group": "rank",
            "losses": {"balance": BALANCE},
            **fields,
        }
    )
    experts = ModuleExperts([SmallCNN() for _ in range(num_experts)], d_out=CLASSES)
    return build_moe_layer(moe, d_model=PIXELS, experts=experts, seed=seed)


def objective(variant: Variant, found: ExpertOutputs, label_T: Tensor) -> Tensor:
    """Task loss, plus EDD and balance, per image."""
    own_TK = cross_entropies(found.outputs_TKO, label_T)
    if variant.objective == "competitive":
        loss = competitive_loss(found.logits_TK, own_TK) / len(label_T)
    elif variant.objective == "likelihood":
        loss = mixture_nll(found.logits_TK, own_TK) / len(label_T)
    else:
        loss = F.cross_entropy(found.y_BSO.flatten(0, 1), label_T)
    loss = loss + BALANCE * found.report.losses["balance"] / len(label_T)
    if variant.edd is not None:
        terms = edd_terms(found.logits_TK, found.outputs_TKO, own_TK, variant.edd)
        loss = loss + variant.edd.weight * edd_loss(terms, variant.edd)
    return loss


def train(
    layer: MoELayer, variant: Variant, images_TD: Tensor, label_T: Tensor, epochs: int, seed: int
) -> None:
    """Adam, batches of 128. An image has another sample number, and so other random draws, in every epoch."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    layer.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images_TD), generator=generator)
        for rows in order.split(BATCH):
            ctx = TokenContext(sample_B=rows + epoch * len(images_TD))
            found = run_experts(layer, images_TD[rows].unsqueeze(1), ctx, probes=variant.probes)
            optimizer.zero_grad()
            objective(variant, found, label_T[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(layer: MoELayer, images_TD: Tensor, label_T: Tensor) -> tuple[float, float]:
    """Share of images that are classified rightly, and the busiest expert's share of the first choices."""
    layer.eval()
    y_TO = layer(images_TD.unsqueeze(1))[0][:, 0]
    first_T = layer.route(images_TD.unsqueeze(1), TokenContext()).logits_TE.argmax(-1)
    busiest = torch.bincount(first_T).max().item() / len(first_T)
    return (y_TO.argmax(-1) == label_T).float().mean().item(), busiest


def load() -> tuple[Tensor, Tensor]:
    """Images in [0, 1] ``[T, 64]`` and digits ``[T]``, shuffled once."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("this example needs scikit-learn: pip install 'epmoe[examples]'")
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images_TD = torch.tensor(digits.data, dtype=torch.float32)[order] / 16.0
    return images_TD, torch.tensor(digits.target, dtype=torch.int64)[order]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3, help="runs per row; the table has their mean")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--images", type=int, default=1797, help="how many of them are used")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args(arguments)
    images_TD, label_T = (tensor[: options.images] for tensor in load())
    held_out = len(label_T) // 5
    print(f"{'mixture':30s} {'accuracy':>8s}  {'lowest':>6s} {'highest':>7s}  busiest expert")
    for variant in variants():
        if options.only not in variant.name:
            continue
        results = []
        for seed in range(options.seeds):
            layer = build(variant, options.experts, seed)
            train(layer, variant, images_TD[held_out:], label_T[held_out:], options.epochs, seed)
            results.append(accuracy(layer, images_TD[:held_out], label_T[:held_out]))
        right, busiest = zip(*results, strict=True)
        print(
            f"{variant.name:30s} {mean(right):8.1%}  {min(right):6.1%} {max(right):7.1%}  {mean(busiest):6.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
