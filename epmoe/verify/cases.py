"""What is measured: cells, each a layout with a way to compute in it. The axes come from the schema of the config.

A line in ``AXES`` adds an axis; a value that is added to the schema of one of them joins by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from epmoe.config import Config, MoEConfig, choose_node_size
from epmoe.config_file import check_layout
from epmoe.errors import ConfigError
from epmoe.verify.small_config import Subject

Value = str | int | bool
Scenario = Literal["parity", "half_empty", "one_token", "overflow", "balance", "task_only"]

AXES: dict[str, tuple[Value, ...]] = {
    "parallel.engine": (),
    "parallel.fsdp_shard": (),
    "parallel.zero_stage": (),
    "moe.dispatcher": ("all_to_all", "padded"),
    "parallel.exchange": (),
    "parallel.overlap_chunks": (1, 2),
    "parallel.overlap_shared": (False, True),
    "train.recompute": (),
}
"""Key -> values; () = all that the schema has, none where it does not have the key."""
PLAIN: dict[str, Value] = {
    "parallel.engine": "native",
    "parallel.fsdp_shard": "full",
    "parallel.zero_stage": 1,
    "moe.dispatcher": "auto",
    "parallel.exchange": "flat",
    "parallel.overlap_chunks": 1,
    "parallel.overlap_shared": False,
    "train.recompute": "none",
}
"""How one process computes what all are compared with."""
OF_ONE_ENGINE = {"parallel.fsdp_shard": "fsdp", "parallel.zero_stage": "deepspeed"}
"""Keys that mean nothing to the other engines."""
FEW_OF_DEEPSPEED = 2
"""Cells of it for a configuration with another engine."""
DEEPSPEED_EDGES: tuple[Scenario, ...] = ("half_empty", "overflow")
"""Its scenarios: what may leave it without a gradient."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples, without their whole part, fill the unit interval evenly."""
PER_MICRO_BATCH = ("importance", "load", "device_balance", "communication_balance")
"""Losses that want balance inside each rank's micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One layout, and how it computes."""

    world_size: int
    ep_size: int
    accumulation: int
    """Micro-batches per step."""
    precision: Literal["fp64", "fp32"]
    settings: tuple[tuple[str, Value], ...]
    """Value of every axis."""
    scenario: Scenario = "parity"

    @property
    def engine(self) -> Value:
        """Who holds weights, gradients and optimizer state."""
        return dict(self.settings)["parallel.engine"]

    @property
    def how(self) -> str:
        """What is not plain about it."""
        special = (
            (key.partition(".")[2], value)
            for key, value in self.settings
            if value != PLAIN[key] or (key, self.engine) == ("parallel.zero_stage", "deepspeed")
        )
        return ", ".join(name if value is True else _words(name, value) for name, value in special) or "plain"

    @property
    def label(self) -> str:
        """One line that names it."""
        return (
            f"({self.world_size},{self.ep_size}) {self.how}, accumulation {self.accumulation}, {self.precision}, "
            f"{self.scenario}"
        )


def _words(name: str, value: Value) -> str:
    return value if isinstance(value, str) else f"{name} {value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run, and what there is."""

    cells: tuple[Cell, ...]
    num_possible: int
    """Cells of the whole matrix, without scenarios."""
    left_out: Mapping[str, int]
    """Reason -> number of combinations that do not exist for it."""


# ------------------------------------------------------------------------------------------- configurations
def axes(config: Config) -> dict[str, tuple[Value, ...]]:
    """The axes that this schema has, with their values."""
    found = {}
    for key, values in AXES.items():
        section, _, name = key.partition(".")
        model: Any = getattr(config, section)
        if isinstance(model, BaseModel) and name in type(model).model_fields:
            found[key] = values or tuple(get_args(type(model).model_fields[name].annotation))
    return found


def cell_config(subject: Subject, cell: Cell) -> Config:
    """The configuration of a cell.

    Raises:
        ConfigError: There is no such combination.
    """
    tree = subject.config.model_dump()
    for key, value in cell.settings:
        section, _, name = key.partition(".")
        tree[section][name] = value
    share, rest = divmod(tree["train"]["global_batch_size"], cell.world_size * cell.accumulation)
    if rest:
        raise ConfigError("the sequences of a step do not divide over ranks and micro-batches")
    tree["train"] |= {"micro_batch_size": share, "precision": cell.precision}
    tree["parallel"]["ep_size"] = cell.ep_size
    if cell.scenario == "one_token":
        tree["model"]["dropout"] = 0.0  # or equal tokens would not stay equal
    if cell.scenario == "overflow":
        tree["moe"] |= {"capacity_factor": 0.001, "min_capacity": 1, "capacity_multiple": 1}
    if cell.scenario == "balance":  # large, so that the router's gradient is theirs
        tree["moe"]["losses"] = dict.fromkeys(tree["moe"]["losses"], 100.0)
    if cell.scenario == "task_only":
        tree["moe"]["losses"] = {}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None
    check_layout(config, cell.world_size)
    return config


