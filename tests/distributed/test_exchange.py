"""Exchanges and overlap: rows, gradients and layers as of one flat all-to-all, in the order that hides the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from epmoe import ModuleExperts, TokenContext, build_moe_layer, env, shard_experts
from epmoe.comm.exchange import Exchange, Trip, depart, exchange_counts, exchange_rows
from epmoe.config import MoEConfig, ParallelConfig
from epmoe.errors import ConfigError
from epmoe.moe.layer import MoELayer
from epmoe.parallel.layers import take_over
from epmoe.parallel.mesh import ExpertMesh, build_mesh, flat_after_all
from epmoe.process import runtime
from tests.distributed.harness import run_ranks
from tests.patience import HANGS_S

WORLD, PER_NODE, WIDTH = 4, 2, 3
NUM_LOCAL = 3
NUM_EXPERTS = WORLD * NUM_LOCAL
HIERARCHICAL = {"exchange": "hierarchical", "ranks_per_node": PER_NODE}


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- rows
COUNTS: dict[str, Callable[[int, int], int]] = {
    "uneven": lambda source, expert: (3 * source + 5 * expert) % 4,
    "even": lambda source, expert: 2,
    "all to one expert": lambda source, expert: 7 if expert == 8 else 0,
    "nothing from rank 2": lambda source, expert: 0 if source == 2 else 1 + expert % 2,
    "nothing": lambda source, expert: 0,
}
"""Name -> rows that a rank sends to an expert."""


def trip_there(exchange: Exchange, counts_E: Tensor) -> Trip:
    counts_SWL = exchange_counts(exchange, counts_E)
    return Trip(exchange=exchange, splits=tuple(tuple(blocks) for blocks in counts_SWL.sum(2).tolist()))


def travel(trip: Trip, rows_ND: Tensor, *, background: bool) -> dict[str, Tensor]:
    """There, times something, and home, with the gradient of it all."""
    rows_ND = rows_ND.clone().requires_grad_()
    go = (lambda trip, rows: depart(trip, rows)()) if background else exchange_rows
    there_RD = go(trip, rows_ND)
    home_ND = go(replace(trip, home=True), there_RD * (dist.get_rank() + 2.0))
    home_ND.square().sum().backward()
    assert rows_ND.grad is not None
    return {"there": there_RD.detach(), "home": home_ND.detach(), "grad": rows_ND.grad}


def carry_rows(rank: int) -> dict[str, Any]:
    place = runtime.start("cpu", HANGS_S)
    meshes = {
        "flat": build_mesh(place, WORLD),
        "hierarchical": build_mesh(place, WORLD, ParallelConfig(**HIERARCHICAL)),
    }
    found: dict[str, Any] = {}
    for name, counts in COUNTS.items():
        counts_E = torch.tensor([counts(rank, expert) for expert in range(NUM_EXPERTS)])
        rows_ND = numbers(int(counts_E.sum()), WIDTH, seed=rank)
        rows_ND[:, 0] = rank  # where from
        rows_ND[:, 1] = torch.arange(NUM_EXPERTS).repeat_interleave(counts_E)  # where to
        for kind, mesh in meshes.items():
            sent: Counter[int] = Counter()
            num_bytes: Counter[int] = Counter()

            def observe(
                peer: int, size: int, sent: Counter[int] = sent, num_bytes: Counter[int] = num_bytes
            ) -> None:
                sent[peer] += 1
                num_bytes[peer] += size

            exchange = replace(mesh.exchange, observe=observe)
            trip = trip_there(exchange, counts_E)
            found[f"{name} {kind}"] = travel(trip, rows_ND, background=False)
            found[f"{name} {kind} traffic"] = (dict(sent), dict(num_bytes))
            found[f"{name} {kind} background"] = travel(trip, rows_ND, background=True)
    found["wire"] = {
        (kind, wire): on_the_wire(mesh.exchange, wire, rank)
        for kind, mesh in meshes.items()
        for wire in (torch.bfloat16, torch.float16)
    }
    return found


def on_the_wire(exchange: Exchange, wire: torch.dtype, rank: int) -> list[Tensor]:
    """Rows of very different sizes in a narrow dtype, and what one gets who casts by hand and sends that."""
    rows_ND = numbers(8, WIDTH, seed=rank) * torch.logspace(-12, 12, 8, dtype=torch.float64)[:, None]
    rows_ND[2] = 0.0
    splits = ((8 // WORLD,) * WORLD,) * (len(exchange.sizes) + 1)
    plain, narrow = (Trip(exchange=replace(exchange, wire=w), splits=splits) for w in (None, wire))
    found = []
    for trip, by_hand in ((narrow, False), (plain, True)):
        x_ND = rows_ND.clone().requires_grad_()
        y_RD = exchange_rows(trip, cast(x_ND, wire) if by_hand else x_ND)
        d_RD = numbers(8, WIDTH, seed=50 + rank) * 1e-9
        y_RD.backward(cast(d_RD, wire) if by_hand else d_RD)
        assert x_ND.grad is not None
        found += [y_RD.detach(), x_ND.grad]
    same = rows_ND.to(wire)
    broken = rows_ND.clone()
    broken[1, 0], broken[5, 1] = torch.inf, torch.nan
    found += [exchange_rows(narrow, same), exchange_rows(plain, same)]
    found += [exchange_rows(narrow, broken).isfinite(), exchange_rows(plain, broken).isfinite()]
    exact = Trip(exchange=narrow.exchange, splits=splits, exact=True)
    return [*found, exchange_rows(exact, rows_ND), exchange_rows(plain, rows_ND)]


def cast(rows_ND: Tensor, wire: torch.dtype) -> Tensor:
    """By hand: bf16 as it is; fp16 relative to the power of two that is at least the row's largest value."""
    if wire == torch.bfloat16:
        return rows_ND.to(wire).to(rows_ND.dtype)
    rounded = [
        row if not row.any() else (row / scale).half().double() * scale
        for row in rows_ND.detach()
        for scale in (2.0 ** (1 + row.abs().max().clamp_min(1e-300).log2().floor()),)
    ]
    return torch.stack(rounded) + (rows_ND - rows_ND.detach())  # the gradient passes


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(WORLD, carry_rows, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", ["flat", "flat background", "hierarchical", "hierarchical background"])
@pytest.mark.parametrize("name", COUNTS)
def test_rows_arrive_in_the_order_of_ranks_and_come_home(
    carried: list[dict[str, Any]], name: str, way: str
) -> None:
    for rank, found in enumerate(carried):
        got, flat_one = found[f"{name} {way}"], found[f"{name} flat"]
        mine = range(NUM_LOCAL * rank, NUM_LOCAL * (rank + 1))
        wanted = [
            [source, expert]
            for source in range(WORLD)
            for expert in mine
            for _ in range(COUNTS[name](source, expert))
        ]
        assert got["there"][:, :2].tolist() == wanted
        factor = torch.tensor(
            [
                expert // NUM_LOCAL + 2.0
                for expert in range(NUM_EXPERTS)
                for _ in range(COUNTS[name](rank, expert))
            ]
        )
        assert got["home"].shape == (len(factor), WIDTH)
        assert torch.allclose(got["grad"], 2 * got["home"] * factor[:, None], rtol=1e-15, atol=0)
        assert all(torch.equal(got[key], flat_one[key]) for key in flat_one)


@pytest.mark.parametrize("name", COUNTS)
def test_messages_and_bytes_between_ranks(carried: list[dict[str, Any]], name: str) -> None:
    """One exchange of counts and four of rows: there, home, and both gradients."""
    rows = [
        [
            sum(COUNTS[name](source, NUM_LOCAL * target + local) for local in range(NUM_LOCAL))
            for target in range(WORLD)
        ]
        for source in range(WORLD)
    ]
    row_bytes, count_bytes = 8 * WIDTH, 8 * NUM_LOCAL
    for rank, found in enumerate(carried):
        messages, num_bytes = found[f"{name} flat traffic"]
        others = [peer for peer in range(WORLD) if peer != rank]
        assert messages == dict.fromkeys(others, 5)
        assert num_bytes == {
            peer: count_bytes + 2 * row_bytes * (rows[rank][peer] + rows[peer][rank]) for peer in others
        }
        messages, num_bytes = found[f"{name} hierarchical traffic"]
        neighbour, partner = rank ^ 1, rank ^ 2
        assert messages == {neighbour: 5, partner: 5}, "one message to the other node, not two"
        # Over the node's border go the rows of both of its ranks to the partner, and the partner's for both.
        sent = rows[rank][partner] + rows[neighbour][partner]
        returned = rows[partner][rank] + rows[partner ^ 1][rank]
        assert num_bytes[partner] == 2 * count_bytes + 2 * row_bytes * (sent + returned)
        # Inside the node: what is for the neighbour and for the neighbour's partner.
        sent = rows[rank][neighbour] + rows[rank][neighbour ^ 2]
        returned = rows[neighbour][rank] + rows[neighbour][partner]
        assert num_bytes[neighbour] == 2 * count_bytes + 2 * row_bytes * (sent + returned)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["flat", "hierarchical"])
