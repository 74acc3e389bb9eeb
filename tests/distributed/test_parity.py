"""Every layout trains the same model: gradients, norms, clip coefficients and losses against one process.

Plain SGD, because Adam divides a wrong scale of the gradient away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from epmoe.config import Config, ParallelConfig
from epmoe.moe import dispatch
from epmoe.parallel.fsdp import rows_here
from epmoe.parallel.mesh import build_mesh
from epmoe.process import runtime
from epmoe.process.stop_signals import StopFlag
from epmoe.train.build import build_model
from epmoe.train.trainer import Trainer
from epmoe.verify import synthetic_data as samples
from tests.distributed.harness import run_ranks
from tests.oracle.deepseek import moved_bias
from tests.patience import HANGS_S

pytestmark = pytest.mark.timeout(300)  # all cells are trained when the first is asked for
VOCAB, SEQ_LEN, GLOBAL_BATCH, NUM_EXPERTS, NUM_TASKS = 48, 8, 8, 4, 3
STEPS = {"gshard_top2": 20, "switch": 5, "topk": 5, "noisy_topk": 5, "deepseek": 5, "global_balance": 5,
         "ragged": 5, "padded": 5, "hidden": 5, "padded_hidden": 5,
         "native": 2, "fsdp": 2, "fsdp_hybrid": 2,
         "soft": 3, "strictly_balanced": 3, "two_levels": 3, "expert_choice": 3, "base": 3, "sinkhorn": 3,
         "sentence": 3, "task": 3, "dense": 3, "hash": 3,
         "hierarchical": 5, "hierarchical_padded": 5, "overlap": 5, "overlap_padded": 5,
         "twelve": 3, "everything": 3, "wire": 3, "wire_hierarchical": 3,
         "expert_dropout": 3, "expert_dropout_everything": 3, "frozen": 3, "frozen_fsdp": 3}  # fmt: skip
ROUTERS: dict[str, dict[str, Any]] = {
    "noisy_topk": {"router": {"name": "noisy_topk", "jitter": 0.05}},
    "deepseek": {
        "router": {"name": "deepseek", "num_groups": 4, "groups_kept": 3, "bias_rate": 0.02, "scale": 2.0},
        "losses": {"sequence_balance": 0.05},
    },
    "global_balance": {"router": "topk", "balance_scope": "global"},
    "ragged": {"router": "gshard_top2"},
    "padded": {"router": "gshard_top2", "dispatcher": "padded"},
    "hidden": {"router": "gshard_top2", "save": "hidden"},
    "padded_hidden": {"router": "gshard_top2", "dispatcher": "padded", "save": "hidden"},
    "soft": {
        "router": {"name": "soft", "slots": 2},
        "allow_non_causal": True,
        "capacity_factor": None,
        "losses": {},
    },
    "strictly_balanced": {
        "router": "strictly_balanced",
        "allow_non_causal": True,
        "losses": {"batchwise_threshold": 0.05, "z": 0.01},
    },
    "two_levels": {
        "router": {"name": "hierarchical", "groups_per_token": 2},
        "top_k": 2,
        "losses": {"z": 0.01},
    },
    "expert_choice": {"router": "expert_choice", "allow_non_causal": True, "losses": {}},
    "base": {"router": "base", "allow_non_causal": True, "capacity_factor": None, "losses": {}},
    "sinkhorn": {"router": "sinkhorn", "allow_non_causal": True, "losses": {"z": 0.01}},
    "sentence": {"router": "sentence", "allow_non_causal": True},
    "task": {"router": {"name": "task", "num_tasks": NUM_TASKS}},
    "dense": {"router": "dense", "top_k": NUM_EXPERTS, "capacity_factor": None, "losses": {}},
    "hash": {"router": "hash", "top_k": 1, "losses": {}},
}
"""The MoE section of routers that are more than a name, and of other ways to the experts."""
ROUTERS |= {
    "hierarchical": ROUTERS["ragged"],
    "hierarchical_padded": ROUTERS["padded"],
    "overlap": ROUTERS["hidden"],
    "overlap_padded": ROUTERS["padded"],
    "twelve": {"router": "gshard_top2", "num_experts": 12},
    "everything": {"router": "gshard_top2", "num_experts": 12, "dispatcher": "padded"},
    "wire": {"router": "gshard_top2", "dispatcher": "all_to_all"},  # which also rounds on one rank
    "wire_hierarchical": {"router": "gshard_top2", "dispatcher": "padded"},
    "expert_dropout": {"router": "gshard_top2", "expert_dropout": 0.4},
    "expert_dropout_everything": {
        "router": "gshard_top2",
        "expert_dropout": 0.4,
        "dispatcher": "padded",
        "save": "hidden",
    },
    "frozen": {"router": "deepseek"},
    "frozen_fsdp": {"router": "deepseek"},
}
TWO_NODES: dict[str, Any] = {"exchange": "hierarchical", "ranks_per_node": 2}
PARALLEL: dict[str, dict[str, Any]] = {
    "hierarchical": TWO_NODES,
    "hierarchical_padded": TWO_NODES,
    "overlap": {"overlap_chunks": 2},
    "overlap_padded": {"overlap_chunks": 2, "overlap_shared": True},
    "everything": {"overlap_chunks": 3, "overlap_shared": True, **TWO_NODES},
    "wire": {"wire_dtype": "bf16"},
    "wire_hierarchical": {"wire_dtype": "bf16", "overlap_shared": True, **TWO_NODES},
    "expert_dropout_everything": {"overlap_chunks": 2},
    "frozen_fsdp": {"engine": "fsdp"},
}
"""Their parallel section."""
FROZEN = ("router", "attention", "norms")
ENGINES: dict[str, dict[str, Any]] = {
    "native": {},
    "fsdp": {"engine": "fsdp"},
    "fsdp_hybrid": {"engine": "fsdp", "fsdp_shard": "hybrid"},
}
"""The parallel section of the engines."""
PARALLEL |= ENGINES
ROUTERS |= dict.fromkeys(ENGINES, ROUTERS["ragged"])
SAME_FUNCTION = {"padded": "ragged", "hidden": "ragged", "padded_hidden": "ragged",
                 "hierarchical": "ragged", "hierarchical_padded": "ragged", "overlap": "ragged",
                 "overlap_padded": "ragged", "everything": "twelve", "wire_hierarchical": "wire",
                 "expert_dropout_everything": "expert_dropout", "frozen_fsdp": "frozen"}  # fmt: skip
RECOMPUTE = {
    "full": "ragged",
    "selective": "ragged",
    "padded_full": "padded",
    "padded_selective": "padded",
    "deepseek_full": "deepseek",
    "global_balance_full": "global_balance",
    "soft_full": "soft",
    "expert_dropout_full": "expert_dropout",
    "overlap_full": "overlap",
    "overlap_padded_full": "overlap_padded",
    "overlap_padded_selective": "overlap_padded",
    "hierarchical_full": "hierarchical",
    "everything_full": "everything",
    "fsdp_full": "fsdp",
    "fsdp_selective": "fsdp",
}
"""Ways to train with ``train.recompute``, the last word of their name, and what they do otherwise."""
for settings in (STEPS, ROUTERS, PARALLEL):
    settings |= {name: settings[other] for name, other in RECOMPUTE.items() if other in settings}
SAME_FUNCTION |= {name: SAME_FUNCTION.get(other, other) for name, other in RECOMPUTE.items()}
"""What must train as something else does."""
LAYOUTS = {1: (1,), 2: (1, 2), 4: (2, 4)}
"""World size -> ep sizes."""


@dataclass(frozen=True, kw_only=True)
class Samples(samples.Samples):
    """Made-up sequences of unequal lengths; with four ranks one of them has no valid token."""

    vocab_size: int = VOCAB
    seq_len: int = SEQ_LEN
    batch_size: int = GLOBAL_BATCH
    num_tasks: int = NUM_TASKS


def config(router: str, precision: str, accumulation: int, world_size: int) -> Config:
    moe = {
        "every": 1,
        "num_experts": NUM_EXPERTS,
        "router": router,
        "d_ff": 24,
        "capacity_factor": 0.75,
        "min_capacity": 1,
        "shared_experts": 1,
        "losses": {"balance": 0.05, "z": 0.01},
        **ROUTERS.get(router, {}),
    }
    return Config.model_validate(
        {
            "seed": 3,
            "data": {"seq_len": SEQ_LEN},
            "model": {"d_model": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "d_ff": 24,
                      "qk_norm": True, "init_std": 0.2, "dropout": 0.1},
            "moe": moe,
            "parallel": PARALLEL.get(router, {}),
            "optimizer": {"name": "sgd", "lr": 0.3, "warmup_steps": 2, "clip_norm": 0.8},
            "train": {"steps": STEPS[router], "global_batch_size": GLOBAL_BATCH, "precision": precision,
                      "freeze": FROZEN if router.startswith("frozen") else (),
                      "micro_batch_size": GLOBAL_BATCH // accumulation // world_size,
                      "recompute": router.rpartition("_")[2] if router in RECOMPUTE else "none"},
        }
    )  # fmt: skip


def train_cells(rank: int, cells: list[tuple[int, str, str, int]]) -> list[dict[str, Any]]:
    """Trains each (ep_size, router, precision, accumulation) for a few steps in this world."""
    place = runtime.start("cpu", HANGS_S)
    layouts = {(ep_size, ParallelConfig(**PARALLEL.get(router, {}))) for ep_size, router, *_ in cells}
    meshes = {layout: build_mesh(place, *layout) for layout in sorted(layouts, key=repr)}
    return [
        train_cell(place, meshes[ep_size, ParallelConfig(**PARALLEL.get(router, {}))], router, *rest)
        for ep_size, router, *rest in cells
    ]


def train_cell(place: Any, mesh: Any, router: str, precision: str, accumulation: int) -> dict[str, Any]:
    cfg = config(router, precision, accumulation, place.world_size)
    model = build_model(cfg, VOCAB, device=place.device, mesh=mesh)
    trainer = Trainer(cfg, place, mesh, model=model, data=Samples(), stop=StopFlag())  # type: ignore[arg-type]
    losses, norms, clips, gradients, counts, demands = [], [], [], {}, [], []
    metrics: list[list[Tensor]] = []
    collectives: Counter[str] = Counter()
    for step in range(STEPS[router]):
        with counting(collectives):
            result = trainer.step()
        metrics.append(pytree.tree_leaves(result.sums))
        losses.append(float(result.sums.loss) / result.num_tokens)
        norms.append(result.grad_norm)
        clips.append(result.clip)
        counts.append({layer: did.kept_E for layer, did in enumerate(result.sums.layers)})
        demands.append([did.demand_E.tolist() for did in result.sums.layers])
        if step == 0:
            gradients = {name: part.local.clone() for name, part in trainer.engine.gradients().items()}
    parts = trainer.engine.gradients()
    where = {name: (part.first_row, part.shape) for name, part in parts.items()}
    weights = {name: rows_here(value).clone() for name, value in trainer.engine.weights().items()}
    return {"losses": losses, "norms": norms, "clips": clips, "gradients": gradients, "counts": counts,
            "metrics": metrics, "collectives": collectives, "demands": demands, "weights": weights,
            "where": where}  # fmt: skip


@contextmanager
def counting(calls: Counter[str]) -> Iterator[None]:
    """Counts the collectives that a second pass must not repeat."""
    with ExitStack() as stack:
        for owner, name in ((dispatch, "exchange_counts"), (dist, "all_reduce")):
            original = getattr(owner, name)

            def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                calls[_name] += 1
                return _original(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, call))
        yield


def worst_error(kind: str, result: dict[str, Any], reference: dict[str, Any]) -> tuple[float, str]:
    """Largest max|a-b| / max|b| over all tensors, and the tensor's name."""
    errors = []
    for name, whole in reference[kind].items():
        got = result[kind][name]
        wanted = whole[result["where"].get(name, (0, None))[0] :][: got.shape[0]]
        assert wanted.shape == got.shape, name
        if not got.numel():  # fewer rows than ranks
            continue
        scale = float(wanted.abs().max())
        difference = float((got - wanted).abs().max())
        errors.append((difference / scale if scale else difference, name))
    return max(errors)


