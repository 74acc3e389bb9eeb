"""The CUDA kernels and their launches against the plain PyTorch twins, without a GPU: csrc/cuda compiled by a C++
compiler for host memory. ``cuda_runtime.h`` beside this file tells how threads, blocks and warps are played.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import epmoe
from epmoe.ops import ACTIVATIONS, reference
from tests.oracle import cases
from tests.unit.ops import activations, twins
from tests.unit.ops.twins import FLOATING, WIDE, randint, randn

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"
NAMES = (
    "route_topk",
    "route_topk_backward",
    "assign_slots",
    "permute",
    "uniform",
    "combine",
    "combine_backward",
    "activate",
    "activate_backward",
)
COMPILE = [
    *(
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
    ),
    *("-Werror", "-Wno-unknown-pragmas"),
    "-Wl,-Bsymbolic",  # the functions for streams and guards are kernels.cpp's own, where torch has some too
    "-U_FORTIFY_SOURCE",  # it takes a jump from one fibre's stack to another's for an accident
    *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> torch.library.Library:
    """Operators of the same schemas in a namespace of their own, with the emulated kernels."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]} is not on PATH")
    if not SOURCES.is_dir():
        pytest.skip("not a source tree")
    torch_folder = Path(torch.__file__).parent
    binary = tmp_path_factory.mktemp("emulated") / "emulated.so"
    includes = [
        f"-I{HERE}",
        f"-I{SOURCES}",
        f"-I{SOURCES / 'cuda'}",
        "-isystem",
        f"{torch_folder / 'include'}",
    ]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run(
        [*compiler, *COMPILE, *includes, str(HERE / "kernels.cpp"), "-o", str(binary), *link], check=True
    )
    defined = torch.library.Library("epmoe_emulated", "DEF")
    assert epmoe.__version__  # its operators are defined by importing it
    for name in NAMES:
        defined.define(str(getattr(torch.ops.epmoe, name).default._schema).removeprefix("epmoe::"))
    torch.ops.load_library(binary)
    return defined


@pytest.fixture
def call(library) -> Iterator[twins.Call]:
    def kernel(name, *args):
        return getattr(torch.ops.epmoe_emulated, name)(*args)

    with twins.poisoned_memory():
        yield kernel


# ------------------------------------------------------------------------------------------- routing
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_routing_equals_the_reference(call, kind, dtype):
    for tokens, experts in (
        (0, 4),
        (1, 1),
        (33, 2),
        (9, 31),
        (9, 32),
        (9, 33),
        (9, 64),
        (9, 65),
        (9, 256),
        (9, 300),
    ):
        for top_k in sorted({1, 2, 3, 8} & set(range(1, experts + 1))):
            for normalize in (True, False):
                arguments = twins.routing_arguments(kind, tokens, experts, top_k, normalize, dtype=dtype)
                twins.check_routing(call, arguments)


@pytest.mark.parametrize("experts", [40, 70, 300])
def test_as_many_choices_as_experts(call, experts):
    for kind in ("random", "ties", "broken"):
        for normalize in (True, False):
            twins.check_routing(call, twins.routing_arguments(kind, 9, experts, experts, normalize))


