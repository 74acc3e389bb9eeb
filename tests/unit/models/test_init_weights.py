"""Initial weights: keyed by name and expert, and of the law the configuration names."""

import math

import pytest
import torch

from epmoe.config import ModelConfig, MoEConfig
from epmoe.models.decoder import Block, Decoder
from epmoe.models.init import init_weights
from epmoe.moe.experts import FFNExperts

MODEL = ModelConfig(d_model=64, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=96, tie_embeddings=False)
MOE = MoEConfig(num_experts=6, d_ff=128, shared_experts=1)


def state_of(config: ModelConfig = MODEL, seed: int = 5) -> dict[str, torch.Tensor]:
    return Decoder(config, MOE, vocab_size=257, seed=seed).state_dict()


def experts_of(model: Decoder) -> FFNExperts:
    block = model.blocks[1]
    assert isinstance(block, Block)
    assert block.moe is not None
    experts = block.moe.experts
    assert isinstance(experts, FFNExperts)
    return experts


def test_values_depend_on_seed_and_name_only() -> None:
    expected = state_of()
    torch.manual_seed(99)
    model = Decoder(MODEL, MOE, vocab_size=257, seed=5)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    init_weights(model, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    others = state_of(seed=6)
    for name, tensor in others.items():
        assert torch.equal(tensor, expected[name]) == name.endswith("norm.weight"), name
    deeper = Decoder(MODEL.model_copy(update={"num_layers": 4}), MOE, vocab_size=257, seed=5).state_dict()
    assert torch.equal(
        deeper["blocks.0.attention.q_proj.weight"], expected["blocks.0.attention.q_proj.weight"]
    )


def test_a_rank_draws_its_own_experts() -> None:
    whole = experts_of(Decoder(MODEL, MOE, vocab_size=257, seed=5))
    model = Decoder(MODEL, MOE, vocab_size=257, seed=5)
    part = experts_of(model)
    part.keep(2, 3)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    init_weights(model, 5)
    assert torch.equal(part.w_in, whole.w_in[2:5])
    assert torch.equal(part.w_out, whole.w_out[2:5])
    experts_LX = whole.w_in.flatten(1)
    assert torch.unique(experts_LX, dim=0).size(0) == 6


def test_narrow_weights_are_rounded_wide_ones() -> None:
    expected = state_of()
    model = Decoder(MODEL, MOE, vocab_size=257, seed=1).bfloat16()
    init_weights(model, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float()), name


@pytest.mark.parametrize("law", ["normal", "truncated_fan_in", "kaiming"])
def test_laws(law: str) -> None:
    truncated = 0.87962566  # standard deviation of a unit normal cut at two
    fan_ins = {"w_out": 128, "shared.down_proj.weight": 128, "ffn.down_proj.weight": 96}
    for name, tensor in state_of(MODEL.model_copy(update={"init": law})).items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        fan_in = next((n for end, n in fan_ins.items() if name.endswith(end)), 64)
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "w_out"))
        expected = {
            "normal": 0.02 / (math.sqrt(4) if residual else 1.0),
            "truncated_fan_in": truncated * math.sqrt(0.1 / fan_in),
            "kaiming": math.sqrt(2 / fan_in),
        }[law]
        tolerance = 5 / math.sqrt(2 * tensor.numel())
        assert float(tensor.std()) == pytest.approx(expected, rel=tolerance), name
        assert abs(float(tensor.mean())) < 5 * expected / math.sqrt(tensor.numel()), name
        if law == "truncated_fan_in":
            assert float(tensor.abs().max()) <= 2 * math.sqrt(0.1 / fan_in) * (1 + 1e-6), name


def test_first_bits_are_pinned() -> None:
    """A change of the keys or of the draw would silently change every published run."""
    state = state_of()
    assert state["embed.weight"][0, :3].tolist() == pytest.approx(
        [0.00917098, -0.0197166, -0.02822942], abs=1e-8
    )
    expected = [-0.01854512, -0.01799905, -0.00947984]
    assert state["blocks.1.moe.experts.w_in"][3, 0, :3].tolist() == pytest.approx(expected, abs=1e-8)


def test_only_a_decoder_is_initialised() -> None:
    module = torch.nn.Module()
    module.config = None
    with pytest.raises(TypeError, match="Decoder"):
        init_weights(module, 0)
