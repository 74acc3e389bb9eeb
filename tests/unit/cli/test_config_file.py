"""Reading a configuration: every mistake is found, placed and explained, before torch is imported."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.config import (
    AUX_LOSSES,
    Config,
    DataConfig,
    MoEConfig,
    ParallelConfig,
    Ramp,
    SourceConfig,
    TrainConfig,
    choose_ep_size,
    loss_coefficients,
)
from epmoe.config_file import check_layout, dump_config, load_config, override_config
from epmoe.config_routers import GShardTop2Options, SwitchOptions
from epmoe.errors import ConfigError
from epmoe.moe.build import DISPATCHERS, LOSSES, ROUTERS


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def processor_time() -> float:
    """Of finished child processes; unlike the clock it does not depend on what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_empty_file_is_the_default_run(write):
    assert load_config(write("")) == Config()


def test_the_package_has_configurations_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "configs/quickstart.yaml"):
        assert load_config(Path(name)).out == "runs/quickstart"
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load_config(Path("quickstrat"))
    Path("quickstart").write_text("out: mine\n")
    assert load_config(Path("quickstart")).out == "mine", "a file that is there comes first"


def test_scalars_follow_yaml_1_2(write):
    config = load_config(
        write(
            "out: no\n"
            "seed: 010\n"
            "optimizer: {lr: 1e-4, eps: 1.e-8, clip_norm: ~}\n"
            "train: {steps: 0x10, max_minutes: .5, sample: {prompt: on}}\n"
            "data: {cross_document: false, tokenizer: 2026-01-02, cache: 1_000}\n"
        )
    )
    assert (config.out, config.seed, config.train.steps) == ("no", 10, 16)
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip_norm) == (1e-4, 1e-8, None)
    assert (config.train.max_minutes, config.train.sample.prompt) == (0.5, "on")
    assert (config.data.cross_document, config.data.tokenizer, config.data.cache) == (
        False,
        "2026-01-02",
        "1_000",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "moe:\n  topk: 2\n",
            ["run.yaml:2:3: moe.topk: unknown key", "did you mean moe.top_k?", "num_experts"],
        ),
        ("lr: 1\n", ["run.yaml:1:1: lr: unknown key", "did you mean optimizer.lr?"]),
        ("model: {top_k: 1}\n", ["model.top_k: unknown key", "did you mean moe.top_k?"]),
        ("train:\n  steps: ten\n", ["run.yaml:2:10: train.steps", "expects a whole number, got 'ten'"]),
        ("train: {steps: 1.5}\n", ["run.yaml:1:16: train.steps", "expects a whole number, got 1.5"]),
        ("train: {steps: true}\n", ["train.steps", "expects a whole number, got true"]),
        ('train: {steps: "3"}\n', ["train.steps", "expects a whole number, got '3'"]),
        ("data: {cross_document: no}\n", ["data.cross_document", "expects true or false, got 'no'"]),
        ("out: 5\n", ["run.yaml:1:6: out: expects text, got 5", 'as text: "5"']),
        ("optimizer: {lr: .inf}\n", ["optimizer.lr", "finite number, got .inf"]),
        ("moe: {capacity_factor: -1}\n", ["greater than 0, got -1", "null = dropless"]),
        ("train: {device: cudda}\n", ["'cudda' is not a choice", "did you mean cuda?", "auto, cpu, cuda"]),
        ("moe: {router: gshard}\n", ["moe.router", "did you mean gshard_top2?", "switch, topk"]),
        ("moe:\n  router:\n    name: swich\n", ["run.yaml:3:11: moe.router.name", "did you mean switch?"]),
        ("moe: {router: {name: switch, tau: 1}}\n", ["moe.router.tau: unknown key", "jitter"]),
        (
            "moe: {router: {second_policy_eval: threshold}}\n",
            ["moe.router", "at most 0.5", "tau=0.5 would never", "set tau below 0.5"],
        ),
        (f"seed: {2**63}\n", ["seed: expects a number less than", f"got {2**63}"]),
        ("moe: {router: null}\n", ["moe.router: expects a mapping, got null"]),
        ("moe: {losses: {balence: 1}}\n", ["run.yaml:1:25: moe.losses.balence", "balance, z"]),
        ("parallel: {ep_size: 0}\n", ["parallel.ep_size: expects a number greater than 0 or 'auto', got 0"]),
        ("parallel: {engine: deepsped}\n", ["parallel.engine: 'deepsped' is not a choice", "native, fsdp"]),
        (
            "parallel: {engine: deepspeed, zero_stage: 3}\n",
            ["zero_stage", "stage 3", "0, 1 or 2, or engine: fsdp"],
        ),
        (
            "parallel: {zero_stage: 2}\n",
            ["zero_stage=2 applies only to engine: deepspeed, and this is native", "set engine: deepspeed"],
        ),
        (
            "parallel: {engine: deepspeed}\ntrain: {precision: fp64}\n",
            ["train.precision=fp64", "use fp32, bf16_autocast or bf16_params"],
        ),
        (
            "parallel: {engine: deepspeed, zero_stage: 0}\ntrain: {precision: bf16_params}\n",
            ["zero_stage=0 has no float32 copy", "use zero_stage 1 or 2"],
        ),
        (
            "parallel: {engine: deepspeed}\noptimizer: {name: apex_fused_adam}\n",
            ["apex_fused_adam", "use adamw or sgd"],
        ),
        (
            "parallel:\n  fsdp_shard: hybrid\n",
            [
                "run.yaml:2:15: parallel",
                "fsdp_shard=hybrid applies only to engine: fsdp, and this is native",
                "set engine: fsdp",
            ],
        ),
        ("data: {sources: []}\n", ["data.sources: expects at least 1 element(s)"]),
        (
            "data: {sources: [{pth: x}]}\n",
            ["data.sources.0.pth: unknown key", "did you mean data.sources.0.path?"],
        ),
        ("optimizer: {betas: [0.9, 2]}\n", ["run.yaml:1:26: optimizer.betas.1", "less than 1, got 2"]),
        ("model:\n  d_model: 100\n  num_heads: 3\n", ["run.yaml:2:12: model: d_model=100 is not divisible"]),
        ("moe:\n  top_k: 1\n", ["run.yaml:2:10: moe: router gshard_top2", "leave top_k out"]),
        ("moe: {every: 9}\n", ["run.yaml:1:14: moe.every: no layer is an MoE layer", "moe: null"]),
        ("profile: {steps: 13-10}\n", ["profile.steps: '13-10' is not a range", "10-13"]),
        ("seed: 1\nseed: 2\n", ["run.yaml:2:1: seed: this key is given twice", "run.yaml:1:1"]),
        ("out: !!python/object/apply:os.system [ls]\n", ["run.yaml:1:6: out: the tag", "is not allowed"]),
        ("out: !!python/name:os.system\n", ["run.yaml:1:6: out: the tag", "is not allowed"]),
        ("seed: !!int x\n", ["seed: 'x' cannot be read as int"]),
        ("out: 007\n", ["got 007", 'as text: "007"']),
        ("data: {eos_token: [SEP]}\n", ["expects text, got a list", 'as text: "[SEP]"']),
        ('data: {eos_token: ["it\'s"]}\n', ["as text: '[\"it''s\"]'"]),
        ("data: {sources: [{weight: .inf}]}\n", ["sources.0.weight: expects a finite number"]),
        ("data: {sources: [{path: !!set x}]}\n", ["sources.0.path: the tag !!set is not allowed"]),
        ("data: {sources: [!!set x]}\n", ["sources.0: the tag !!set is not allowed"]),
        (f"train: {{steps: {10**20}}}\n", ["train.steps: expects a number of at most 999999999"]),
        (f"seed: {'9' * 5000}\n", ["seed: '99999", "cannot be read as int"]),
        ('out: "a\\0b"\n', ["out: a text with a null character is not a path"]),
        ('data: {sources: [{path: ""}]}\n', ["sources.0.path: an empty text is not a path"]),
        ("? [a, b]\n: 1\n", ["run.yaml:1:3", "a key must be plain text"]),
        ("- 1\n", ["not a mapping of sections"]),
        ("a: [1\n", ["run.yaml:2:1", "not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["run.yaml:2:1", "not valid YAML"]),
        ("a: 1\nb: \x00\n", ["run.yaml:2:4", "not valid YAML"]),
        ("moe: {<<: {top_k: 2}}\n", ["moe.<<: unknown key"]),
    ],
)
def test_a_mistake_names_place_key_and_remedy(write, text: str, expected: list[str]):
    message = mistakes(write(text))
    for part in expected:
        assert part in message, message
    assert "mistakes in" not in message, "one mistake is one message"