@pytest.mark.parametrize(("policy", "tau"), twins.POLICIES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_second_expert_decisions_equal_the_reference(call, kind, policy, tau):
    for tokens, experts, dtype in ((0, 5, torch.float32), (65, 5, torch.float32), (33, 70, torch.float64)):
        twins.check_routing(call, twins.routing_arguments(kind, tokens, experts, 2, True, policy, tau, dtype))


@pytest.mark.parametrize("top_k", [2, 30, 64])
def test_ties_go_to_the_lowest_expert(call, top_k):
    twins.check_ties(call, top_k)


def test_draws_equal_the_reference(call):
    twins.check_draws(call, 2000)


def test_experts_out_of_range(call):
    twins.check_experts_out_of_range(call)


# --------------------------------------------------------------------------------------------- slots
@pytest.mark.parametrize("size", [0, 1, 31, 256, 257, 3000])
@pytest.mark.parametrize("kind", twins.SLOT_KINDS)
def test_slots_equal_the_reference(call, kind, size):
    for groups, experts in ((1, 1), (3, 8), (7, 64)):  # the last one with tiles of more than the usual length
        twins.check_slots(call, kind, size, groups, experts)


def test_entries_out_of_range(call):
    twins.check_entries_out_of_range(call)


# ---------------------------------------------------------------------------------------------- draws
def test_uniform_draws_equal_the_reference(call):
    twins.check_uniform(call)


# ---------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("dtype", FLOATING)
def test_rows_equal_the_reference(call, dtype):
    for case in [*twins.row_cases(), *twins.long_row_cases()]:
        twins.check_permute(call, *case, dtype)
        for weight_dtype in (torch.float32, dtype, None):
            twins.check_combine(call, *case, dtype, weight_dtype)
        for weight_dtype in WIDE:
            twins.check_combine_backward(call, *case, dtype, weight_dtype)


@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_that_are_not_finite_pass_through(call, dtype):
    twins.check_special_numbers(call, dtype)


def test_strides_do_not_matter(call):
    twins.check_strides(call)


# Few tokens are read by their rows, many are written to them.
@pytest.mark.parametrize("tokens", [4, 40])
def test_alignment_and_rows_out_of_range(call, tokens):
    twins.check_alignment(call, tokens)
    twins.check_rows_out_of_range(call, tokens)


# --------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_activations_are_their_formulas(call, dtype, kind):
    both = partial(call, "activate"), partial(call, "activate_backward")
    for weight in activations.WEIGHTS:
        activations.check_values(*both, dtype, kind, weight)
    if dtype != torch.float16:
        activations.check_far_outside(*both, dtype, kind)
    activations.check_what_is_not_a_number(both[1], dtype, kind)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activated_rows_of_many_warps_and_of_any_alignment(call, kind):
    """More vectors than threads, more rows than blocks; rows that are whole vectors but do not begin where one may."""
    for rows, width, offset in ((2, 8 * 32 * 8 + 40, 0), (9, 32, 0), (9, 32, 1)):
        d_act_RF, hidden_RX, weight_R = activations.make(kind, rows, width, torch.float32, "wide")
        moved = torch.cat((hidden_RX.new_zeros(offset), hidden_RX.flatten()))[offset:].view(hidden_RX.shape)
        assert moved.data_ptr() % 16 == 4 * offset
        pairs = [
            (call("activate", moved, weight_R, kind), reference.activate(hidden_RX, weight_R, kind)),
            *zip(
                call("activate_backward", d_act_RF, moved, weight_R, kind),
                reference.activate_backward(d_act_RF, hidden_RX, weight_R, kind),
                strict=True,
            ),
        ]
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------- the whole
def test_bad_input_is_an_exception_with_the_numbers(call):
    logits, flag = torch.randn(4, 3), torch.ones(4, dtype=torch.bool)
    route = partial(call, "route_topk", logits, flag, None, None, None)
    for change, message in (
        ((4, True, "all", 0.5, 0, 0), "top_k=4 must be at most 3"),
        ((2, True, "best", 0.5, 0, 0), "second_policy='best' must be"),
        ((2, True, "random", 0.5, 0, 0), "either uniform or both sample and position"),
    ):
        with pytest.raises(ValueError, match=message):
            route(*change)
    with pytest.raises(ValueError, match=r"x must be float32, .* got int32"):
        call("permute", torch.ones(2, 2, dtype=torch.int32), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"token must have shape \[any\], got \[1, 1\]"):
        call("permute", torch.ones(2, 2), torch.tensor([[0]]))
    with pytest.raises(ValueError, match="activate: kind='silu' must be one of swiglu, gelu, relu"):
        call("activate", torch.ones(2, 4), None, "silu")
    with pytest.raises(ValueError, match="activate_backward: hidden has 5 columns, but swiglu needs pairs"):
        call("activate_backward", torch.ones(2, 2), torch.ones(2, 5), None, "swiglu")
    with pytest.raises(ValueError, match="capacity=-2 must be at least -1"):
        call("assign_slots", torch.arange(4), torch.arange(4), flag, 4, 4, -2)


def test_results_are_the_same_in_every_run(call):
    """Blocks and threads take turns in falling order every other time: what depends on their order differs."""
    token_N, rows_ND, weight_N, d_y_TD = (
        randint(0, 40, 200),
        randn(1, 200, 40),
        randn(2, 200),
        randn(3, 40, 40),
    )
    first, second, third = (
        (
            call("combine", rows_ND, weight_N, token_N, 40),
            *call("combine_backward", d_y_TD, rows_ND, weight_N, token_N),
            call("assign_slots", token_N, token_N % 3, token_N > 2, 3, 40, 2)[0],
        )
        for _ in range(3)
    )
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
