"""The decoder as a whole: causality, documents, precision, the meta device, the cache and keyed dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epmoe.config import ModelConfig, MoEConfig
from epmoe.config_routers import GShardTop2Options, TopKOptions
from epmoe.errors import EpmoeError
from epmoe.models import presets
from epmoe.models.attention import KVCache, attention_inputs
from epmoe.models.decoder import Block, Decoder
from epmoe.models.init import init_weights
from epmoe.types import TokenContext

V = 29
MODEL = ModelConfig(d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, init_std=0.3)
DROPLESS = MoEConfig(num_experts=4, top_k=2, router=TopKOptions(), capacity_factor=None)
TOKEN_MAJOR = MoEConfig(num_experts=4, router=GShardTop2Options(slot_order="token_major"), min_capacity=1)
CHOICE_MAJOR = MoEConfig(num_experts=4, router=GShardTop2Options(), min_capacity=1, capacity_factor=0.5)
SHARED = MoEConfig(num_experts=4, top_k=1, router=TopKOptions(), shared_experts=2, capacity_factor=None)
LAYOUTS = {"dense": None, "dropless": DROPLESS, "token_major": TOKEN_MAJOR, "shared": SHARED}
every_layout = pytest.mark.parametrize("moe", LAYOUTS.values(), ids=LAYOUTS)


def decoder(moe: MoEConfig | None = None, model: ModelConfig = MODEL, **options: Any) -> Decoder:
    return Decoder(model, moe, vocab_size=V, seed=3, **options)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def samples(*numbers: int) -> TokenContext:
    return TokenContext(sample_B=torch.tensor(numbers))


@every_layout
def test_logits_do_not_depend_on_later_tokens(moe: MoEConfig | None) -> None:
    model, token_BS = decoder(moe).double(), ids(2, 12)
    changed_BS = token_BS.clone()
    changed_BS[:, 6:] = (changed_BS[:, 6:] + 1 + ids(2, 6, seed=1) % (V - 1)) % V
    for training in (True, False):
        before_BSV, _ = model.train(training)(token_BS, samples(4, 5))
        after_BSV, _ = model(changed_BS, samples(4, 5))
        torch.testing.assert_close(after_BSV[:, :6], before_BSV[:, :6], rtol=1e-12, atol=1e-12)
        assert ((after_BSV[:, 6:] - before_BSV[:, 6:]).abs().amax(-1) > 1e-6).all()


def test_choice_major_slots_are_not_causal() -> None:
    """What the test above would see if it looked at the paper's slot order: later first choices come first."""
    model, token_BS = decoder(CHOICE_MAJOR).double(), ids(8, 12)
    before_BSV, _ = model(token_BS, samples(*range(8)))
    after_BSV, _ = model(torch.cat([token_BS[:, :6], ids(8, 6, seed=1)], dim=1), samples(*range(8)))
    assert (after_BSV[:, :6] - before_BSV[:, :6]).abs().max() > 1e-6


@every_layout
def test_a_packed_document_reads_as_if_alone(moe: MoEConfig | None) -> None:
    apart, together = decoder(moe, cross_document=False).double(), decoder(moe).double()
    token_BS = ids(1, 9)
    ctx = TokenContext(segment_BS=torch.tensor([[0] * 4 + [1] * 5]))
    alone_BSV, _ = apart.eval()(token_BS[:, 4:])
    packed_BSV, _ = apart(token_BS, ctx)
    torch.testing.assert_close(packed_BSV[:, 4:], alone_BSV, rtol=1e-10, atol=1e-10)
    mixed_BSV, _ = together.eval()(token_BS, ctx)
    assert (mixed_BSV[:, 5:] - alone_BSV[:, 1:]).abs().max() > 1e-3