def test_rows_on_the_wire_are_those_cast_by_hand(
    carried: list[dict[str, Any]], kind: str, wire: torch.dtype
) -> None:
    for found in carried:
        rows, grad, hand, hand_grad, same, as_it_was, finite, wanted, exact, unchanged = found["wire"][
            kind, wire
        ]
        assert torch.equal(rows, hand)
        assert torch.equal(grad, hand_grad)
        assert not torch.equal(rows, unchanged), "nothing was rounded"
        assert grad.abs().max() > 0, "small gradients arrive"
        assert torch.equal(same, as_it_was)
        assert (finite.all(1) == wanted.all(1)).all(), (
            "what is not finite stays so, and nothing else becomes it"
        )
        assert torch.equal(exact, unchanged)


# ------------------------------------------------------------------------------------------- layers
KINDS: dict[str, dict[str, Any]] = {
    "ragged": {"dispatcher": "all_to_all"},
    "padded hidden": {"dispatcher": "padded", "save": "hidden"},
    "top 3": {"dispatcher": "all_to_all", "router": "topk", "top_k": 3, "losses": {}},
    "modules": {"dispatcher": "all_to_all"},
    "soft": {"router": {"name": "soft", "slots": 2}, "allow_non_causal": True, "losses": {}},
}
WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "hierarchical": HIERARCHICAL,
    "shared": {"overlap_shared": True},
    "two parts": {"overlap_chunks": 2},
    "three parts": {"overlap_chunks": 3},
    "hierarchical, three parts": {"overlap_chunks": 3, **HIERARCHICAL},
}
BATCHES = ("real", "all invalid", "rank 1 invalid", "one expert")


