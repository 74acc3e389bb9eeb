"""What one micro-batch differentiates: means over the tokens they speak of, in every precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from epmoe.config import Config
from epmoe.data.loader import Batch
from epmoe.models.decoder import Decoder
from epmoe.models.layers import Embedding
from epmoe.train.build import GROUPS, build_model, freeze
from epmoe.train.step import StepSums, micro_step
from epmoe.types import TokenContext

VOCAB, SEQUENCES, SEQ_LEN = 64, 8, 64


def make_config(precision: str = "fp32", **moe: object) -> Config:
    return Config.model_validate(
        {
            "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64},
            "moe": {"num_experts": 4, "capacity_factor": None, **moe},
            "train": {"precision": precision},
        }
    )


def make_batch(share_in_loss: float = 1.0) -> Batch:
    """Half of the tokens have the same id; the last eighth of every sequence is padding."""
    draw = torch.Generator().manual_seed(0)
    token_BS = torch.randint(0, VOCAB, (SEQUENCES, SEQ_LEN), generator=draw)
    token_BS[torch.rand(token_BS.shape, generator=draw) < 0.5] = 7
    valid_BS = (torch.arange(SEQ_LEN) < SEQ_LEN * 7 // 8).expand_as(token_BS)
    loss_BS = valid_BS & (torch.rand(token_BS.shape, generator=draw) < share_in_loss)
    context = TokenContext(valid_BS=valid_BS, sample_B=torch.arange(SEQUENCES), token_BS=token_BS)
    return Batch(token_BS=token_BS, target_BS=token_BS.roll(-1, 1), loss_BS=loss_BS, context=context)


def trained(model: Decoder, batch: Batch, coefficients: dict[str, float]) -> tuple[float, dict[str, Tensor]]:
    """The objective of a step that is this batch, and its gradients."""
    seen: list[Tensor] = []
    micro_step(
        model.train(),
        batch,
        num_tokens=max(int(batch.loss_BS.sum()), 1),
        num_routed=int(batch.context.valid_BS.sum()),  # type: ignore[union-attr]
        coefficients=coefficients,
        precision="fp32",
        backward=lambda objective: (seen.append(objective.detach()), objective.backward()),  # type: ignore[func-returns-value]
    )
    gradients = {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(seen[0]), gradients


@pytest.mark.parametrize("share", [1.0, 0.25, 0.01, 0.0])
def test_auxiliary_losses_do_not_depend_on_how_many_tokens_count_in_the_loss(share: float) -> None:
    """Each batch's own task loss, taken off again, leaves the same objective and the same router gradient."""
    model = build_model(make_config("fp64", router="topk"), VOCAB, device=torch.device("cpu"))
    coefficients = {"balance": 0.5, "z": 0.25}
    found = []
    for batch in (make_batch(share), make_batch(1.0)):
        whole, gradients = trained(model, batch, coefficients)
        task, of_task = trained(model, batch, dict.fromkeys(coefficients, 0.0))
        router = "blocks.1.moe.router.weight"
        found.append((whole - task, gradients[router] - of_task[router]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


def test_an_even_load_has_balance_one_whatever_counts_in_the_loss() -> None:
    model = build_model(make_config("fp64", router="topk"), VOCAB, device=torch.device("cpu"))
    nn.init.zeros_(model.blocks[1].moe.router.weight)  # type: ignore[union-attr, arg-type]
    with_balance, _ = trained(model, make_batch(0.01), {"balance": 1.0, "z": 0.0})
    without, _ = trained(model, make_batch(0.01), {"balance": 0.0, "z": 0.0})
    assert with_balance - without == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_parameters_have_float32s_gradients_within_a_percent(tied: bool) -> None:
    """Half of all tokens are one id, 1,800 of them: more equal addends than a bfloat16 can count."""
    gradients = {}
    for precision in ("fp32", "bf16_params"):
        config = make_config(precision, router="dense")
        config = config.model_copy(update={"model": config.model.model_copy(update={"tie_embeddings": tied})})
        model = build_model(config, VOCAB, device=torch.device("cpu"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        batch = make_batch()
        for field in ("token_BS", "target_BS", "loss_BS"):
            batch = replace(batch, **{field: getattr(batch, field).repeat(8, 1)})
        context = TokenContext(valid_BS=batch.context.valid_BS.repeat(8, 1), sample_B=torch.arange(64))  # type: ignore[union-attr]
        _, gradients[precision] = trained(
            model, replace(batch, context=context), {"balance": 0.01, "z": 0.001}
        )
    errors = {
        name: float((gradients["bf16_params"][name] - wanted).norm() / wanted.norm())
        for name, wanted in gradients["fp32"].items()
    }
    assert max(errors.values()) < 0.01, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_of_the_embedding_is_looked_up_ten_thousand_times(dtype: torch.dtype) -> None:
    embed = Embedding(3, 4, dtype=dtype)
    nn.init.ones_(embed.weight)
    out = embed(torch.tensor([2, 0] + [1] * 10_000).view(2, -1))
    (out * 2.0**-10).sum().backward()
    assert embed.weight.grad is not None
    assert embed.weight.grad.dtype == dtype
    wanted = torch.tensor([[1.0], [10_000.0], [1.0]]).expand(3, 4) * 2.0**-10
    torch.testing.assert_close(embed.weight.grad.float(), wanted, rtol=4e-3, atol=0.0)


def test_float32_looks_up_as_torch_does() -> None:
    embed = Embedding(3, 4)
    nn.init.ones_(embed.weight)
    assert type(embed(torch.tensor([1])).grad_fn).__name__ == "EmbeddingBackward0"


def test_losses_per_source_add_up_to_the_loss() -> None:
    """Numbered by the tasks of the sequences; a source without tokens in the loss has zeros."""
    config = make_config("fp64", router="topk")
    model, batch = build_model(config, VOCAB, device=torch.device("cpu")).train(), make_batch(0.5)
    task_B = torch.tensor([0, 0, 3, 0, 1, 1, 3, 0])
    batch = replace(batch, context=replace(batch.context, task_B=task_B), num_sources=4)
    whole = _sums(model, batch)
    assert whole.source_tokens.tolist() == [int(batch.loss_BS[task_B == source].sum()) for source in range(4)]
    for source in range(4):
        only = replace(batch, loss_BS=batch.loss_BS & (task_B == source).unsqueeze(1))
        assert float(whole.source_loss[source]) == pytest.approx(float(_sums(model, only).loss), rel=1e-12)
    assert float(whole.source_loss.sum()) == pytest.approx(float(whole.loss), rel=1e-12)
    assert _sums(model, replace(batch, num_sources=1)).source_loss is None


def _sums(model: Decoder, batch: Batch) -> StepSums:
    return micro_step(
        model,
        batch,
        num_tokens=1.0,
        num_routed=1.0,
        coefficients={"balance": 0.0, "z": 0.0},
        precision="fp64",
        backward=lambda objective: None,
    )


@pytest.mark.parametrize("moe", [None, {"num_experts": 4, "shared_experts": 1}])
@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_is_in_a_group_that_can_be_frozen(moe: dict[str, object] | None, tie: bool) -> None:
    sections = {
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "qk_norm": True, "tie_embeddings": tie}
    }
    model = build_model(Config.model_validate({**sections, "moe": moe}), VOCAB, device=torch.device("cpu"))
    freeze(model, GROUPS)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []
