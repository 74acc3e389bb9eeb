"""What the framework promises about every router family; test_adding_a_router.py adds one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import epmoe
from epmoe.config import Config, ModelConfig, MoEConfig, causality_problem, router_classes
from epmoe.config_file import load_config
from epmoe.config_routers import (
    DeepSeekOptions,
    EddOptions,
    GShardTop2Options,
    HashOptions,
    NoisyTopKOptions,
    RouterOptions,
    SmoothingOptions,
    SwitchOptions,
    TaskOptions,
)
from epmoe.errors import ConfigError
from epmoe.models.decoder import Decoder
from epmoe.models.init import init_weights
from epmoe.models.sizes import count_parameters
from epmoe.moe import build
from epmoe.section import Section
from epmoe.types import Limits
from tests.unit.moe.helpers import EVERY, ROUTERS, close, config, context, make_layer, tokens
from tests.unit.moe.test_host_copies import HostCopies

MODEL = ModelConfig(d_model=8, num_layers=2, num_heads=2, d_ff=12)


# ------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize("name", ["noisy2", "two_levels", "top2"])
def test_parts_start_as_the_papers_say_and_are_counted(name):
    moe = config(name, num_experts=4, every=1)
    with torch.device("meta"):
        empty = Decoder(MODEL, moe, vocab_size=19, seed=3)
    empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7.0)
    init_weights(empty, 3)
    whole = Decoder(MODEL, moe, vocab_size=19, seed=3)
    for (key, one), other in zip(empty.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    router = next(iter(whole.moe_layers())).router
    zero = {key for key, value in router.state_dict().items() if not value.any()}
    wanted = {
        "noisy2": {"weight", "noise_weight"},
        "two_levels": {"weight", "noise_weight", "group_weight", "group_noise_weight"},
        "top2": set(),
    }
    assert zero == wanted[name]
    assert count_parameters(MODEL, moe, 19).total == sum(p.numel() for p in whole.parameters())


# ------------------------------------------------------------------------------------------- causality
@pytest.mark.parametrize("factor", [0.6, None])
@pytest.mark.parametrize("name", EVERY)
def test_a_causal_router_does_not_see_the_future(name, factor):
    """Another second half of each sequence changes nothing in the first, slots handed out token by token."""
    moe = config(name, slot_order="token_major", num_experts=4, capacity_factor=factor, min_capacity=0)
    layer = make_layer(moe)
    x_BSD = tokens(2, 16, seed=1)
    other_BSD = torch.cat((x_BSD[:, :8], tokens(2, 8, seed=2)), dim=1)
    y_BSD, y2_BSD = (layer(x, context(x_BSD))[0][:, :8].detach() for x in (x_BSD, other_BSD))
    causal = moe.router.looks_ahead is None and (factor is None or moe.router.looks_ahead_when_full is None)
    if causal or (factor is None and moe.router.priority != "position"):
        close(y2_BSD, y_BSD, 1e-13)
    else:
        assert not torch.allclose(y_BSD, y2_BSD), "it says it is not causal, and is"
    assert (causality_problem(moe) is None) == causal


@pytest.mark.parametrize("name", ["top2_by_gate", "top2_shuffled"])
def test_a_decoder_refuses_what_looks_ahead(name, tmp_path):
    moe = config(name, num_experts=4)
    with pytest.raises(ValueError, match=r"not causal.*priority=.*allow_non_causal: true"):
        Decoder(MODEL, moe, vocab_size=19, seed=0)
    Decoder(MODEL, moe.model_copy(update={"allow_non_causal": True}), vocab_size=19, seed=0)
    path = tmp_path / "run.yaml"
    path.write_text(f"moe: {{router: {{name: topk, priority: {moe.router.priority}}}}}\n")
    with pytest.raises(
        ConfigError, match=r"(?s)run.yaml:1.*moe.router.*not causal.*allow_non_causal"
    ) as caught:
        load_config(path)
    assert "priority: position and one of gshard_top2, switch," in str(caught.value)
    assert load_config(path, ["moe.allow_non_causal=true"]).moe.allow_non_causal


def test_a_decoder_refuses_retries_unless_there_is_room_for_all(tmp_path):
    """No token left behind: later first attempts take the slots of earlier second ones."""
    path = tmp_path / "run.yaml"
    path.write_text("moe: {router: {name: switch, attempts: 2}}\n")
    for overrides in ([], ["moe.capacity_factor=null", "moe.capacity_factor_eval=2.0"]):
        with pytest.raises(
            ConfigError,
            match=r"(?s)not causal.*attempts=2.*set capacity_factor and capacity_factor_eval to null",
        ):
            load_config(path, overrides)
    load_config(path, ["moe.capacity_factor=null"])
    load_config(path, ["moe.allow_non_causal=true"])
    load_config(path, ["moe.router.attempts=1"])


# ------------------------------------------------------------------------------------------- documentation
def test_the_page_of_routers_has_them_all_and_its_examples_load(tmp_path):
    text = (Path(epmoe.__file__).parents[1] / "docs" / "routers.md").read_text()
    for name in (*build.ROUTERS, *build.LOSSES):
        assert f"| `{name}` |" in text, name
    for name, options in router_classes().items():
        assert f"### {name}\n" in text
        assert (options().looks_ahead is None) == (
            "| yes" in text.partition(f"| `{name}` |")[2].partition("\n")[0]
        )
    examples = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) > len(build.ROUTERS)
    for example in examples:
        (tmp_path / "example.yaml").write_text(example)
        load_config(tmp_path / "example.yaml")


def test_what_balance_counts_is_said_of_every_router():
    """The field's own words, against the families."""
    said = MoEConfig.model_fields["balance_count"].description
    first = {name for name, options in router_classes().items() if options.balance_count == "top1"}
    words = re.search(r"auto = top1 for (.*?), all for the others", said, flags=re.DOTALL)[1]
    assert set(re.split(r",\s+|\s+and\s+", words)) == first


