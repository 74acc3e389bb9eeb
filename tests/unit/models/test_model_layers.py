"""RMSNorm, SwiGLU and keyed dropout against loops."""

import math

import pytest
import torch
from torch import Tensor

from epmoe.errors import EpmoeError
from epmoe.models.layers import Embedding, KeyedDropout, Linear, RMSNorm, SwiGLU
from epmoe.types import TokenContext


def norm_with(weight_D: Tensor, eps: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(weight_D.numel(), eps).to(weight_D.dtype)
    norm.weight.data.copy_(weight_D)
    return norm


def test_rms_norm_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    weight_D = torch.randn(5, dtype=torch.float64, generator=generator)
    got_TD = norm_with(weight_D, eps=0.1)(x_TD).detach()
    for t in range(3):
        mean_square = sum(float(v) ** 2 for v in x_TD[t]) / 5
        for d in range(5):
            expected = float(x_TD[t, d]) / math.sqrt(mean_square + 0.1) * float(weight_D[d])
            assert float(got_TD[t, d]) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_takes_its_mean_in_float32(dtype: torch.dtype) -> None:
    x_TD = torch.tensor([[1000.0, -2000.0, 3000.0, 4000.0]], dtype=dtype)  # squares overflow float16
    got_TD = norm_with(torch.ones(4, dtype=dtype))(x_TD)
    assert got_TD.dtype == dtype
    wide_TD = x_TD.double()
    expected_TD = wide_TD / wide_TD.square().mean().sqrt()
    torch.testing.assert_close(got_TD, expected_TD.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_rms_norm_uses_a_wide_weight_at_full_width() -> None:
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(8, 64, generator=generator).bfloat16()
    norm = norm_with(torch.rand(64, generator=generator) + 0.5)
    wide_TD = x_TD.double()
    expected_TD = wide_TD / (wide_TD.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    # Half a unit in the last place of bfloat16: one rounding, at the very end.
    torch.testing.assert_close(norm(x_TD).double(), expected_TD, rtol=2**-8 * 1.001, atol=0)


def test_gradients_of_norm_and_feed_forward() -> None:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    ffn = SwiGLU(4, 6).double()
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    assert torch.autograd.gradcheck(norm_with(torch.rand(4, dtype=torch.float64)), (x_TD,))
    assert torch.autograd.gradcheck(ffn, (x_TD,))


def test_swiglu_gates_with_silu() -> None:
    ffn = SwiGLU(2, 3).double()
    for i, parameter in enumerate(ffn.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    x_D = torch.tensor([0.3, -1.2], dtype=torch.float64)
    gate_F, up_F = ffn.gate_proj.weight @ x_D, ffn.up_proj.weight @ x_D
    hidden_F = torch.stack([g / (1 + torch.exp(-g)) * u for g, u in zip(gate_F, up_F, strict=True)])
    torch.testing.assert_close(ffn(x_D), ffn.down_proj.weight @ hidden_F)


def test_building_layers_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Linear(4, 4), Embedding(4, 4), SwiGLU(4, 8)
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_does_not_depend_on_the_batch_split() -> None:
    dropout = KeyedDropout(0.3, site=3, seed=7)
    x_BSD = torch.ones(4, 6, 16)
    sample_B = torch.tensor([11, 2**33, 5, 8])
    whole_BSD = dropout(x_BSD, TokenContext(sample_B=sample_B))
    for rows in ([0], [1, 2], [3, 0]):
        part_BSD = dropout(x_BSD[rows], TokenContext(sample_B=sample_B[rows]))
        assert torch.equal(part_BSD, whole_BSD[rows])
    assert torch.equal(dropout(x_BSD[:, :4], TokenContext(sample_B=sample_B)), whole_BSD[:, :4])


def test_dropout_differs_by_sample_position_site_and_seed() -> None:
    x_BSD = torch.ones(2, 2, 64)
    ctx = TokenContext(sample_B=torch.tensor([1, 2]))
    masks_BSD = [KeyedDropout(0.5, site=s, seed=k)(x_BSD, ctx) for s, k in ((0, 0), (1, 0), (0, 1))]
    vectors = [mask_BSD[b, s] for mask_BSD in masks_BSD for b in range(2) for s in range(2)]
    assert len({tuple(vector.tolist()) for vector in vectors}) == 12


def test_dropout_keeps_the_mean_and_the_identity_in_evaluation() -> None:
    dropout = KeyedDropout(0.25, site=0, seed=0)
    x_BSD = torch.ones(8, 32, 64)
    ctx = TokenContext(sample_B=torch.arange(8))
    out_BSD = dropout(x_BSD, ctx)
    assert out_BSD.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((out_BSD == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert dropout.eval()(x_BSD, None) is x_BSD


def test_dropout_names_the_missing_argument() -> None:
    with pytest.raises(EpmoeError, match="sample_B"):
        KeyedDropout(0.1, site=0, seed=0)(torch.ones(1, 2, 4), TokenContext())
