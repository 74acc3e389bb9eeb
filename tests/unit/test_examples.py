"""The examples run, with small settings, and show what they say they show."""

from __future__ import annotations

import pytest
import torch

from epmoe.types import TokenContext
from tests.examples import example


def test_digits(capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is in the extra 'examples'")
    digits = example("digits")
    names = [variant.name for variant in digits.variants()]
    assert len(set(names)) == len(names) == 18
    for only in ("dense, EDD", "sparse, top 2, EDD"):
        digits.main(["--epochs", "6", "--seeds", "1", "--images", "600", "--only", only])
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row[:30].strip() for row in rows] == [name for name in names if only in name]
        assert all(float(row[30:].split("%")[0]) > 60 for row in rows), rows


@pytest.mark.parametrize("part", range(3))
def test_every_row_of_the_digits_trains(part):
    """One step of each, on random images: no package is needed for that."""
    digits = example("digits")
    images_TD = torch.rand(32, 64, generator=torch.Generator().manual_seed(1))
    label_T = torch.arange(32) % 10
    for variant in digits.variants()[part::3]:
        layer = digits.build(variant, 3, seed=0)
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        digits.train(layer, variant, images_TD, label_T, epochs=1, seed=0)
        assert not torch.equal(layer.router.weight, before[0]), variant.name
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
        assert 0 <= digits.accuracy(layer, images_TD, label_T)[0] <= 1


def test_regions(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="Pillow is in the extra 'examples'")
    path = tmp_path / "regions.gif"
    arguments = ["--steps", "60", "--frames", "4", "--size", "24", "--points", "80", "--out", str(path)]
    example("regions").main(arguments)
    assert "4 pictures" in capsys.readouterr().out
    with image.open(path) as animation:
        assert (animation.n_frames, animation.size) == (4, (384, 384))
        pictures = []
        for number in (0, 3):
            animation.seek(number)
            pictures.append(animation.convert("RGB").tobytes())
    assert pictures[0] != pictures[1], "the regions moved"


def test_regions_are_learnt():
    regions = example("regions")
    layer = regions.build(2)
    x_T3, class_T = regions.points(200, 0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    first = regions.judge(layer, x_T3, class_T)
    for _ in range(150):
        regions.step(layer, optimizer, x_T3, class_T)
    right, agrees = regions.judge(layer, x_T3, class_T)
    assert right > 0.8 > first[0]
    assert agrees > 0.9


def test_lstm_counts_nothing_twice(capsys):
    lstm = example("lstm_lm")
    text = bytes(range(32, 127)) * 8
    outcomes, weights = [], []
    for recompute in (True, False):
        model = lstm.LSTMWithExperts(16, 4, recompute=recompute, seed=1)
        outcomes.append(lstm.train(model, text, steps=25, batch=4, length=12, seed=3))
        weights.append([parameter.detach() for parameter in model.parameters()])
    assert outcomes[0] == outcomes[1]
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)
    assert outcomes[0].bytes_seen == 25 * 4 * 12
    assert outcomes[0].assignments == 2 * outcomes[0].bytes_seen
    assert outcomes[0].bits[-1] < outcomes[0].bits[0] - 0.3
    lstm.main(["--steps", "2", "--width", "16", "--length", "8", "--batch", "2"])
    assert "32 bytes in, 64 trips" in capsys.readouterr().out


def test_lstm_really_recomputes():
    lstm = example("lstm_lm")
    passes = []
    for recompute in (True, False):
        model = lstm.LSTMWithExperts(8, 4, recompute=recompute, seed=1)
        model.moe.router.register_forward_hook(lambda *_, kept=recompute: passes.append(kept))
        byte_BS = torch.arange(10).view(2, 5)
        logits_BSV, _ = model(byte_BS, TokenContext(sample_B=torch.arange(2)))
        logits_BSV.sum().backward()
    assert passes.count(True) == 2
    assert passes.count(False) == 1
