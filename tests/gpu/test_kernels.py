"""The CUDA kernels on a GPU, against the plain PyTorch twins on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map

from epmoe import ops
from epmoe.ops import reference
from tests.oracle import cases
from tests.unit.ops import activations, twins
from tests.unit.ops.twins import FLOATING, WIDE, randint, randn

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU", allow_module_level=True)
if "CUDA" not in ops.kernel_status()[1]:
    pytest.skip(f"no CUDA kernels: {ops.kernel_status()[1]}", allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with twins.poisoned_memory():
        yield


def call(name, *args):
    """The operator on the GPU, with arguments from and results for the CPU."""
    with torch.no_grad():
        moved = [a.cuda() if torch.is_tensor(a) else a for a in args]
        return tree_map(torch.Tensor.cpu, getattr(torch.ops.epmoe, name)(*moved))


# ------------------------------------------------------------------------------------ every operator
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_routing_equals_the_reference(kind, dtype):
    for tokens, experts in ((0, 4), (1, 1), (257, 2), (64, 33), (64, 64), (64, 256), (64, 300), (64, 512)):
        for top_k in sorted({1, 2, 8, min(experts, 70)} & set(range(1, experts + 1))):
            for normalize in (True, False):
                arguments = twins.routing_arguments(kind, tokens, experts, top_k, normalize, dtype=dtype)
                twins.check_routing(call, arguments)


@pytest.mark.parametrize(("policy", "tau"), twins.POLICIES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_second_expert_decisions_equal_the_reference(kind, policy, tau):
    for dtype in WIDE:
        twins.check_routing(call, twins.routing_arguments(kind, 257, 5, 2, True, policy, tau, dtype))


def test_the_same_ids_and_decisions_as_on_the_cpu():
    tokens = 300_000
    logits = (randn(0, tokens, 64) * 8).round() / 8  # with many ties
    valid, sample, position = (
        torch.ones(tokens, dtype=torch.bool),
        randint(1, 2**40, tokens),
        randint(2, 2**20, tokens),
    )
    arguments = (logits, valid, None, sample, position, 2, True, "random", 0.5, 7, 3)
    on_gpu, on_cpu = call("route_topk", *arguments), torch.ops.epmoe.route_topk(*arguments)
    assert torch.equal(on_gpu[1], on_cpu[1])
    assert torch.equal(on_gpu[3], on_cpu[3])


def test_uniform_draws_equal_the_reference():
    twins.check_uniform(call)


def test_three_million_draws_equal_the_reference():
    twins.check_draws(call, 3_000_000)


def test_ties_and_experts_out_of_range():
    for top_k in (2, 30, 64):
        twins.check_ties(call, top_k)
    twins.check_experts_out_of_range(call)


@pytest.mark.parametrize("kind", twins.SLOT_KINDS)
def test_slots_equal_the_reference(kind):
    for size in (0, 1, 257, 100_003):
        for groups, experts in ((1, 1), (3, 8), (64, 512)):
            twins.check_slots(call, kind, size, groups, experts)
    twins.check_entries_out_of_range(call)


@pytest.mark.parametrize("dtype", FLOATING)
def test_rows_equal_the_reference(dtype):
    large = (
        70_000,
        136,
        randint(3, 70_000, 150_000),
    )  # more tokens than blocks, more bytes than the cache has
    for case in [*twins.row_cases(), *twins.long_row_cases(), large]:
        twins.check_permute(call, *case, dtype)
        for weight_dtype in (torch.float32, dtype, None):
            twins.check_combine(call, *case, dtype, weight_dtype)
        twins.check_combine_backward(call, *case, dtype, torch.float32)
    twins.check_special_numbers(call, dtype)


def test_strides_alignment_and_rows_out_of_range():
    twins.check_strides(call)
    for tokens in (4, 40):
        twins.check_alignment(call, tokens)
        twins.check_rows_out_of_range(call, tokens)


@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_activations_are_their_formulas(dtype, kind):
    both = partial(call, "activate"), partial(call, "activate_backward")
    for weight in activations.WEIGHTS:
        activations.check_values(*both, dtype, kind, weight)
    if dtype != torch.float16:
        activations.check_far_outside(*both, dtype, kind)
    activations.check_what_is_not_a_number(both[1], dtype, kind)


@pytest.mark.parametrize("dtype", FLOATING)
def test_experts_equal_the_cpus(dtype):
    """Blocks of one size, and such that are counted: on the host, or on the device by torch's grouped product."""
    for counts, each in (([5, 0, 11, 3], None), ([4, 4], 4), ([0, 0], None)):
        rows, local = sum(counts), len(counts)
        weight_R = randn(1, rows)
        w_in, w_out = (
            randn(2, local, 16, 48, dtype=dtype).mul_(0.25),
            randn(3, local, 24, 16, dtype=dtype).mul_(0.25),
        )
        given = (randn(4, rows, 16, dtype=dtype), weight_R, w_in, w_out, torch.tensor(counts), each)
        y, hidden = call("expert_ffn", *given, "swiglu")
        wanted = torch.ops.epmoe.expert_ffn(*given, "swiglu")
        backward = (randn(5, rows, 16, dtype=dtype), *given, wanted[1], "swiglu", True, True, True)
        got = (y, hidden, *call("expert_ffn_backward", *backward))
        for one, other in zip(got, (*wanted, *torch.ops.epmoe.expert_ffn_backward(*backward)), strict=True):
            limit = 16 * torch.finfo(one.dtype).eps if dtype in WIDE else 16 * torch.finfo(dtype).eps
            scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=0, atol=limit * scale)


