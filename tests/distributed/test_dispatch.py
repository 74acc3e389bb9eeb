"""Every dispatcher between ranks: the same layer as on one rank, and how many collectives it takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe import ModuleExperts, TokenContext, build_moe_layer, shard_experts
from epmoe.config import MoEConfig
from epmoe.moe.dispatch import AllToAllDispatcher, PaddedDispatcher
from epmoe.moe.layer import MoELayer
from epmoe.parallel.layers import take_over
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from tests.distributed.harness import run_ranks
from tests.patience import HANGS_S

WORLD, NUM_EXPERTS, WIDTH, SHAPE = 2, 6, 4, (2, 5, 4)  # three experts on each rank: not as many as ranks
VARIANTS = [
    (dispatcher, save, modules)
    for dispatcher in ("all_to_all", "padded")
    for save in ("output", "hidden")
    for modules in (False, True)
]
# What each rank's tokens are: mostly real, none of rank 1's, none at all, all of them for the same experts.
BATCHES = ("real", "rank 1 invalid", "all invalid", "one expert")


def config(dispatcher: str, save: str) -> MoEConfig:
    return MoEConfig.model_validate(
        {
            "num_experts": NUM_EXPERTS,
            "router": "gshard_top2",
            "capacity_factor": 0.8,
            "min_capacity": 1,
            "dispatcher": dispatcher,
            "save": save,
        }
    )


def modules(first: int, count: int) -> list[nn.Module]:
    """Experts that know their number."""
    made: list[nn.Module] = [nn.Linear(WIDTH, WIDTH).double() for _ in range(count)]
    for number, module in enumerate(made, start=first):
        fill(module, number)
    return made


def fill(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def make_layer(moe: MoEConfig, as_modules: bool, rank: int | None) -> MoELayer:
    """The same weights on every rank; ``rank`` None = all experts."""
    first, count = (0, NUM_EXPERTS) if rank is None else (rank * NUM_EXPERTS // WORLD, NUM_EXPERTS // WORLD)
    experts = (
        ModuleExperts(modules(first, count), num_experts=NUM_EXPERTS, first_expert=first)
        if as_modules
        else None
    )
    layer = build_moe_layer(moe, d_model=WIDTH, d_ff=3, experts=experts).double()
    fill(layer.router, 99)
    if not as_modules:
        fill(layer.experts, 98)
    return layer


def batch(kind: str, rank: int) -> tuple[Tensor, TokenContext]:
    generator = torch.Generator().manual_seed(rank + 7)
    x_BSD = torch.randn(*SHAPE, generator=generator, dtype=torch.float64)
    valid_BS = torch.arange(SHAPE[0] * SHAPE[1]).view(*SHAPE[:2]) % 7 != 3
    if kind == "all invalid" or (kind == "rank 1 invalid" and rank == 1):
        valid_BS = torch.zeros_like(valid_BS)
    if kind == "one expert":
        x_BSD[..., 0] = 40.0
    return x_BSD, TokenContext(valid_BS=valid_BS, sample_B=torch.arange(SHAPE[0]) + 10 * rank)


def outcome(layer: MoELayer, kind: str, rank: int) -> dict[str, Tensor]:
    x_BSD, ctx = batch(kind, rank)
    x_BSD.requires_grad_()
    layer.zero_grad()
    y_BSD, report = layer(x_BSD, ctx)
    (y_BSD.square().sum() + sum(report.losses.values())).backward()
    assert x_BSD.grad is not None
    found = {"y": y_BSD.detach(), "d_x": x_BSD.grad, "kept": report.metrics.kept_E}
    found |= {f"d_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found


class Collectives:
    """Counts the collectives of torch.distributed by name and by what they carry."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for name in ("all_to_all_single", "all_reduce", "all_gather", "broadcast", "barrier", "all_to_all"):
            monkeypatch.setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, collective: Any) -> Any:
        def call(first: Any = None, *args: Any, **kwargs: Any) -> Any:
            what = name
            if name == "all_to_all_single":
                what = (
                    "counts" if first.dtype == torch.int64 else "weights" if first.shape[1] == 1 else "rows"
                )
            self.calls[what] += 1
            return collective(first, *args, **kwargs)

        return call

    def take(self) -> dict[str, int]:
        taken, self.calls = dict(self.calls), Counter()
        return taken


def on_a_rank(rank: int) -> dict[str, Any]:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), WORLD)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        collectives = Collectives(monkeypatch)
        for dispatcher, save, as_modules in VARIANTS:
            layer = make_layer(config(dispatcher, save), as_modules, rank if as_modules else None)
            shard_experts(layer, mesh)
            take_over(layer, "test")
            kind = {"padded": PaddedDispatcher, "all_to_all": AllToAllDispatcher}[dispatcher]
            assert isinstance(layer.dispatcher, kind)
            for name in BATCHES:
                layer(*batch(name, rank))  # the first pass of its size, which padded dispatch compares
                collectives.take()
                with torch.no_grad():
                    layer(*batch(name, rank))
                forward = collectives.take()
                results = outcome(layer, name, rank)
                both = collectives.take()
                found[f"{dispatcher} {save} {as_modules} {name}"] = (results, forward, both)
            layer.eval()
            with torch.no_grad():
                layer(*batch("real", rank))
            found[f"{dispatcher} {save} {as_modules} dropless"] = collectives.take()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(WORLD, on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("dispatcher", "save", "as_modules"), VARIANTS)
def test_two_ranks_equal_one(
    ranks: list[dict[str, Any]], dispatcher: str, save: str, as_modules: bool, name: str
) -> None:
    whole = make_layer(config("local", "output"), as_modules, None)
    wanted = [outcome(whole, name, rank) for rank in range(WORLD)]
    count = NUM_EXPERTS // WORLD
    for rank in range(WORLD):
        got = ranks[rank][f"{dispatcher} {save} {as_modules} {name}"][0]
        for key, value in got.items():
            expected = wanted[rank].get(key)
            if key.startswith("d_experts"):  # of the tokens of both ranks
                expected = sum(wanted[r][key] for r in range(WORLD))
                if not as_modules:
                    expected = expected[rank * count :][:count]
            torch.testing.assert_close(
                value, expected, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
            )
    kept = [int(wanted[rank]["kept"].sum()) for rank in range(WORLD)]
    assert [bool(k) for k in kept] == {
        "real": [True, True],
        "one expert": [True, True],
        "rank 1 invalid": [True, False],
        "all invalid": [False, False],
    }[name]


@pytest.mark.parametrize("save", ["output", "hidden"])
def test_collectives_of_a_layer_pass(ranks: list[dict[str, Any]], save: str) -> None:
    """Two exchanges of rows in each pass; ragged dispatch one of counts, padded on a CPU a gather of how many rows;
    ``hidden`` one of weights, and of their gradients."""
    weights = {"weights": 1} if save == "hidden" else {}
    back = {"weights": 2} if save == "hidden" else {}
    for found in ranks:
        for as_modules in (False, True):
            for name in BATCHES:
                _, forward, both = found[f"padded {save} {as_modules} {name}"]
                assert forward == {"all_gather": 1, "rows": 2, **weights}
                assert both == {"all_gather": 1, "rows": 4, **back}
                _, forward, both = found[f"all_to_all {save} {as_modules} {name}"]
                assert forward == {"counts": 1, "rows": 2, **weights}
                assert both == {"counts": 1, "rows": 4, **back}
            assert found[f"padded {save} {as_modules} dropless"] == {"counts": 1, "rows": 2, **weights}