# ------------------------------------------------------------------------------------------- bad input
def test_an_option_of_another_router_names_that_router(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("moe: {router: {name: switch, groups_kept: 2}}\n")
    with pytest.raises(
        ConfigError, match=r"unknown key(?s:.*)groups_kept is a key of deepseek; keys of moe.router: at"
    ):
        load_config(path)


def test_balance_without_a_loss_needs_a_bias(tmp_path):
    """From YAML and from Python, of the section and of the options alone: the same reason."""
    wanted = r"bias_rate=0.001 balances without a loss.*router switch has no bias; routers that have one: deepseek;"
    path = tmp_path / "run.yaml"
    path.write_text("moe: {router: {name: switch, bias_rate: 0.001}}\n")
    with pytest.raises(ConfigError, match=rf"run.yaml:1:\d+.*{wanted}"):
        load_config(path)
    with pytest.raises(ValueError, match=wanted):
        MoEConfig(router={"name": "switch", "bias_rate": 0.001})
    with pytest.raises(ValueError, match=wanted):
        SwitchOptions(bias_rate=0.001)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": "noisy_topk", "top_k": 9, "num_experts": 8}, "top_k=9.*values of top_k: 1 to 8"),
        ({"router": {"name": "hierarchical", "num_groups": 3}, "num_experts": 8}, "valid values: 1, 2, 4, 8"),
        (
            {"router": {"name": "hierarchical", "groups_per_token": 3}, "top_k": 3},
            "groups_per_token=3.*valid values: 1 to 2",
        ),
        (
            {"router": {"name": "deepseek", "num_groups": 4, "groups_kept": 5}},
            "groups_kept=5.*valid values: 1 to 4",
        ),
        ({"router": "gshard_top2", "num_experts": 1}, "top_k=2.*needs num_experts of at least 2"),
        ({"router": {"name": "hierarchical", "groups_per_token": 2}, "top_k": 3}, "valid top_k: 2, 4, 6, 8"),
        ({"router": {"name": "hierarchical", "num_groups": 4}, "top_k": 3}, "valid top_k: 1, 2"),
        ({"router": {"name": "switch", "attempts": 9}}, "attempts=9.*valid values: 1 to 8"),
        (
            {"router": {"name": "switch", "attempts": 2, "slot_order": "token_major"}},
            "slot_order=choice_major",
        ),
        ({"router": "switch", "losses": {"load": 0.1}}, "routers that do: noisy_topk, hierarchical"),
        ({"router": {"name": "gshard_top2", "second_policy": "threshold"}}, "set tau below 0.5"),
        ({"router": {"name": "gshard_top2", "second_policy_eval": "random"}}, "relative"),
        (
            {"router": {"name": "deepseek", "bias_steps": 9, "bias_rate": None}},
            "bias_steps=9 has no effect here: no bias moves; set bias_rate above 0, or leave it out",
        ),
    ],
)
def test_impossible_combinations_are_refused_with_the_choices(moe, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"moe": moe})


WITHOUT_EFFECT: list[tuple[type[Section], dict, dict]] = [
    # what is refused, for its first option, and what gives that a meaning
    (SmoothingOptions, {"gate_sigma": 0.5, "gate": "uniform"}, {"gate": "normal"}),
    (SmoothingOptions, {"sigma": 0.5}, {"draws": 2}),
    (SmoothingOptions, {"reroute": True}, {"draws": 2}),
    (GShardTop2Options, {"tau": 0.3, "second_policy": "sampling"}, {"second_policy_eval": "threshold"}),
    (GShardTop2Options, {"tau": 0.3, "second_policy": "all"}, {"second_policy": "random"}),
    (GShardTop2Options, {"ratio": 0.5}, {"second_policy_eval": "relative"}),
    (GShardTop2Options, {"literal_alg1": True, "second_policy": "all"}, {"second_policy": "none"}),
    (NoisyTopKOptions, {"noise_floor": 0.1, "load_estimator": "vmoe"}, {"load_estimator": "paper"}),
    (DeepSeekOptions, {"group_score": "max"}, {"num_groups": 4, "groups_kept": 2}),
    (DeepSeekOptions, {"group_score": "max", "num_groups": 4}, {"groups_kept": 2}),
    (DeepSeekOptions, {"bias_steps": 9, "bias_rate": None}, {"bias_rate": 0.1}),
    (DeepSeekOptions, {"bias_steps": 9, "bias_rate": 0.0}, {"bias_rate": 0.1}),
    (HashOptions, {"vocab_size": 9}, {"table": "random"}),
    (HashOptions, {"priority": "batch_prioritized"}, {"priority": "random"}),
    (EddOptions, {"similarity": "rbf", "alpha": 0.0}, {"alpha": 0.1}),
    (EddOptions, {"temperature": 1.0, "alpha": 1.0}, {"alpha": 0.9}),
]


@pytest.mark.parametrize(("section", "options", "fix"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(section, options, fix):
    name = next(iter(options))
    because = re.escape("; ".join(section.meaning[name][1:]))
    with pytest.raises(ValueError, match=f"{name}=.* has no effect here: {because}, or leave it out"):
        section(**options)
    section(**{**options, **fix})
    section(**{**options, name: section.model_fields[name].default})


@pytest.mark.parametrize("section", [HashOptions, TaskOptions])
def test_a_router_that_ignores_its_input_cannot_route_copies_of_it(section):
    with pytest.raises(ValueError, match=r"smoothing\.reroute=True has no effect here"):
        section(smoothing={"draws": 2, "reroute": True})
    section(smoothing={"draws": 2})


def test_every_such_option_is_tried_and_every_default_may_be_written_out():
    sections = (*RouterOptions.families, SmoothingOptions, EddOptions)
    tried = {section.meaning[next(iter(options))] for section, options, _ in WITHOUT_EFFECT}
    assert {meaning for section in sections for meaning in section.meaning.values()} == tried
    for section in sections:
        assert section.model_validate(section().model_dump()) == section()


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"gshard_random", "base"}))
def test_no_router_makes_the_host_wait(name):
    layer = make_layer(config(name, num_experts=4))
    x_BSD = tokens(2, 6)
    with HostCopies() as copies:
        layer.router(x_BSD, context(x_BSD, "some"), Limits(num_experts=4, group_size=6, capacity=2))
    assert copies.calls == []
