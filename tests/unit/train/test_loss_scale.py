"""The loss scale as a value: when it changes, and what a checkpoint keeps of it."""

from __future__ import annotations

import pytest

from epmoe.train import loss_scale
from epmoe.train.loss_scale import LossScale, new_loss_scale, restored_scale, scale_numbers


def test_only_float16_has_one() -> None:
    assert new_loss_scale("fp16_autocast") == LossScale(factor=65536.0, good_steps=0)
    assert [new_loss_scale(name) for name in ("fp32", "bf16_autocast", "bf16_params", "fp64")] == [None] * 4


def test_it_halves_down_to_one_and_starts_counting_anew() -> None:
    scale = LossScale(factor=4.0, good_steps=7)
    seen = []
    for _ in range(4):
        assert scale.can_shrink is (scale.factor > 1)
        scale = scale.after_overflow()
        seen.append((scale.factor, scale.good_steps))
    assert seen == [(2.0, 0), (1.0, 0), (1.0, 0), (1.0, 0)]


def test_it_doubles_after_enough_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scale, seen = LossScale(factor=2.0**22), []
    for _ in range(10):
        scale = scale.after_update()
        seen.append(scale.factor / 2**22)
    assert seen == [1, 1, 2, 2, 2, 4, 4, 4, 4, 4], "2**24 is the largest"


@pytest.mark.parametrize("precision", ["fp16_autocast", "fp32"])
def test_a_checkpoint_brings_it_back_where_it_is_needed(precision: str) -> None:
    scale = LossScale(factor=512.0, good_steps=12)
    numbers = {"skipped": 3, **scale_numbers(scale)}
    assert restored_scale(precision, numbers) == (scale if precision == "fp16_autocast" else None)
    assert numbers == {"skipped": 3}
    assert restored_scale("fp16_autocast", {"skipped": 3}) == LossScale(), "the run was of another precision"
    assert scale_numbers(None) == {}
