"""Which expert owns which part of the plane, while a mixture learns: an animated GIF.

    pip install 'epmoe[examples]'
    python examples/regions.py --out regions.gif

Four clusters of two classes each, every cluster with a border of its own. One straight line cannot separate the
classes; four experts, each a straight line, can, when the router gives every cluster to one of them. They are trained
by the likelihood of the mixture (Jacobs et al. 1991), which may also settle on fewer of them: try another --seed. In
the picture the colour of a place is that of the expert that owns it, mixed where the router, with noise on its logits,
would waver; dots are points of the two classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from epmoe import ModuleExperts, MoEConfig, MoELayer, TokenContext, build_moe_layer
from epmoe.moe.expert_outputs import run_experts
from epmoe.moe.mixture import cross_entropies, mixture_nll, posterior
from epmoe.moe.smoothing import smoothed_probability

EXPERTS, REACH, NOISES = 4, 2.0, 16
COLOURS = ((244, 177, 131), (143, 188, 230), (169, 209, 142), (201, 160, 220))
DARK, LIGHT = (40, 40, 40), (255, 255, 255)

Frame = npt.NDArray[np.uint8]


def points(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``[T, 3]``, the third coordinate always 1 (a bias for router and experts), and their classes ``[T]``."""
    generator = torch.Generator().manual_seed(seed)
    cluster_T = torch.arange(number) % 4
    centre_T2 = torch.stack((2.0 * (cluster_T % 2) - 1.0, 2.0 * (cluster_T // 2) - 1.0), dim=1)
    offset_T2 = 0.35 * torch.randn(number, 2, generator=generator)
    angle_T = torch.pi / 4 * cluster_T
    class_T = (offset_T2[:, 0] * angle_T.cos() + offset_T2[:, 1] * angle_T.sin() > 0).long()
    return torch.cat((centre_T2 + offset_T2, torch.ones(number, 1)), dim=1), class_T


def build(seed: int) -> MoELayer:
    """A dense mixture of straight lines whose output in evaluation is that of the most probable one."""
    torch.manual_seed(seed)
    router = {"name": "dense", "pooling_eval": "max_pick"}
    moe = MoEConfig.model_validate({"num_experts": EXPERTS, "router": router, "losses": {}})
    lines = [nn.Linear(3, 2, bias=False) for _ in range(EXPERTS)]
    return build_moe_layer(moe, d_model=3, experts=ModuleExperts(lines, d_out=2), seed=seed)


def step(layer: MoELayer, optimizer: torch.optim.Optimizer, x_T3: Tensor, class_T: Tensor) -> None:
    """One step on all points by the likelihood of the mixture."""
    found = run_experts(layer, x_T3.unsqueeze(0))
    loss = mixture_nll(found.logits_TK, cross_entropies(found.outputs_TKO, class_T)) / len(class_T)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def judge(layer: MoELayer, x_T3: Tensor, class_T: Tensor) -> tuple[float, float]:
    """Share of points classified rightly by their most probable expert, and how often the posterior agrees with it."""
    layer.train()
    found = run_experts(layer, x_T3.unsqueeze(0))
    share_TK = posterior(found.logits_TK, cross_entropies(found.outputs_TKO, class_T))
    agrees = (share_TK.argmax(-1) == 0).float().mean().item()  # choice 0 is the router's most probable expert
    y_T2 = layer.eval()(x_T3.unsqueeze(0))[0][0]
    layer.train()
    return (y_T2.argmax(-1) == class_T).float().mean().item(), agrees


@torch.no_grad()
def draw(layer: MoELayer, x_T3: Tensor, class_T: Tensor, size: int) -> Frame:
    """One picture ``[size, size, 3]``."""
    axis = torch.linspace(-REACH, REACH, size)
    grid_T3 = torch.stack(
        (axis.repeat(size), axis.flip(0).repeat_interleave(size), torch.ones(size * size)), dim=1
    )
    logits_TE = layer.route(grid_T3.unsqueeze(0), TokenContext()).logits_TE
    noise_NTE = torch.rand(NOISES, *logits_TE.shape, generator=torch.Generator().manual_seed(0))
    colour_T3 = smoothed_probability(logits_TE, noise_NTE) @ torch.tensor(COLOURS, dtype=torch.float32)
    frame: Frame = colour_T3.view(size, size, 3).to(torch.uint8).numpy().copy()
    cell_T2 = ((x_T3[:, :2] + REACH) / (2 * REACH) * size).long().clamp(0, size - 1)
    for (column, row), label in zip(cell_T2.tolist(), class_T.tolist(), strict=True):
        frame[size - 1 - row, column] = LIGHT if label else DARK
    return frame


def save(frames: Sequence[Frame], path: Path, zoom: int) -> None:
    """Writes the animation; the last picture stays longer."""
    try:
        from PIL import Image
    except ImportError:
        sys.exit("writing a GIF needs Pillow: pip install 'epmoe[examples]'")
    pictures = [Image.fromarray(frame.repeat(zoom, 0).repeat(zoom, 1)) for frame in frames]
    times = [120] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints how well, and writes the animation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("regions.gif"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--points", type=int, default=400)
    parser.add_argument("--size", type=int, default=96, help="places per side")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    x_T3, class_T = points(options.points, options.seed)
    layer = build(options.seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    frames = [draw(layer, x_T3, class_T, options.size)]
    shown = {round(options.steps * i / max(options.frames - 1, 1)) for i in range(1, options.frames)}
    for number in range(1, options.steps + 1):
        step(layer, optimizer, x_T3, class_T)
        if number in shown:
            frames.append(draw(layer, x_T3, class_T, options.size))
    right, agrees = judge(layer, *points(options.points, options.seed + 1))
    print(
        f"new points classified rightly: {right:.1%}; the router names the posterior's expert for {agrees:.1%}"
    )
    save(frames, options.out, zoom=max(1, 384 // options.size))
    print(f"{len(frames)} pictures: {options.out}")


if __name__ == "__main__":
    main()