def batches(kind: str) -> tuple[str, ...]:
    return BATCHES if kind in ("ragged", "padded hidden") else BATCHES[:2]


def make_layer(kind: str, mesh: ExpertMesh) -> MoELayer:
    moe = MoEConfig.model_validate(
        {"num_experts": NUM_EXPERTS, "router": "gshard_top2", "min_capacity": 1, **KINDS[kind]}
        | ({} if kind == "soft" else {"capacity_factor": 0.9})
    )
    experts = None
    if kind == "modules":
        first = NUM_LOCAL * mesh.ep_rank
        modules = [nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LOCAL)]
        experts = ModuleExperts(modules, num_experts=NUM_EXPERTS, first_expert=first)
    layer = build_moe_layer(moe, d_model=WIDTH, d_ff=5, experts=experts).double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(numbers(*parameter.shape, seed=seed))
    shard_experts(layer, mesh)
    take_over(layer, "test")
    return layer


def outcome(layer: MoELayer, batch: str, rank: int) -> dict[str, Tensor]:
    x_BSD = numbers(2, 9, WIDTH, seed=rank + 7)
    valid_BS = torch.arange(18).view(2, 9) % 7 != 3
    if batch == "all invalid" or (batch == "rank 1 invalid" and rank == 1):
        valid_BS = torch.zeros_like(valid_BS)
    if batch == "one expert":
        x_BSD = x_BSD[:1, :1].expand(2, 9, WIDTH).clone()
    ctx = TokenContext(valid_BS=valid_BS, sample_B=torch.arange(2) + 10 * rank)
    shared_DD = numbers(WIDTH, WIDTH, seed=3).requires_grad_()
    x_BSD.requires_grad_()
    layer.zero_grad()
    y_BSD, report = layer(x_BSD, ctx, lambda x: x @ shared_DD)
    (y_BSD.square().sum() + sum(report.losses.values())).backward()
    found = {"y": y_BSD.detach(), "d_x": x_BSD.grad, "d_shared": shared_DD.grad}
    found |= {f"d_{name}": p.grad for name, p in layer.named_parameters()}
    assert all(value is not None for value in found.values())
    if layer.moe.router.name != "soft":
        assert_halves(layer, x_BSD.detach(), ctx)
    if batch == "real":
        layer.eval()
        with torch.no_grad():
            found["dropless"] = layer(x_BSD, ctx)[0]
        layer.train()
    return found  # type: ignore[return-value]