def reference_of(subject: Subject, cell: Cell) -> Cell:
    """The one-process cell that a cell must equal. Its micro-batches matter only where the model says so.

    Raises:
        ConfigError: There is none.
    """
    accumulation = 1
    if (moe := subject.config.moe) is not None and cell.scenario != "task_only":
        accumulation = _reference_accumulation(moe, cell)
    elif moe is not None and moe.group == "rank":
        accumulation = cell.world_size * cell.accumulation
    settings = tuple((key, PLAIN[key]) for key, _ in cell.settings)
    return Cell(
        world_size=1,
        ep_size=1,
        accumulation=accumulation,
        precision=cell.precision,
        settings=settings,
        scenario=cell.scenario,
    )


def _reference_accumulation(moe: MoEConfig, cell: Cell) -> int:
    """One process that computes the same micro-batches as all ranks do, where capacity or a loss looks at them."""
    by_micro_batch = moe.group == "rank" or any(name in moe.losses for name in PER_MICRO_BATCH)
    by_micro_batch |= "balance" in moe.losses and moe.balance_scope == "micro_batch"
    if "balance" in moe.losses and moe.balance_scope == "global":
        if by_micro_batch and cell.world_size > 1:
            raise ConfigError(
                "no single process computes this: balance_scope global counts over all ranks, and something else "
                "looks at each rank's micro-batch"
            )
        return cell.accumulation
    return cell.world_size * cell.accumulation if by_micro_batch else 1


def problem(subject: Subject, cell: Cell) -> str | None:
    """Why a cell cannot be compared; None when it can."""
    moe, settings = subject.config.moe, dict(cell.settings)
    for key, engine in OF_ONE_ENGINE.items():
        if cell.engine != engine and settings[key] != PLAIN[key]:
            return f"{key} applies only to engine {engine}"
    if cell.engine == "deepspeed" and subject.no_deepspeed is not None:
        return f"engine: deepspeed cannot run here: {subject.no_deepspeed}"
    if moe is not None and settings["moe.dispatcher"] == "padded":
        dropless = moe.capacity_factor is None and cell.scenario != "overflow" and not moe.router.no_capacity
        if dropless:
            return "padded dispatch needs moe.capacity_factor; without one every pass is ragged"
    if settings["parallel.exchange"] == "hierarchical" and not _has_nodes(subject, cell):
        return "where the ranks that share the experts are all on one node, hierarchical is flat"
    if settings["parallel.overlap_shared"] and not (moe is not None and moe.shared_experts):
        return "there are no shared experts to compute while rows travel"
    if cell.scenario == "overflow" and (moe is None or moe.router.no_capacity):
        return "there is no capacity that could overflow"
    if cell.scenario in ("balance", "task_only", "one_token") and moe is None:
        return "a dense model has no router"
    if cell.scenario == "balance" and moe is not None and not moe.losses:
        return "there are no auxiliary losses"
    try:
        cell_config(subject, cell)
        reference_of(subject, cell)
    except ConfigError as error:
        return error.what
    return None


def _has_nodes(subject: Subject, cell: Cell) -> bool:
    size = subject.config.parallel.ranks_per_node
    assert size != "auto"  # make_subject has settled it
    try:
        return choose_node_size(size, cell.world_size, cell.ep_size) not in (1, cell.ep_size)
    except ValueError:
        return True  # a mesh that is impossible, for which check_layout has words


# ------------------------------------------------------------------------------------------- choosing
def layouts(subject: Subject) -> list[tuple[int, int]]:
    """(world size, ep size): every divisor of the ranks at hand, with every ep size it allows."""
    world_sizes = [n for n in range(1, subject.world_size + 1) if subject.world_size % n == 0]
    return [
        (world_size, ep_size)
        for world_size in world_sizes
        for ep_size in range(1, world_size + 1)
        if math.gcd(world_size, subject.num_experts) % ep_size == 0
    ]