class FloatingDtypes(TorchDispatchMode):
    """Collects the dtype of every floating tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.seen.setdefault(leaf.dtype, str(func))
        return out


@pytest.mark.parametrize("moe", [None, DROPLESS, SHARED], ids=["dense", "dropless", "shared"])
def test_a_float64_model_computes_in_float64_only(moe: MoEConfig | None) -> None:
    config = MODEL.model_copy(update={"qk_norm": True})
    model = decoder(moe, config, cross_document=False).double()
    ctx = TokenContext(segment_BS=torch.tensor([[0, 0, 0, 1, 1]]))
    with FloatingDtypes() as dtypes:
        logits_BSV, _ = model(ids(1, 5), ctx)
        logits_BSV.square().sum().backward()
    assert set(dtypes.seen) == {torch.float64}, dtypes.seen


@every_layout
def test_autocast_keeps_norms_and_residuals_wide(moe: MoEConfig | None) -> None:
    model, token_BS = decoder(moe, MODEL.model_copy(update={"qk_norm": True})).eval(), ids(2, 8)
    seen: dict[str, set[torch.dtype]] = {"norm": set(), "block": set(), "q_proj": set()}

    def watch(name: str) -> Any:
        return lambda _module, _inputs, out: seen[name].add((out[0] if name == "block" else out).dtype)

    block = model.blocks[0]
    assert isinstance(block, Block)
    block.ffn_norm.register_forward_hook(watch("norm"))
    block.attention.q_proj.register_forward_hook(watch("q_proj"))
    block.register_forward_hook(watch("block"))
    expected_BSV, _ = model(token_BS)
    seen = {name: set() for name in seen}
    with torch.autocast("cpu", torch.bfloat16):
        got_BSV, _ = model(token_BS)
        normed_D = block.ffn_norm(torch.arange(16.0))
    assert seen == {"norm": {torch.float32}, "block": {torch.float32}, "q_proj": {torch.bfloat16}}
    assert torch.equal(normed_D, block.ffn_norm(torch.arange(16.0)))
    error = (got_BSV.float() - expected_BSV).norm() / expected_BSV.norm()
    assert 0 < error.item() < 0.05


@every_layout
@pytest.mark.parametrize("tied", [True, False])
def test_meta_model_materialises_to_the_same_values(moe: MoEConfig | None, tied: bool) -> None:
    config = MODEL.model_copy(update={"tie_embeddings": tied, "qk_norm": True})
    expected = decoder(moe, config)
    with torch.device("meta"):
        model = decoder(moe, config)
    with pytest.raises(EpmoeError, match="to_empty"):
        init_weights(model, 3)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    init_weights(model, 3)
    assert list(model.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    token_BS = ids(1, 5)
    assert torch.equal(model.eval()(token_BS)[0], expected.eval()(token_BS)[0])


@every_layout
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 3, 2]])
def test_cached_passes_equal_one_pass(moe: MoEConfig | None, pieces: list[int]) -> None:
    model, token_BS = decoder(moe).double().eval(), ids(2, 9)
    expected_BSV, _ = model(token_BS)
    cache = KVCache(MODEL, 9)
    with torch.no_grad():
        parts = [model(piece_BS, None, cache)[0] for piece_BS in token_BS.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BSV, rtol=1e-10, atol=1e-10)
    with pytest.raises(EpmoeError, match="holds 9 tokens"):
        model(token_BS[:, :1], None, cache)


def test_cache_and_documents_exclude_each_other() -> None:
    model = decoder(cross_document=False)
    ctx = TokenContext(segment_BS=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(EpmoeError, match="one document per sequence"):
        model(ids(1, 3), ctx, KVCache(MODEL, 3))


def test_dropout_does_not_depend_on_the_batch_split() -> None:
    model = decoder(TOKEN_MAJOR, MODEL.model_copy(update={"dropout": 0.2})).double()
    token_BS = ids(4, 6)
    whole_BSV, _ = model(token_BS, samples(20, 21, 22, 23))
    again_BSV, _ = model(token_BS[[3, 1]], samples(23, 21))
    torch.testing.assert_close(again_BSV, whole_BSV[[3, 1]], rtol=1e-12, atol=1e-12)
    other_BSV, _ = model(token_BS[[3, 1]], samples(23, 24))
    assert not torch.allclose(other_BSV[1], whole_BSV[1])
    with pytest.raises(EpmoeError, match="sample_B"):
        model(token_BS)


def test_every_dropout_has_its_own_site() -> None:
    model = decoder(None, MODEL.model_copy(update={"num_layers": 5}))
    sites = [module.site for name, module in model.named_modules() if name.endswith("dropout")]
    assert sorted(sites) == list(range(11))


def test_moe_layers_sit_where_the_configuration_says() -> None:
    config = MODEL.model_copy(update={"num_layers": 6})
    moe = DROPLESS.model_copy(update={"every": 2, "first_dense": 3})
    model = decoder(moe, config)
    assert [i for i, block in enumerate(model.blocks) if block.moe is not None] == [3, 5]
    assert len(list(model.moe_layers())) == len(model(ids(1, 4))[1]) == 2


def test_shared_experts_are_added_with_weight_one() -> None:
    model = decoder(SHARED).double()
    block = model.blocks[1]
    assert isinstance(block, Block)
    assert block.shared is not None
    assert block.shared.down_proj.weight.shape == (16, 2 * 24)
    x_BSD = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert block.moe is not None
    inputs = attention_inputs(model.config, x_BSD)
    mixed_BSD, normed_BSD = block.attend(x_BSD, inputs, None)
    routed_BSD, _ = block.moe(normed_BSD, None)
    out_BSD, _ = block.run(x_BSD, inputs, None)
    torch.testing.assert_close(out_BSD - mixed_BSD - routed_BSD, block.shared(normed_BSD))


@every_layout
def test_every_parameter_learns(moe: MoEConfig | None) -> None:
    config = MODEL.model_copy(update={"qk_norm": True, "tie_embeddings": False, "dropout": 0.1})
    model = decoder(moe, config)
    logits_BSV, reports = model(ids(8, 16), samples(*range(8)))
    loss = logits_BSV.logsumexp(-1).mean()
    for report in reports:
        loss = loss + sum(report.losses.values())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_names_are_those_of_the_mapping() -> None:
    config, moe = presets.qwen3_moe_tiny()
    names = set(Decoder(config, moe, vocab_size=V, seed=0).state_dict())
    attention = {f"attention.{x}_proj.weight" for x in "qkvo"} | {f"attention.{x}_norm.weight" for x in "qk"}
    both = attention | {"attention_norm.weight", "ffn_norm.weight"}
    dense = both | {f"ffn.{x}_proj.weight" for x in ("gate", "up", "down")}
    sparse = both | {"moe.router.weight", "moe.experts.w_in", "moe.experts.w_out"}
    expected = {"embed.weight", "norm.weight", "head.weight"}
    for i, names_of_block in enumerate((dense, sparse, sparse)):
        expected |= {f"blocks.{i}.{name}" for name in names_of_block}
    assert names == expected
