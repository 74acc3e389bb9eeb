"""The command line: what it parses, how it fails, and that it is quick."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import epmoe
import epmoe.cli
from epmoe.errors import CheckpointError, ConfigError, Preempted
from tests.patience import HANGS_S


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epmoe", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=HANGS_S,
    )


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        epmoe.cli.main(arguments)
    code = caught.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def body(monkeypatch: pytest.MonkeyPatch):
    """Puts a recording function in the place of a command's body."""

    def _body(module: str, function: str, error: BaseException | None = None) -> list[tuple[tuple, dict]]:
        calls: list[tuple[tuple, dict]] = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            if error is not None:
                raise error

        name = f"epmoe.cli.{module}"
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{function: record}))
        return calls

    return _body


def run_without_torch(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the command line twice; the output, and the quicker run's processor time in seconds."""
    code = (
        "import sys, epmoe.cli\ntry: epmoe.cli.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    took = []
    for _ in range(2):  # the first run may compile bytecode
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "AssertionError" not in done.stderr
    return done, min(took)


def test_help_is_quick_and_needs_no_torch():
    done, took = run_without_torch("--help")
    assert done.returncode == 0
    for command in ("train", "prepare", "eval", "generate", "doctor"):
        assert command in done.stdout
    assert took < 0.5


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_configuration_mistake_does_not_wait_for_torch(tmp_path: Path, command: str):
    path = tmp_path / "bad.yaml"
    path.write_text("moe: {topk: 2}\n")
    done, took = run_without_torch(command, str(path))
    assert done.returncode == 2
    assert f"error: {path}:1:7: moe.topk: unknown key\n  fix: did you mean moe.top_k?" in done.stderr
    assert took < 1.0


def test_version_names_epmoe_torch_and_cuda_without_importing_torch():
    done, took = run_without_torch("--version")
    cuda = torch.version.cuda or "none (CPU build)"
    assert done.stdout == f"epmoe {epmoe.__version__}\ntorch {torch.__version__}\nCUDA  {cuda}\n"
    assert took < 0.5


@pytest.mark.parametrize(
    ("package", "words", "code"),
    [
        ("torch", "train run.yaml", 2),
        ("torch", "train run.yaml --dry-run", 0),
        ("torch", "prepare run.yaml", 0),
        ("torch", "eval .", 2),
        ("torch", "doctor", 1),
        ("torch", "--version", 0),
        ("tokenizers", "train run.yaml --dry-run", 2),
        ("tokenizers", "prepare run.yaml", 2),
    ],
)
def test_a_missing_package_is_named_without_a_traceback(tmp_path: Path, package: str, words: str, code: int):
    (tmp_path / "text.txt").write_text("words and more words\n" * 200)
    (tmp_path / "run.yaml").write_text("data: {sources: [{path: text.txt}], tokenizer: byte, seq_len: 8}\n")
    program = (
        f"import sys; sys.modules[{package!r}] = None; from epmoe.cli import main; main({words.split()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS_S
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode == code, done.stderr
    if code == 2:
        assert done.stderr.startswith(f"error: the package {package} is not installed for {sys.executable}\n")
        assert f"pip install {package}" in done.stderr


def test_an_import_that_is_our_own_mistake_keeps_its_traceback(body):
    body("train", "train", ModuleNotFoundError("no epmoe.x", name="epmoe.x"))
    with pytest.raises(ModuleNotFoundError):
        epmoe.cli.main(["train", "a.yaml"])


def test_control_characters_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bad.yaml"
    path.write_text('"\\e]0;title\\a": 1\n')
    assert exit_code("train", str(path), "moe.\x1b[2J=1", "out=\u202egpj.exe", "seed=\x9b31m") == 2
    shown = capsys.readouterr().err
    assert not re.search("[^\\n\\t -~]", shown), shown
    assert r"\x1b]0;title\x07: unknown key" in shown


def test_arguments_reach_the_bodies(body):
    train = body("train", "train")
    assert exit_code("train", "a.yaml", "moe.top_k=1", "--dry-run", "out=x=y") == 0
    assert train == [((Path("a.yaml"), ["moe.top_k=1", "out=x=y"], True), {})]
    prepare = body("prepare", "prepare")
    assert exit_code("prepare", "a.yaml") == 0
    assert prepare == [((Path("a.yaml"), []), {})]
    evaluate = body("eval", "evaluate")
    assert exit_code("eval", "runs/a", "--json", "data.seq_len=8") == 0
    assert evaluate == [((Path("runs/a"), ["data.seq_len=8"], True), {})]
    generate = body("generate", "generate")
    assert exit_code("generate", "runs/a", "--prompt-file", "-", "--top-k", "5", "--seed", "3") == 0
    assert generate[0][0] == (Path("runs/a"),)
    assert generate[0][1] == {
        "prompt": None,
        "prompt_file": "-",
        "max_tokens": 120,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.95,
        "seed": 3,
    }


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["fly"], ["train", "a", "--wet-run"], ["generate", "a", "--max-tokens", "x"], ["eval"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert exit_code(*arguments) == 2
    assert "Error" in capsys.readouterr().err


def test_two_prompts_are_one_too_many(capsys: pytest.CaptureFixture[str]):
    assert exit_code("generate", "a", "--prompt", "x", "--prompt-file", "y") == 2
    assert "both given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a", why="b", fix="c"), 2), (CheckpointError("a"), 4), (Preempted("a"), 75)],
)
def test_our_errors_are_messages_with_their_own_exit_code(
    body, capsys: pytest.CaptureFixture[str], error, code: int
):
    body("train", "train", error)
    assert exit_code("train", "a.yaml") == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"error: {error}\n")


@pytest.mark.parametrize(
    "arguments", [["--debug", "train", "a.yaml"], ["train", "a.yaml", "--debug", "seed=1"]]
)
def test_debug_shows_the_traceback_of_our_errors_too(
    body, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    body("train", "train", ConfigError("a"))
    assert exit_code(*arguments) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback(body):
    body("train", "train", ZeroDivisionError("boom"))
    with pytest.raises(ZeroDivisionError):
        epmoe.cli.main(["train", "a.yaml"])


def test_one_message_per_machine_for_a_configuration_mistake(
    body, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    body("train", "train", ConfigError("a"))
    assert exit_code("train", "a.yaml") == 2
    assert capsys.readouterr().err == ""
    body("train", "train", CheckpointError("b"))
    assert exit_code("train", "a.yaml") == 4
    assert capsys.readouterr().err == "[rank 1] error: b\n"


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_one_process_commands_refuse_a_launcher(
    body, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = body(command, {"eval": "evaluate"}.get(command, command))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert exit_code(command, "runs/a") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code(command, "runs/a") == 2
    assert len(calls) == 1
    assert f"run `epmoe {command} ...` without torchrun" in capsys.readouterr().err


def test_no_color_is_respected_and_colour_is_there_without_it():
    coloured = run("--help", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[" in coloured.stdout
    plain = run("--help", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert "\x1b[3" not in plain.stdout


def test_public_names_are_the_real_ones():
    from epmoe.moe.layer import MoELayer

    assert epmoe.MoELayer is MoELayer
    for name in epmoe.__all__:
        assert getattr(epmoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = epmoe.Nonsense