@torch.no_grad()
def assert_halves(layer: MoELayer, x_BSD: Tensor, ctx: TokenContext) -> None:
    """``dispatch`` and ``combine`` with the experts in between are ``apply``, in however many parts rows travel."""
    limits = layer.limits(x_BSD)
    routing, x_TD = layer.router(x_BSD, ctx, limits), x_BSD.flatten(0, 1)
    whole_TD, plan = layer.dispatcher.apply(x_TD, routing, limits, layer.experts)
    batch, _ = layer.dispatcher.dispatch(x_TD, routing, limits, plan)
    assert batch.tokens_per_expert_L.shape == (NUM_LOCAL,)
    halves_TD = layer.dispatcher.combine(layer.experts(batch), routing, plan)
    assert torch.allclose(halves_TD, whole_TD, rtol=0, atol=1e-12)


def pass_layers(rank: int) -> dict[tuple[str, str, str], dict[str, Tensor]]:
    place = runtime.start("cpu", HANGS_S)
    meshes = {way: build_mesh(place, WORLD, ParallelConfig(**options)) for way, options in WAYS.items()}
    assert [mesh.exchange.sizes for mesh in meshes.values()].count((PER_NODE, WORLD // PER_NODE)) == 2
    found = {}
    for kind in KINDS:
        for way, mesh in meshes.items():
            layer = make_layer(kind, mesh)
            for batch in batches(kind):
                found[kind, way, batch] = outcome(layer, batch, rank)
    return found


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Tensor]]]:
    return run_ranks(WORLD, pass_layers, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "flat"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_do_not_notice(passed: list[dict[Any, dict[str, Tensor]]], kind: str, way: str) -> None:
    """Bit for bit the flat layer, or that of as many parts; parts change the order of a token's sum, and no more."""
    for found in passed:
        for batch in batches(kind):
            wanted, got = found[kind, "flat", batch], found[kind, way, batch]
            if way in ("hierarchical", "shared"):
                assert [key for key in wanted if not torch.equal(got[key], wanted[key])] == []
            if way.startswith("hierarchical, "):
                same = found[kind, way.removeprefix("hierarchical, "), batch]
                assert [key for key in same if not torch.equal(got[key], same[key])] == []
            for key, value in wanted.items():
                torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12)
        assert (found[kind, way, "real"]["y"] != found[kind, way, "all invalid"]["y"]).any()


