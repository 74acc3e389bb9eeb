"""Feed-forward experts against the oracle, and arbitrary modules as experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from epmoe.moe.build import build_moe_layer
from epmoe.moe.experts import FFNExperts, ModuleExperts
from epmoe.types import ExpertBatch, TokenContext
from tests.oracle.experts import ffn
from tests.oracle.layer import router_logits, run_layer
from tests.oracle.routing import topk
from tests.unit.moe.helpers import close, config, tokens

COUNTS = [[0, 0, 0], [2, 0, 3], [0, 4, 0], [1, 1, 1]]


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("counts", COUNTS)
def test_ffn_experts(counts, activation):
    experts = FFNExperts(3, 4, 5, activation).double()
    assert experts.w_in.shape == (3, 4, 10 if activation == "swiglu" else 5)
    assert experts.w_out.shape == (3, 5, 4)
    rows_RD = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    out_RD = experts(ExpertBatch(rows_RD=rows_RD, tokens_per_expert_L=torch.tensor(counts)))
    leaves = [t.detach().clone().requires_grad_() for t in (rows_RD, experts.w_in, experts.w_out)]
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    wanted = [ffn(leaves[0][r], leaves[1][e], leaves[2][e], activation) for r, e in enumerate(owner)]
    wanted_RD = torch.stack(wanted) if wanted else leaves[0] * 1.0
    close(out_RD, wanted_RD, 1e-12)
    upstream = torch.randn_like(out_RD)
    out_RD.backward(upstream)
    wanted_RD.backward(upstream)
    close(rows_RD.grad, leaves[0].grad, 1e-12)
    for parameter, leaf in ((experts.w_in, leaves[1]), (experts.w_out, leaves[2])):
        close(parameter.grad, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, 1e-12)


def test_the_gate_is_the_first_half():
    experts = FFNExperts(1, 1, 1, "swiglu").double()
    with torch.no_grad():
        experts.w_in.copy_(torch.tensor([[[2.0, 10.0]]]))
        experts.w_out.fill_(1.0)
    batch = ExpertBatch(rows_RD=torch.ones(1, 1).double(), tokens_per_expert_L=torch.tensor([1]))
    assert experts(batch).item() == pytest.approx(
        20.0 / (1.0 + torch.exp(torch.tensor(-2.0).double()).item())
    )


def test_keep_leaves_a_range_of_experts():
    experts = FFNExperts(5, 3, 2)
    before = experts.w_in.detach().clone(), experts.w_out.detach().clone()
    experts.keep(2, 2)
    assert (experts.first_expert, experts.num_local, experts.num_experts) == (2, 2, 5)
    assert torch.equal(experts.w_in, before[0][2:4])
    assert torch.equal(experts.w_out, before[1][2:4])
    assert experts.w_in.requires_grad
    assert experts.w_in.untyped_storage().nbytes() == experts.w_in.numel() * 4, "the others' memory is free"


class Scale(nn.Module):
    """An expert with a frozen parameter, a scalar parameter, a buffer and no Linear."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.frozen = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.factor * self.frozen + self.shift


def different_modules():
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
        Scale(0.5),
        nn.LayerNorm(4),
        nn.Identity(),
        nn.Linear(4, 4, bias=False),
    ]


@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_any_modules_as_experts(bias):
    """With bias 50 on one token feature everybody chooses experts 0 and 1: the others get no row."""
    modules = different_modules()
    moe = config("top2", num_experts=5, capacity_factor=None)
    layer = build_moe_layer(moe, d_model=4, experts=ModuleExperts(modules)).double()
    x_BSD = tokens(2, 6)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))
        if bias:
            x_BSD[..., 0] = 1.0
            layer.router.weight[:2, 0] += bias
    x_BSD.requires_grad_()
    y_BSD, report = layer(x_BSD, TokenContext())
    y_BSD.square().sum().backward()
    got = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in got.values()), "experts without rows get zeros, not None"
    used = report.metrics.kept_E.tolist()
    assert bias == 0.0 or used[2:] == [0, 0, 0]
    got_x = x_BSD.grad.clone()
    layer.zero_grad()
    x_BSD.grad = None
    logits = router_logits(x_BSD.flatten(0, 1), layer.router.weight)
    result = run_layer(
        x_BSD.flatten(0, 1),
        [lambda row, m=m: m(row.unsqueeze(0))[0] for m in modules],
        topk(logits, [True] * 12, k=2, normalize=True),
        group_of=[0] * 6 + [1] * 6,
        groups=2,
        slots=None,
        k=2,
        balance_count="all",
    )
    close(y_BSD.flatten(0, 1), result.y_TD, 1e-12)
    result.y_TD.square().sum().backward()
    close(got_x, x_BSD.grad, 1e-10)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            close(got[name], wanted, 1e-10)


def test_another_number_of_experts_is_refused():
    moe = config("top2", num_experts=4)
    for experts in (ModuleExperts(different_modules()), nn.Identity()):
        with pytest.raises(ValueError, match=r"num_experts=(5|None) must be moe\.num_experts=4"):
            build_moe_layer(moe, d_model=4, experts=experts)


def test_no_rows_at_all():
    experts = ModuleExperts(different_modules())
    batch = ExpertBatch(
        rows_RD=torch.zeros(0, 4, requires_grad=True), tokens_per_expert_L=torch.zeros(5).long()
    )
    out_RD = experts(batch)
    assert out_RD.shape == (0, 4)
    out_RD.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is None if not parameter.requires_grad else (parameter.grad == 0).all()


@pytest.mark.parametrize("counts", [[2, 2], [4, 0], [0, 0]])
def test_dtype_of_the_result_does_not_depend_on_who_got_rows(counts):
    """Under autocast the ranks of a group must agree on the dtype of the rows they send back."""
    experts = ModuleExperts([nn.Linear(3, 3), nn.Linear(3, 3)])
    batch = ExpertBatch(rows_RD=torch.randn(sum(counts), 3), tokens_per_expert_L=torch.tensor(counts))
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(batch).dtype == torch.float32


def test_parameter_names_carry_global_ids():
    experts = ModuleExperts([nn.Linear(2, 2), nn.Linear(2, 2)], num_experts=6, first_expert=4)
    assert (experts.num_experts, experts.num_local, experts.first_expert) == (6, 2, 4)
    assert [name.split(".")[1] for name, _ in experts.named_parameters()] == ["4", "4", "5", "5"]