def test_all_mistakes_come_together_in_reading_order(write):
    message = mistakes(write("train:\n  stepz: 1\nmoe:\n  every: x\nseed: -1\n"), "data.seq_len=1", "oops")
    assert message.startswith("5 mistakes")
    places = [
        message.index(p) for p in ("yaml:2:3", "yaml:4:10", "yaml:5:7", "command line: oops", "data.seq_len")
    ]
    assert places == sorted(places)


def test_aliases_share_a_value_but_cannot_explode(write):
    shared = write("data: {sources: [{name: a, path: &p text}, {name: b, path: *p}]}\n")
    assert load_config(shared).data.sources[1].path == "text"
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 12):
        bomb += f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]\n"
    started = time.process_time()
    assert "more than 10000 values" in mistakes(write(bomb))
    assert "more than 10000 values" in mistakes(write("a: &a [*a]\n"))
    assert "nested deeper" in mistakes(write("a: " + "[" * 2000))
    assert time.process_time() - started < 2


def test_files_that_are_no_configuration(write, tmp_path: Path):
    path = write("")
    assert "did you mean" in mistakes(path.with_name("rum.yaml"))
    assert "is a folder" in mistakes(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in mistakes(path)
    path.write_text("#" * 200_000)
    assert "200000 bytes" in mistakes(path)


# ---------------------------------------------------------------------------------------- overrides
@pytest.mark.parametrize("key", ["train.sample.prompt", "data.sources.0.path", "data.eos_token", "out"])
def test_bytes_that_are_no_utf8_are_refused(write, key: str):
    assert mistakes(write(""), f"{key}=caf\udce9") == f"command line: {key}: it is not UTF-8"


def test_overrides_are_yaml_scalars_or_flow_collections(write):
    config = load_config(
        write("optimizer: {betas: [0.5, 0.6]}\ntrain: {steps: 7}\n"),
        [
            "optimizer.betas=[0.9, 0.95]",
            "optimizer.betas.1=0.99",
            "optimizer.lr=1e-4",
            "optimizer.clip_norm=",
            "train.steps=8",
            "train.steps=9",
            "train.sample.prompt=def f(x): # *",
            'out="5"',
            "moe.losses={z: 0.1}",
            "data.sources.0.glob=**/*.py",
            "data.sources.1={name: more, path: a=b}",
        ],
    )
    assert config.optimizer.betas == (0.9, 0.99)
    assert (config.optimizer.lr, config.optimizer.clip_norm, config.train.steps) == (1e-4, None, 9)
    assert (config.train.sample.prompt, config.out) == ("def f(x): # *", "5")
    assert config.moe is not None
    assert config.moe.losses == {"balance": 0.01, "z": 0.1}
    assert [(s.glob, s.path) for s in config.data.sources] == [("**/*.py", "stdlib"), ("**/*", "a=b")]


def test_a_router_name_replaces_the_router_mapping(write):
    path = write("moe: {router: {name: gshard_top2, tau: 0.3}}\n")
    config = load_config(path, ["moe.router=switch"])
    assert config.moe is not None
    assert config.moe.router == SwitchOptions()
    assert config.moe.top_k == 1


def test_an_option_of_a_router_given_by_name_or_not_at_all(write):
    switch = load_config(write("moe: {router: switch}\n"), ["moe.router.jitter=0.5"]).moe
    assert switch is not None
    assert switch.router == SwitchOptions(jitter=0.5)
    default = load_config(write(""), ["moe.router.tau=0.25"]).moe
    assert default is not None
    assert default.router == GShardTop2Options(tau=0.25)


def test_a_section_can_be_switched_off_and_on(write):
    assert load_config(write(""), ["moe=null"]).moe is None
    back = load_config(write("moe: null\n"), ["moe.num_experts=4"]).moe
    assert back == MoEConfig(num_experts=4)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("moee.top_k=2", ["command line: moee: unknown key", "did you mean moe?"]),
        ("moe.topk=2", ["command line: moe.topk: unknown key", "did you mean moe.top_k?"]),
        ("train.steps", ["command line: train.steps: is not of the form key=value"]),
        ("=3", ["not of the form key=value"]),
        ("train..steps=3", ["not of the form key=value"]),
        ("train.steps=-3", ["command line: train.steps: expects a number greater than 0, got -3"]),
        ("train.steps.x=3", ["command line: train.steps: expects a whole number, got a mapping"]),
        ("data.sources.2.path=x", ["data.sources is a list", "next one is number 1"]),
        ("data.sources.x=x", ["data.sources is a list"]),
        (f"data.sources.{'9' * 5000}.path=x", ["data.sources is a list"]),
        ("data.sources.0.path=", ["path: expects text, got nothing", "fix: path: ``stdlib``"]),
        ("data.eos_token=[SEP]", ["got a list", """as text: 'data.eos_token="[SEP]"'"""]),
        ("data.cache=1e5", ["got 1e5", """as text: 'data.cache="1e5"'"""]),
        ("optimizer.betas=[1", ["command line: optimizer.betas", "not valid YAML"]),
    ],
)
def test_a_wrong_override_is_placed_on_the_command_line(write, override: str, expected: list[str]):
    message = mistakes(write("data: {sources: [{name: a}]}\n"), override)
    for part in expected:
        assert part in message, message
    assert "mistakes in" not in message


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["switch", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "router", "sources", "path", "x", "0"]), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = [
    "out",
    "data",
    "moe",
    "moe.router",
    "moe.router.name",
    "data.sources",
    "data.sources.0",
    "moe.losses",
    "0.a",
]


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(keys), values), max_size=4))
def test_whatever_is_written_only_config_errors_come_out(tmp_path_factory, pairs):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text("", encoding="utf-8")
    try:
        load_config(path, [f"{key}={value!r}" for key, value in pairs])
    except ConfigError:
        return