Cell = tuple[int, int, str, str, int]
"""World size, ep size, router, precision, accumulation."""
Results = dict[Cell, list[dict[str, Any]]]

CELLS = [
    (world, ep, "gshard_top2", precision, accumulation)
    for world, eps in LAYOUTS.items()
    for ep in eps
    for precision, accumulation in (("fp32", 1), ("fp64", 2))
]
CELLS += [(1, 1, "gshard_top2", "fp64", 1), (4, 2, "gshard_top2", "fp64", 1)]
CELLS += [
    (world, ep, router, precision, 1)
    for world, ep in ((1, 1), (2, 1), (4, 4))
    for router, precision in (("switch", "fp64"), ("topk", "fp32"))
]
CELLS += [
    (world, ep, router, "fp64", accumulation if world > 1 else 1)
    for world, ep in ((1, 1), (2, 2))
    for router, accumulation in (("noisy_topk", 1), ("deepseek", 2), ("global_balance", 1))
]
CELLS += [
    (1, 1, "ragged", "fp64", 1),
    (1, 1, "padded_hidden", "fp64", 1),
    (2, 2, "padded", "fp64", 2),
    (2, 2, "hidden", "fp64", 1),
    (4, 2, "padded_hidden", "fp64", 1),
    (4, 4, "padded", "fp64", 1),
    (4, 4, "hidden", "fp64", 1),
]
CELLS += [
    (world, ep, router, "fp64", 1)
    for world, ep in ((1, 1), (2, 2))
    for router in (
        "soft",
        "strictly_balanced",
        "two_levels",
        "expert_choice",
        "base",
        "sinkhorn",
        "sentence",
        "task",
        "dense",
        "hash",
    )
]
CELLS += [
    (1, 1, "twelve", "fp64", 1),
    (1, 1, "wire", "fp64", 1),
    (2, 2, "overlap_padded", "fp64", 1),
    (4, 2, "overlap", "fp64", 2),
    (4, 4, "hierarchical", "fp64", 1),
    (4, 4, "hierarchical_padded", "fp64", 1),
    (4, 4, "everything", "fp64", 1),
    (4, 4, "wire", "fp64", 2),
    (4, 4, "wire_hierarchical", "fp64", 1),
    (1, 1, "expert_dropout", "fp64", 1),
    (2, 2, "expert_dropout", "fp64", 1),
    (2, 2, "expert_dropout_everything", "fp64", 1),
    (1, 1, "frozen", "fp64", 1),
    (2, 2, "frozen", "fp64", 2),
    (4, 2, "frozen_fsdp", "fp64", 1),
]
RECOMPUTED: dict[Cell, str] = {
    (2, 2, "full", "fp64", 1): "ragged",
    (2, 2, "selective", "fp64", 1): "ragged",
    (2, 2, "padded_full", "fp64", 2): "padded",
    (2, 2, "padded_selective", "fp64", 2): "padded",
    (2, 2, "deepseek_full", "fp64", 2): "deepseek",
    (2, 2, "global_balance_full", "fp64", 1): "global_balance",
    (2, 2, "soft_full", "fp64", 1): "soft",
    (2, 2, "expert_dropout_full", "fp64", 1): "expert_dropout",
    (2, 2, "overlap_padded_full", "fp64", 1): "overlap_padded",
    (2, 2, "overlap_padded_selective", "fp64", 1): "overlap_padded",
    (4, 2, "overlap_full", "fp64", 2): "overlap",
    (4, 4, "hierarchical_full", "fp64", 1): "hierarchical",
    (4, 4, "everything_full", "fp64", 1): "everything",
}
"""Cells with recomputation; each is compared with its layout without, too."""
CELLS += [(2, 2, "ragged", "fp64", 1), *RECOMPUTED]