# ------------------------------------------------------------------------------------------- order
class Noted(torch.autograd.Function):
    """The work of one part's experts, written down."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, log: list[str], part: int) -> Tensor:
        ctx.log, ctx.part = log, part
        log.append(f"compute {part}")
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.log.append(f"compute {ctx.part}")
        return grads[0], None, None


class Step(nn.Module):
    def __init__(self, log: list[str], part: int) -> None:
        super().__init__()
        self.log, self.part = log, part

    def forward(self, rows: Tensor) -> Tensor:
        noted: Tensor = Noted.apply(rows, self.log, self.part)
        return noted


class Waited:
    def __init__(self, work: Any, log: list[str], name: str) -> None:
        self.work, self.log, self.name = work, log, name

    def wait(self) -> None:
        self.log.append(f"{self.name} is there")
        self.work.wait()


def write_down(rank: int) -> tuple[list[str], list[str]]:
    mesh = build_mesh(runtime.start("cpu", HANGS_S), 2, ParallelConfig(overlap_chunks=3))
    log: list[str] = []
    experts = ModuleExperts(
        [Step(log, part) for part in range(3)], num_experts=2 * 3, first_expert=3 * mesh.ep_rank
    )
    moe = MoEConfig.model_validate({"num_experts": 6, "router": "topk", "dispatcher": "padded", "losses": {}})
    layer = build_moe_layer(moe, d_model=WIDTH, experts=experts).double()
    shard_experts(layer, mesh)
    take_over(layer, "test")
    send, count = dist.all_to_all_single, iter(range(99))

    def noted(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        name = f"trip {next(count)}"
        log.append(name)
        return Waited(send(*args, async_op=async_op, **kwargs), log, name)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dist, "all_to_all_single", noted)
        y_BSD, _ = layer(
            numbers(2, 6, WIDTH, seed=rank).requires_grad_(),
            beside=lambda x: Noted.apply(x, log, "shared"),  # type: ignore[no-any-return]
        )
        forward = log.copy()
        log.clear()
        y_BSD.sum().backward()
    return forward, log


def test_one_part_travels_while_another_is_computed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trips 0, 1, 3 go there, 2, 4, 5 home; in the backward pass the gradients of 5, 4, 2 and of 3, 1, 0."""
    forward = """trip 0, compute shared, trip 0 is there, trip 1, compute 0, trip 2, trip 1 is there, trip 3,
        compute 1, trip 2 is there, trip 4, trip 3 is there, compute 2, trip 4 is there, trip 5, trip 5 is there"""
    backward = """trip 6, trip 6 is there, trip 7, compute 2, trip 8, trip 7 is there, trip 9, compute 1,
        trip 8 is there, trip 10, trip 9 is there, compute 0, trip 10 is there, trip 11, compute shared,
        trip 11 is there"""
    for found in run_ranks(2, write_down, tmp_path_factory.mktemp("ranks")):
        assert [", ".join(log).split() for log in found] == [forward.split(), backward.split()]


# ------------------------------------------------------------------------------------------- nodes
def choose(rank: int) -> dict[str, Any]:
    place = runtime.start("cpu", HANGS_S)
    found: dict[str, Any] = {}
    for name, ep_size, ranks_per_node, sizes in (
        ("auto", 4, "auto", (2, 2, 2, 2)),
        ("inside a node", 2, 2, None),
        ("one rank a node", 4, 1, None),
        ("one node", 4, 9, None),
        ("cut", 2, 3, None),
        ("uneven", 4, "auto", (3, 3, 3, 1)),
        ("alone", 1, 2, None),
    ):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if sizes is not None:
                monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sizes[rank]))
                monkeypatch.setenv("LOCAL_RANK", str(rank % sizes[rank]))
            try:
                parallel = ParallelConfig(exchange="hierarchical", ranks_per_node=ranks_per_node)
                mesh = build_mesh(place, ep_size, parallel)
                found[name] = (mesh.exchange.sizes, flat_after_all(mesh))
            except ConfigError as error:
                found[name] = str(error)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", str(rank // 2))  # dealt out like cards
        with pytest.raises(ConfigError, match="rank 1 is number 0 on its node, and with 2 ranks on each it"):
            build_mesh(place, 4, ParallelConfig(exchange="hierarchical"))
    return found


def test_nodes_are_found_or_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    for found in run_ranks(WORLD, choose, tmp_path_factory.mktemp("ranks")):
        assert found["auto"] == ((2, 2), None)
        assert found["inside a node"][0] == (2,)
        assert "all on one node" in found["inside a node"][1]
        assert found["one rank a node"][0] == found["one node"][0] == (4,)
        assert found["alone"] == ((1,), "which is the same: every rank holds all experts")
        assert "ranks_per_node=3 must divide the world size 4; valid values: 1, 2, 4" in found["cut"]
        assert "the nodes have between 1 and 3 ranks" in found["uneven"]


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, 8),
        ({"LOCAL_SIZE": "2", "SLURM_STEP_TASKS_PER_NODE": "4"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3),
    ],
)
def test_ranks_of_this_node_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], ranks: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.local_world_size() == ranks