# ------------------------------------------------------------------------------------ dump and layout
def test_a_dumped_configuration_reads_back_equal(tmp_path: Path):
    for text in (
        "no",
        "1e-4",
        "010",
        "null",
        "~",
        "0x1F",
        "a: b # c",
        " x ",
        "é\n2",
        "[",
        "2026-01-02",
        "=",
        "<<",
    ):
        config = Config(
            out=text, seed=7, moe=MoEConfig(router=SwitchOptions(jitter=1e-5), capacity_factor=None)
        )
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


def test_a_finished_configuration_takes_overrides_too():
    config = Config(data=DataConfig(sources=(SourceConfig(name="a"), SourceConfig(name="b"))), moe=None)
    assert override_config(config, []) == config
    changed = override_config(config, ["data.sources.1.path=x", "seed=3"])
    assert (changed.data.sources[1].path, changed.data.sources[0]) == ("x", config.data.sources[0])
    assert changed.seed == 3
    with pytest.raises(ConfigError, match=r"command line: data.sources.1.pth: unknown key"):
        override_config(config, ["data.sources.1.pth=x"])


@pytest.mark.parametrize(
    ("world", "experts", "expected"), [(1, 8, 1), (2, 8, 2), (6, 8, 2), (3, 8, 1), (16, 8, 8)]
)
def test_auto_ep_size_is_the_largest_common_divisor(world: int, experts: int, expected: int):
    assert choose_ep_size("auto", world, experts) == expected