def make_plan(subject: Subject, *, full: bool, precisions: Sequence[Literal["fp64", "fp32"]]) -> Plan:
    """The cells to run: the whole matrix, or one in which every pair of values of two axes comes together."""
    left_out: dict[str, int] = {}
    possible = []
    for cell in _matrix(subject, precisions):
        if reason := problem(subject, cell):
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            possible.append(cell)
    chosen = possible if full else _covering_set(subject, possible)
    scenarios = []
    for cell in (*_scenarios(subject), *_edges_of_deepspeed(subject, full=full)):
        if reason := problem(subject, cell):
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            scenarios.append(cell)
    cells = sorted((*chosen, *scenarios), key=lambda cell: cell.world_size)
    return Plan(cells=tuple(cells), num_possible=len(possible), left_out=left_out)


def _matrix(subject: Subject, precisions: Sequence[Literal["fp64", "fp32"]]) -> Iterator[Cell]:
    named = axes(subject.config)
    for (world_size, ep_size), accumulation, precision in itertools.product(
        layouts(subject), (1, 2), precisions
    ):
        for values in itertools.product(*named.values()):
            yield Cell(
                world_size=world_size,
                ep_size=ep_size,
                accumulation=accumulation,
                precision=precision,
                settings=tuple(zip(named, values, strict=True)),
            )


def _scenarios(subject: Subject) -> Iterator[Cell]:
    """Every scenario in every layout of several ranks; engines, other axes and accumulation spread evenly over them."""
    number = 0
    for scenario in get_args(Scenario)[1:]:
        for world_size, ep_size in layouts(subject):
            if world_size > 1:
                cells = usable_cells(subject, world_size, ep_size, scenario)
                yield replace(cells[int(number * GOLDEN % 1 * len(cells))], accumulation=1 + number % 2)
                number += 1


def _edges_of_deepspeed(subject: Subject, *, full: bool) -> Iterator[Cell]:
    """In every layout of several ranks, its stages and accumulation in turn."""
    number = 0
    for scenario in DEEPSPEED_EDGES if full or subject.engine == "deepspeed" else ():
        for world_size, ep_size in layouts(subject):
            if world_size > 1:
                stages = deepspeed_cells(subject, world_size, ep_size, scenario)
                yield replace(stages[number % len(stages)], accumulation=1 + number % 2)
                number += 1


def deepspeed_cells(
    subject: Subject, world_size: int, ep_size: int, scenario: Scenario = "parity"
) -> list[Cell]:
    """Its stages in a layout, else plain; in float32, as it has no float64."""
    named = axes(subject.config)
    plain = {key: PLAIN[key] for key in named} | {"parallel.engine": "deepspeed"}
    return [
        Cell(
            world_size=world_size,
            ep_size=ep_size,
            accumulation=1,
            precision="fp32",
            settings=tuple((plain | {"parallel.zero_stage": stage}).items()),
            scenario=scenario,
        )
        for stage in named["parallel.zero_stage"]
    ]


def usable_cells(
    subject: Subject, world_size: int, ep_size: int, scenario: Scenario = "parity"
) -> list[Cell]:
    """Every combination of the axes that a layout has; all of them where there is none, each with its problem."""
    named = axes(subject.config)
    cells = [
        Cell(
            world_size=world_size,
            ep_size=ep_size,
            accumulation=1,
            precision="fp64",
            settings=tuple(zip(named, values, strict=True)),
            scenario=scenario,
        )
        for values in itertools.product(*named.values())
    ]
    return [cell for cell in cells if problem(subject, cell) is None] or cells


def _covering_set(subject: Subject, possible: Sequence[Cell]) -> list[Cell]:
    """A covering set; where the configuration has another engine, ``FEW_OF_DEEPSPEED`` of it, unlike each other."""
    if subject.engine == "deepspeed":
        return covering(possible)
    others = [cell for cell in possible if cell.engine != "deepspeed"]
    largest_first = [cell for cell in reversed(possible) if cell.engine == "deepspeed"]
    return covering(others) + covering(largest_first)[:FEW_OF_DEEPSPEED]


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Few of the cells in which every pair of values that any of them has comes together. Greedy."""
    pairs = {cell: frozenset(itertools.combinations(_values(cell), 2)) for cell in cells}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs[cell] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def _values(cell: Cell) -> tuple[tuple[str, object], ...]:
    own = [(key, value) for key, value in cell.settings if OF_ONE_ENGINE.get(key, cell.engine) == cell.engine]
    return (
        ("layout", (cell.world_size, cell.ep_size)),
        ("accumulation", cell.accumulation),
        ("precision", cell.precision),
        *own,
    )
