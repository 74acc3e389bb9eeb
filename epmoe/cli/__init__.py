"""The command line. A command's module is imported when the command runs, so ``--help`` is instant."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from epmoe import env
from epmoe.errors import ConfigError, EpmoeError, NotProven

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a name of the package's own: quickstart.")
]
CheckpointArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run folder (its newest checkpoint) or a checkpoint."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Dotted keys that replace values, e.g. moe.router=switch.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, or the code of the error (see ``epmoe.errors``).

    What the user can act on is a message on stderr; anything else is our mistake and keeps its traceback.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by whoever started us: the next file would get its place
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    env.prefer_huge_pages()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a terminal that knows ASCII alone still gets the rest, escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # accepted anywhere on the line, though only the program as a whole declares it
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    env.adopt_tasks()
    code: int | str | None = 1
    try:
        _app()(arguments, prog_name="epmoe")
    except SystemExit as end:  # how a command line that worked, or was not understood, ends
        code = end.code
    except EpmoeError as error:
        code = error.exit_code
        if debug:
            traceback.print_exc()
        else:
            print_error(error)
    except ModuleNotFoundError as missing:
        problem = missing_package(missing)
        if problem is None or debug:
            raise
        code = problem.exit_code
        print_error(problem)
    finally:
        if env.launch_notes():
            from epmoe.train.status import note_exit

            note_exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def missing_package(error: ModuleNotFoundError) -> ConfigError | None:
    """What to say about a package that epmoe needs and this Python lacks; None where the lack is our mistake."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "epmoe"):
        return None
    fix = f"{sys.executable} -m pip install {package}"
    if package == "torch":
        fix += " (then epmoe again with --no-build-isolation, which compiles the native kernels against it)"
    return ConfigError(f"the package {package} is not installed for {sys.executable}", fix=fix)


def print_error(error: EpmoeError) -> None:
    """What failed, on stderr, with the rank where there are several."""
    # Every rank finds the same mistake in the same file: one per machine is enough.
    if not isinstance(error, ConfigError | NotProven) or env.local_rank() == 0:
        who = f"[rank {env.rank()}] " if env.world_size() > 1 else ""
        print(f"{who}error: {error}", file=sys.stderr, flush=True)


def _app() -> typer.Typer:
    app = typer.Typer(
        help="Pretrain GShard-style sparse language models with expert parallelism.",
        epilog="Several processes: torchrun --nproc-per-node N -m epmoe train CONFIG ...",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_program)
    app.command("train")(_train)
    app.command("prepare")(_prepare)
    app.command("eval")(_eval)
    app.command("generate")(_generate)
    app.command("verify")(_verify)
    app.command("doctor")(_doctor)
    app.command("rewind")(_rewind)
    app.command("launch", context_settings={"ignore_unknown_options": True})(_launch)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from epmoe.cli.version import versions

        print(versions())
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Versions of epmoe, torch and CUDA."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    pass


def _train(
    config: ConfigArgument,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and explain the run, then stop.")] = False,
) -> None:
    """Train; the same command in the same folder resumes."""
    from epmoe.cli.train import train

    train(config, overrides or [], dry_run)


def _prepare(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Tokenize the training text ahead of a run."""
    from epmoe.cli.prepare import prepare

    prepare(config, overrides or [])


def _eval(checkpoint: CheckpointArgument, overrides: Overrides = None, json: AsJson = False) -> None:
    """Loss and perplexity of a checkpoint on the validation text."""
    _require_one_process("eval")
    from epmoe.cli.eval import evaluate

    evaluate(checkpoint, overrides or [], json)


def _generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="File with the prompt; - is stdin.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among this many likeliest tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample within this much probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same text.")] = 0,
) -> None:
    """Continue a prompt with a trained model."""
    if prompt is not None and prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file are both given", fix="give one of them")
    _require_one_process("generate")
    from epmoe.cli.generate import generate

    generate(
        checkpoint,
        prompt=prompt,
        prompt_file=prompt_file,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


def _verify(
    config: ConfigArgument,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Every combination, not a covering set.")] = False,
    scale: Annotated[
        Literal["small", "as_is"], typer.Option(help="A small model of the same kind, or the model as it is.")
    ] = "small",
    ranks: Annotated[
        int | None,
        typer.Option(min=2, help="Processes to start here; under torchrun its own.", show_default="4"),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.", show_default=False)
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Plant known faults and show that each is noticed.")
    ] = False,
) -> None:
    """Prove that every parallel layout of a configuration trains the same model."""
    from epmoe.cli.verify import verify

    verify(config, overrides or [], full=full, scale=scale, ranks=ranks, json=json, faults=self_test)


def _require_one_process(command: str) -> None:
    if env.world_size() > 1:
        raise ConfigError(
            f"epmoe {command} runs in one process, but a launcher started {env.world_size()}",
            why="each of them would load the whole model and do all of the work",
            fix=f"run `epmoe {command} ...` without torchrun; unset WORLD_SIZE if it is left over",
        )


def _rewind(
    run: Annotated[Path, typer.Argument(help="A run folder that no process trains in.")],
    step: Annotated[int, typer.Argument(min=0, max=10**9 - 1, help="Of a checkpoint it holds.")],
) -> None:
    """Let the next start of a run go on from an earlier checkpoint; newer ones are set aside."""
    from epmoe.cli.rewind import rewind

    rewind(run, step)


def _doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run folder to report on.", show_default=False)
    ] = None,
    json: AsJson = False,
) -> None:
    """Check this machine, or report on a run."""
    from epmoe.cli.doctor import doctor

    doctor(run, json)


def _launch(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="e.g. torchrun ... -m epmoe train ...")
    ],
    grace: Annotated[
        int, typer.Option(metavar="SECONDS", min=1, help="From a signal until what still runs is killed.")
    ] = 120,
) -> None:
    """Run a launcher such as torchrun, end with the run's own exit code; stop signals, USR1 too, save and stop."""
    from epmoe.cli.launch import launch

    raise typer.Exit(launch(command, grace))