def test_layouts_that_do_not_divide_list_the_ones_that_do():
    check_layout(Config(), 4)
    check_layout(Config(moe=None), 16)
    wrong = Config.model_validate(
        {"train": {"global_batch_size": 24, "micro_batch_size": 5}, "parallel": {"ep_size": 3}}
    )
    with pytest.raises(ConfigError) as caught:
        check_layout(wrong, 4)
    message = str(caught.value)
    assert "micro_batch_size: 5 does not divide the 6 sequences of each of 4 ranks" in message
    assert "valid values: 1, 2, 3, 6" in message
    assert "ep_size=3 must divide the world size 4 and num_experts=8; valid values: 1, 2, 4" in message
    with pytest.raises(ConfigError, match="4 does not divide the 2 sequences of each of 8 ranks"):
        check_layout(Config(train=TrainConfig(micro_batch_size=4)), 8)
    six_experts = Config(moe=MoEConfig(num_experts=6), parallel=ParallelConfig(ep_size=4))
    with pytest.raises(
        ConfigError, match=r"must divide the world size 4 and num_experts=6; valid values: 1, 2\n"
    ):
        check_layout(six_experts, 4)
    with pytest.raises(ConfigError, match="16 sequences do not divide over 3 ranks") as caught:
        check_layout(Config(), 3)
    assert "15, 18" in str(caught.value)
    local = Config(moe=MoEConfig(dispatcher="local"))
    check_layout(local, 1)
    with pytest.raises(ConfigError, match=r"moe.dispatcher.*ep_size is 2"):
        check_layout(local, 2)