def train_all(cells: list[Cell], folder: Path) -> Results:
    """Every cell of every world size; each world is started once."""
    found = {}
    for world_size in LAYOUTS:
        mine = [cell for cell in cells if cell[0] == world_size]
        settings = [cell[1:] for cell in mine]
        ranks = run_ranks(world_size, train_cells, folder, settings, timeout=280)
        for index, cell in enumerate(mine):
            found[cell] = [rank[index] for rank in ranks]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cells of this file."""
    return train_all(CELLS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("world", "ep", "router", "precision", "accumulation"), CELLS)
def test_layout_equals_one_process(
    results: Results, world: int, ep: int, router: str, precision: str, accumulation: int
) -> None:
    [reference] = results[(1, 1, SAME_FUNCTION.get(router, router), precision, 1)]
    assert_same_training(results[(world, ep, router, precision, accumulation)], reference, precision)


def assert_same_training(ranks: list[dict[str, Any]], reference: dict[str, Any], precision: str) -> None:
    limit = 1e-9 if precision == "fp64" else 1e-5
    for rank in ranks:
        error, name = worst_error("gradients", rank, reference)
        assert error <= limit, f"gradient of {name} is off by {error:.2e}"
        for step, (loss, wanted) in enumerate(zip(rank["losses"], reference["losses"], strict=True)):
            assert abs(loss - wanted) <= wanted * (1e-12 if precision == "fp64" else 2e-6), (
                f"loss of step {step}"
            )
        for got, wanted in zip(rank["counts"], reference["counts"], strict=True):
            assert all(torch.equal(got[key], wanted[key]) for key in wanted), "other assignments were kept"
        # The gradients above are clipped ones, in which a factor common to all of them does not show.
        assert rank["norms"] == pytest.approx(reference["norms"], rel=limit)
        assert rank["norms"] == ranks[0]["norms"]
        assert rank["clips"] == ranks[0]["clips"]
    assert min(reference["clips"]) < 1.0, "the clip was never active"


def test_what_is_frozen_stays_where_it_was(results: Results) -> None:
    """In every layout, the buffers of a frozen router included; the rest is trained."""
    cfg = config("frozen", "fp64", 1, 1)
    before = build_model(cfg, VOCAB, device=torch.device("cpu")).state_dict()
    for cell in [cell for cell in CELLS if cell[2].startswith("frozen")]:
        for rank in results[cell]:
            for name, weight in rank["weights"].items():
                if "experts" in name or weight.shape != before[name].shape:
                    continue
                frozen = "router" in name or "norm" in name or ("_proj" in name and "attention" in name)
                assert torch.equal(weight, before[name]) == frozen, (cell, name)
                assert (name in rank["gradients"]) == (not frozen), (cell, name)


def test_recomputation_repeats_no_decision(results: Results) -> None:
    """Everything reported, every weight, and the number of count exchanges is what it is without."""
    for cell, other in RECOMPUTED.items():
        world, ep, _, precision, accumulation = cell
        plain = results[world, ep, other, precision, accumulation]
        for got, wanted in zip(results[cell], plain, strict=True):
            assert got["collectives"] == wanted["collectives"]
            for ours, theirs in zip(got["metrics"], wanted["metrics"], strict=True):
                pairs = zip(ours, theirs, strict=True)
                assert all(a is b is None or torch.equal(a, b) for a, b in pairs), cell
            for name, value in wanted["weights"].items():
                assert torch.equal(got["weights"][name], value), f"{cell}: {name}"
    # One micro-batch, two layers, five steps.
    assert results[2, 2, "full", "fp64", 1][0]["collectives"]["exchange_counts"] == 10
    assert results[4, 4, "everything_full", "fp64", 1][0]["collectives"]["exchange_counts"] == 0, "padded"


def test_float32_and_float64_route_alike(results: dict[tuple[Any, ...], list[dict[str, Any]]]) -> None:
    [single], [double] = (results[(1, 1, "gshard_top2", precision, 1)] for precision in ("fp32", "fp64"))
    for narrow, wide in zip(single["counts"], double["counts"], strict=True):
        assert all(torch.equal(narrow[key], wide[key]) for key in wide)


def test_weights_after_training_agree(results: dict[tuple[Any, ...], list[dict[str, Any]]]) -> None:
    [reference] = results[(1, 1, "gshard_top2", "fp64", 1)]
    for (_, _, router, precision, _), ranks in results.items():
        if (router, precision) == ("gshard_top2", "fp64"):
            assert all(worst_error("weights", rank, reference)[0] <= 1e-9 for rank in ranks)


def test_every_layout_moves_the_bias_alike(results: dict[tuple[Any, ...], list[dict[str, Any]]]) -> None:
    """Once per optimizer step, by the counts of all ranks and micro-batches: the same bits, and those of the oracle."""
    cells = [ranks for cell, ranks in results.items() if cell[2].startswith("deepseek")]
    [reference] = results[(1, 1, "deepseek", "fp64", 1)]
    for block in (0, 1):
        name = f"blocks.{block}.moe.router.bias"
        bias = [0.0] * NUM_EXPERTS
        for counts in reference["demands"]:
            bias = moved_bias(bias, counts[block], 0.02)
        assert any(bias)
        for ranks in cells:
            assert all(rank["weights"][name].tolist() == pytest.approx(bias, abs=1e-15) for rank in ranks)
            assert all(torch.equal(rank["weights"][name], ranks[0]["weights"][name]) for rank in ranks)