def test_gradients_equal_the_cpus():
    def gradients(device):
        x_TD, logits_TE = (randn(seed, 50, 16).double().to(device).requires_grad_() for seed in (1, 2))
        valid_T = torch.ones(50, dtype=torch.bool, device=device)
        _, ids_TK, weights_TK, _ = ops.route_topk(
            logits_TE, valid_T, None, None, None, 2, True, "all", 0.5, 0, 0
        )
        token_A = torch.arange(50, device=device).repeat_interleave(2)
        rows_AD = ops.permute(x_TD, token_A) * (1 + ids_TK.reshape(-1, 1))
        ops.combine(rows_AD, weights_TK.reshape(-1), token_A, 50).square().sum().backward()
        return x_TD.grad.cpu(), logits_TE.grad.cpu()

    for one, other in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------- streams, graphs, devices
class Trip:
    """All operators, one after the other, on tensors that stay where they are."""

    def __init__(self) -> None:
        self.logits, self.x = torch.zeros(500, 16, device="cuda"), torch.zeros(500, 64, device="cuda")
        self.valid = torch.ones(500, dtype=torch.bool, device="cuda")
        self.token = torch.arange(500, device="cuda").repeat_interleave(2)
        self.group = self.token // 100

    def fill(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Copies on the device: the host does not wait."""
        self.logits.copy_(inputs[0])
        self.x.copy_(inputs[1])

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        counters = (None, self.token[::2], self.token[::2])
        routed = ops.route_topk(self.logits, self.valid, *counters, 2, True, "random", 0.5, 1, 2)
        probs, ids, weights, active = routed
        slot, demand = ops.assign_slots(ids.reshape(-1), self.group, active.reshape(-1), 5, 16, 9)
        rows = ops.permute(self.x, self.token)
        y = ops.combine(rows, weights.reshape(-1), self.token, 500)
        backward = torch.ops.epmoe.combine_backward(y, rows, weights.reshape(-1), self.token)
        d_logits = torch.ops.epmoe.route_topk_backward(probs, weights, probs, ids, active, True)
        return [*routed, slot, demand, rows, y, *backward, d_logits]


def inputs(seed):
    return randn(seed, 500, 16).cuda(), randn(seed + 1, 500, 64).cuda()


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


def test_kernels_run_on_the_current_stream_and_give_the_same_bits_again():
    trip, one, other = Trip(), inputs(1), inputs(5)
    trip.fill(one)
    wanted = trip.run()
    assert_equal(trip.run(), wanted)
    trip.fill(other)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            50_000_000
        )  # some 30 ms: a kernel of another stream would read what was there before
        trip.fill(one)
        got = trip.run()
    stream.synchronize()
    assert_equal(got, wanted)


def test_graph_capture_and_replay():
    trip = Trip()
    trip.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trip.run()
    for seed in (3, 8):
        trip.fill(inputs(seed))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [tensor.clone() for tensor in captured]
        assert_equal(replayed, trip.run())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_that_of_the_tensors():
    x_TD, token_N = randn(0, 9, 8), randint(1, 9, 20)
    rows_ND = torch.ops.epmoe.permute(x_TD.to("cuda:1"), token_N.to("cuda:1"))
    assert rows_ND.device == torch.device("cuda:1")
    assert torch.equal(rows_ND.cpu(), reference.permute(x_TD, token_N))
    with pytest.raises(ValueError, match="token must be on the same device"):
        torch.ops.epmoe.permute(x_TD.to("cuda:1"), token_N.to("cuda:0"))


def test_bad_input_is_an_exception_with_the_numbers():
    with pytest.raises(ValueError, match="token must be on the same device"):
        torch.ops.epmoe.permute(torch.ones(2, 2, device="cuda"), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"token must have shape \[2\], got \[1\]"):
        torch.ops.epmoe.combine(torch.ones(2, 2, device="cuda"), None, torch.tensor([0], device="cuda"), 2)