def test_exchanges_and_overlaps_that_cannot_be():
    def problem(world_size, **parallel):
        with pytest.raises(ConfigError) as caught:
            check_layout(Config(parallel=ParallelConfig(**parallel)), world_size)
        return str(caught.value)

    two_nodes = {"exchange": "hierarchical", "ranks_per_node": 2}
    check_layout(Config(parallel=ParallelConfig(**two_nodes, overlap_chunks=2)), 4)
    check_layout(Config(parallel=ParallelConfig(exchange="hierarchical", ranks_per_node=16)), 4)
    check_layout(Config(parallel=ParallelConfig(ranks_per_node=3)), 4)  # flat does not ask
    message = problem(4, overlap_chunks=3)
    assert "parallel.overlap_chunks" in message
    assert "has rows for some of a rank's experts, and it has 2" in message
    assert "valid values: 1 to 2" in message
    message = problem(4, exchange="hierarchical", ranks_per_node=3)
    assert "ranks_per_node=3 must divide the world size 4; valid values: 1, 2, 4" in message
    assert "or parallel.exchange: flat" in message
    six = Config(
        moe=MoEConfig(num_experts=6),
        train=TrainConfig(global_batch_size=12),
        parallel=ParallelConfig(exchange="hierarchical", ranks_per_node=4),
    )
    with pytest.raises(ConfigError, match=r"ep_size=6 and ranks_per_node=4.*hold parts of nodes") as caught:
        check_layout(six, 12)
    assert "valid values of ep_size: 1, 2, 4, 12" in str(caught.value)


def test_sharing_work_with_the_wire_needs_shared_experts(write):
    assert "there are no shared experts" in mistakes(write("parallel: {overlap_shared: true}\n"))
    load_config(write("parallel: {overlap_shared: true}\nmoe: {shared_experts: 1}\n"))


def test_names_in_the_configuration_are_those_the_layer_can_build(write):
    assert sorted(LOSSES) == sorted(AUX_LOSSES)
    message = mistakes(write("moe: {dispatcher: '?'}\n"))
    assert message.rsplit("choices: ", 1)[1].split(", ") == ["auto", *DISPATCHERS]
    message = mistakes(write("moe: {router: '?'}\n"))
    assert message.rsplit("choices: ", 1)[1].split(", ") == list(ROUTERS)


