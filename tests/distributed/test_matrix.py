"""Every layout with every engine and exchange, ragged and padded, against one process: gradients, norm, clip, weights.

The cells are those of ``epmoe verify --full`` on the quickstart's model, without the axes that only hide time or memory
(overlap, recomputation), which have tests of their own. Samples are of unequal length, and some ranks have no token.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from epmoe.config_file import load_config
from epmoe.verify.cases import PLAIN, Cell, make_plan
from epmoe.verify.proof import prove
from epmoe.verify.small_config import Subject, make_subject
from epmoe.verify.subjobs import assemble
from tests.distributed.harness import run_ranks
from tests.patience import HANGS_S

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))
ENGINES = (("native", "full"), ("fsdp", "full"), ("fsdp", "hybrid"))
ELSEWHERE = ("parallel.overlap_chunks", "parallel.overlap_shared", "train.recompute")


def subject() -> Subject:
    return make_subject(load_config(CONFIG, []), 4, "small", ranks_per_node=2)


def way_of(cell: Cell) -> tuple[object, ...]:
    settings = dict(cell.settings)
    keys = ("parallel.engine", "parallel.fsdp_shard", "moe.dispatcher", "parallel.exchange")
    return (
        cell.world_size,
        cell.ep_size,
        cell.accumulation,
        cell.precision,
        *(settings[key] for key in keys),
    )


def prove_all(rank: int) -> dict[str, Any]:
    whole = make_plan(subject(), full=True, precisions=("fp64", "fp32"))
    cells = [
        cell
        for cell in whole.cells
        if cell.scenario == "parity" and all(dict(cell.settings)[key] == PLAIN[key] for key in ELSEWHERE)
    ]
    plan = replace(whole, cells=tuple(cells))
    verdict = prove(assemble("cpu", HANGS_S, same="{}"), subject(), plan, lambda *_: None, shared=None)
    assert len(verdict.rows) == len(cells), verdict.notes
    return {"ways": {way_of(cell) for cell in cells}, "violations": verdict.violations}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_matrix(tmp_path: Path) -> None:
    found = run_ranks(4, prove_all, tmp_path, timeout=280)[0]
    assert found["violations"] == ()
    wanted = {
        (*layout, accumulation, precision, *engine, dispatcher, exchange)
        for layout, accumulation, precision, engine, dispatcher, exchange in itertools.product(
            LAYOUTS, (1, 2), ("fp64", "fp32"), ENGINES, ("all_to_all", "padded"), ("flat", "hierarchical")
        )
        if exchange == "flat" or layout == (4, 4)  # elsewhere the ranks that share experts are on one node
    }
    assert wanted <= found["ways"]
