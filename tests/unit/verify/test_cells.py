"""Which cells there are, which are chosen, and what each is compared with."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from epmoe.cli import main
from epmoe.config import Config, MoEConfig, ParallelConfig
from epmoe.config_file import load_config
from epmoe.errors import ConfigError
from epmoe.verify.cases import (
    PLAIN,
    Cell,
    Plan,
    axes,
    cell_config,
    covering,
    layouts,
    make_plan,
    problem,
    reference_of,
    usable_cells,
)
from epmoe.verify.small_config import Subject, make_subject

CONFIGS = Path(__file__).parents[3] / "configs"


def subject(world_size: int = 4, **moe: Any) -> Subject:
    return make_subject(Config(moe=MoEConfig(**moe)), world_size, "small", ranks_per_node=2)


def cell(one: Subject, world_size: int, ep_size: int, accumulation: int = 1) -> Cell:
    return replace(usable_cells(one, world_size, ep_size)[0], accumulation=accumulation)


def test_every_divisor_of_the_ranks_with_every_ep_size():
    assert layouts(subject(4)) == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    assert layouts(subject(6, num_experts=4)) == [(1, 1), (2, 1), (2, 2), (3, 1), (6, 1), (6, 2)]


def test_every_axis_is_plain_somewhere_and_its_values_are_those_of_the_schema():
    found = axes(Config())
    assert all(PLAIN[key] in values or key == "moe.dispatcher" for key, values in found.items())
    assert "native" in found["parallel.engine"]
    assert set(found["parallel.exchange"]) == {"flat", "hierarchical"}
    assert "moe.dispatcher" not in axes(Config(moe=None))


def pairs(cells: list[Cell]) -> set[Any]:
    found: set[Any] = set()
    for one in cells:
        values = [("layout", (one.world_size, one.ep_size)), ("precision", one.precision), *one.settings]
        found |= set(itertools.combinations([*values, ("accumulation", one.accumulation)], 2))
    return found


def test_the_covering_set_has_every_pair_and_is_much_smaller():
    one = subject(4, shared_experts=1)
    plan = make_plan(one, full=True, precisions=("fp64", "fp32"))
    everything = [c for c in plan.cells if c.scenario == "parity"]
    chosen = covering(everything)
    assert pairs(chosen) == pairs(everything)
    assert len(everything) == plan.num_possible > 4 * len(chosen)
    assert set(chosen) <= set(make_plan(one, full=False, precisions=("fp64", "fp32")).cells)


def test_what_does_not_exist_is_listed_with_its_reason():
    left_out = make_plan(subject(4, capacity_factor=None), full=False, precisions=("fp64",)).left_out
    reasons = "\n".join(left_out)
    assert "padded dispatch needs moe.capacity_factor" in reasons
    assert "no shared experts" in reasons
    assert "hierarchical is flat" in reasons
    assert min(left_out.values()) > 0


def with_deepspeed(engine: str) -> Subject:
    config = Config(moe=MoEConfig(shared_experts=1), parallel=ParallelConfig(engine=engine))  # type: ignore[arg-type]
    return replace(make_subject(config, 4, "small", ranks_per_node=2), no_deepspeed=None)


def of_deepspeed(plan: Plan, scenario: str = "parity") -> list[Cell]:
    return [c for c in plan.cells if c.engine == "deepspeed" and c.scenario == scenario]


def test_what_asks_for_deepspeed_is_covered_with_it():
    plan = make_plan(with_deepspeed("deepspeed"), full=False, precisions=("fp64", "fp32"))
    cells = of_deepspeed(plan)
    stages = {((c.world_size, c.ep_size), dict(c.settings)["parallel.zero_stage"]) for c in cells}
    assert stages == set(itertools.product(layouts(subject(4)), (0, 1, 2)))
    assert {c.precision for c in cells} == {"fp32"}
    assert of_deepspeed(plan, "half_empty")[1].how == "deepspeed, zero_stage 1"
    assert len(of_deepspeed(plan, "overflow")) == 5
    assert any("deepspeed knows no train.precision=fp64" in reason for reason in plan.left_out)


def test_what_does_not_ask_for_deepspeed_gets_two_cells_of_it_and_all_in_the_whole_matrix():
    one = with_deepspeed("native")
    first, second = of_deepspeed(make_plan(one, full=False, precisions=("fp64", "fp32")))
    everything = make_plan(one, full=True, precisions=("fp64", "fp32"))
    assert {first, second} < set(of_deepspeed(everything))
    same = {key for key, _ in set(first.settings) & set(second.settings)}
    assert same == {"parallel.engine", "parallel.fsdp_shard"}
    assert (first.world_size, first.ep_size) != (second.world_size, second.ep_size)
    assert first.accumulation != second.accumulation
    assert of_deepspeed(everything, "half_empty")


def test_without_deepspeed_its_cells_are_left_out_by_name():
    one = replace(with_deepspeed("deepspeed"), no_deepspeed="it is not installed")
    plan = make_plan(one, full=False, precisions=("fp64", "fp32"))
    assert not of_deepspeed(plan)
    assert not of_deepspeed(plan, "half_empty")
    assert plan.left_out["engine: deepspeed cannot run here: it is not installed"] > 0


def test_hierarchical_exists_where_an_ep_group_spans_nodes():
    one = subject(4)
    for world_size, ep_size in layouts(one):
        settings = tuple({**PLAIN, "parallel.exchange": "hierarchical"}.items())
        settings = tuple((key, value) for key, value in settings if key in axes(one.config))
        wanted = Cell(
            world_size=world_size, ep_size=ep_size, accumulation=1, precision="fp64", settings=settings
        )
        assert (problem(one, wanted) is None) == ((world_size, ep_size) == (4, 4))


@pytest.mark.parametrize(
    ("moe", "accumulation"),
    [
        ({}, 1),
        ({"group": "rank"}, 8),
        ({"balance_scope": "micro_batch"}, 8),
        ({"balance_scope": "global"}, 2),
        ({"losses": {"importance": 0.1}}, 8),
    ],
)
def test_one_process_computes_the_same_micro_batches_where_they_matter(
    moe: dict[str, Any], accumulation: int
):
    one = subject(4, **moe)
    reference = reference_of(one, cell(one, 4, 2, accumulation=2))
    assert (reference.world_size, reference.ep_size, reference.accumulation) == (1, 1, accumulation)
    config = cell_config(one, reference)
    assert config.train.global_batch_size == accumulation * (config.train.micro_batch_size or 0)


def test_two_rules_that_no_single_process_can_follow():
    one = subject(4, group="rank", balance_scope="global")
    with pytest.raises(ConfigError, match="no single process"):
        reference_of(one, cell(one, 4, 2))


def test_the_router_and_its_neighbourhood_stay_as_they_are():
    config = load_config_of("quickstart.yaml")
    small = make_subject(config, 4, "small", ranks_per_node=2).config
    assert small.moe is not None
    assert config.moe is not None
    changed = {"d_ff", "every", "first_dense", "num_experts"}
    assert small.moe.model_dump(exclude=changed) == config.moe.model_dump(exclude=changed)
    assert small.moe.every <= small.model.num_layers == 2


def test_many_experts_become_fewer_and_keep_every_layout():
    few = subject(4, num_experts=64)
    assert few.num_experts == 8
    assert subject(16, num_experts=64).num_experts == 16
    assert subject(64, num_experts=64).num_experts == 64
    assert subject(4, num_experts=64, top_k=8, router="topk").num_experts == 16
    assert "8 of 64 experts" in few.changes[-1]


def test_as_is_keeps_the_model():
    config = load_config_of("quickstart.yaml")
    kept = make_subject(config, 4, "as_is", ranks_per_node=2)
    assert kept.config.model == config.model
    assert kept.config.moe == config.moe
    assert kept.vocab_size == 4096


def load_config_of(name: str) -> Config:
    return load_config(CONFIGS / name)


@pytest.mark.parametrize(
    ("launched", "arguments", "words"),
    [
        (False, ["--ranks", "4", "parallel.ep_size=3"], "valid values: 1, 2, 4"),
        (True, ["--ranks", "4"], "leave --ranks out"),
        (True, [], "only one layout"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_anything_starts(
    launched: bool,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as end:
        main(["verify", str(CONFIGS / "quickstart.yaml"), *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