def test_a_mistake_is_reported_in_under_a_second_without_torch(write):
    code = (
        "import sys; from pathlib import Path\n"
        "from epmoe.config_file import load_config\n"
        "from epmoe.errors import ConfigError\n"
        "try: load_config(Path(sys.argv[1]))\n"
        "except ConfigError: pass\n"
        "else: sys.exit('accepted')\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    path = write("moe: {topk: 1}\n")
    took = []
    for _ in range(2):  # the first run may compile bytecode
        before = processor_time()
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
        took.append(processor_time() - before)
        assert done.returncode == 0, done.stderr
    assert min(took) < 1.0


@pytest.mark.parametrize("name", ["topk", "noisy_topk", "deepseek"])
def test_one_expert_of_weight_one_would_not_train_the_router(name: str):
    one = {"moe": {"top_k": 1, "router": {"name": name, "normalize": True}}}
    with pytest.raises(ValueError, match="the task never trains the router; leave normalize out"):
        Config.model_validate(one)
    one["moe"]["router"] = {"name": name}
    assert Config.model_validate(one).moe.top_k == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "overrides", "wanted"),
    [
        ("moe: {losses: {balance: 0.3}}", [], {"balance": 0.3, "z": 0.001}),
        ("moe: {losses: {balance: 0.3}}", ["moe.losses.z=0.5"], {"balance": 0.3, "z": 0.5}),
        ("moe: {losses: {balance: 0.3}}", ["moe.losses={z: 0.5}"], {"balance": 0.01, "z": 0.5}),
        ("moe: {top_k: 2}", ["moe.losses.z=0.5"], {"balance": 0.01, "z": 0.5}),
        ("seed: 1", ["moe.losses.z=0"], {"balance": 0.01, "z": 0.0}),
        ("moe: {losses: {}}", [], {}),
        (
            "moe: {router: noisy_topk, losses: {load: 0.3}}",
            [],
            {"importance": 0.1, "load": 0.3},
        ),
        (
            "moe: {losses: {z: {start: 0.1, end: 0, steps: 10}}}",
            [],
            {"balance": 0.01, "z": Ramp(start=0.1, end=0.0, steps=10)},
        ),
    ],
)
def test_a_coefficient_that_is_given_keeps_the_others(
    tmp_path: Path, text: str, overrides: list[str], wanted
):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    config = load_config(path, overrides)
    assert config.moe is not None
    assert config.moe.losses == wanted
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_a_loss_that_python_left_out_is_no_default_of_the_file_that_is_written(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(dump_config(Config.model_validate({"moe": {"losses": {"balance": 0.3}}})))
    assert load_config(path).moe.losses == {"balance": 0.3, "z": 0.0}  # type: ignore[union-attr]


def test_a_coefficient_goes_in_a_straight_line_and_stays():
    moe = MoEConfig.model_validate({"losses": {"balance": {"start": 0.1, "end": 0.02, "steps": 4}, "z": 0.5}})
    found = [loss_coefficients(moe, step) for step in (0, 1, 2, 4, 9)]
    assert [each["balance"] for each in found] == pytest.approx([0.1, 0.08, 0.06, 0.02, 0.02], rel=1e-12)
    assert {each["z"] for each in found} == {0.5}
    assert loss_coefficients(None, 3) == {}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "moe: null\ntrain: {freeze: [router]}",
            ["no router of its own", "embedding, attention, norms, dense_ffn"],
        ),
        ("train: {freeze: [head]}", ["train.freeze", "no head of its own"]),
        ("train: {freeze: [shared_experts]}", ["no shared_experts of its own"]),
        ("train: {freeze: [rooter]}", ["train.freeze.0", "did you mean router?"]),
        (
            "train: {freeze: [embedding, attention, norms, dense_ffn, router, experts]}",
            ["nothing is left to train", "leave out one of embedding"],
        ),
        ("train: {init_without: [router]}", ["no checkpoint to leave them out of", "train.init_from"]),
        ("train: {init_from: run, init_without: [head]}", ["train.init_without", "no head of its own"]),
        ("moe: {losses: {z: {start: 1, end: 0}}}", ["moe.losses.z.steps"]),
        ("moe: {router: soft, allow_non_causal: true, expert_dropout: 0.1}", ["mixtures of tokens"]),
    ],
)
def test_what_cannot_be_frozen_or_dropped_is_told(tmp_path: Path, text: str, parts: list[str]):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(part in str(caught.value) for part in parts), caught.value
