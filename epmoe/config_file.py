"""Reads a configuration: YAML, then ``key=value`` overrides, then every check that needs no torch.

All mistakes are reported together, each with its place, its dotted key, the valid choices and the nearest one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from epmoe import env
from epmoe.config import (
    BPE_ENTRIES_BELOW,
    Config,
    MoEConfig,
    ParameterGroup,
    causality_problem,
    choose_ep_size,
    choose_node_size,
    default_losses,
    profiled_steps,
)
from epmoe.errors import ConfigError
from epmoe.yaml12 import Document, KeyPath, Problem, dotted, dump_yaml


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file with dotted ``key=value`` overrides on top.

    Raises ConfigError naming all mistakes at once, each with ``file:line:column`` or ``command line``.
    """
    return _checked(Document.read(path), overrides)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with dotted ``key=value`` overrides on top, checked like a file. Raises ConfigError."""
    return _checked(Document("the run's configuration", _written(config)), overrides)


def _checked(document: Document, overrides: Sequence[str]) -> Config:
    for override in overrides:
        document.override(override)
    problems = list(document.problems)
    config = None
    try:
        config = Config.model_validate(_with_default_losses(document.frozen()), strict=True)
    except ValidationError as error:
        problems += _validation_problems(error, document)
    if config is not None:
        problems += [
            Problem(place=document.value_place(key), key=dotted(key), what=what, hint=hint)
            for key, what, hint in _cross_section(config)
        ]
    if config is None or problems:
        raise _as_error(problems)
    return config


def _with_default_losses(values: dict[str, Any]) -> dict[str, Any]:
    """A coefficient that is given leaves the others at their defaults."""
    moe = values.get("moe")
    given = moe.get("losses") if isinstance(moe, dict) else None
    if not isinstance(moe, dict) or not isinstance(given, dict) or not given:
        return values
    try:
        defaults = default_losses(MoEConfig.model_validate({key: moe[key] for key in moe if key != "losses"}))
    except ValidationError:
        return values  # which has other mistakes to name
    return {**values, "moe": {**moe, "losses": {**defaults, **given}}}


def _written(config: Config) -> dict[str, Any]:
    """What a file says of a configuration: a loss that it does not have, but would by default, is there with 0."""
    values = config.model_dump(mode="json")
    if config.moe is not None and config.moe.losses:
        values["moe"]["losses"] = {
            **dict.fromkeys(default_losses(config.moe), 0.0),
            **values["moe"]["losses"],
        }
    return values


def dump_config(config: Config) -> str:
    """The configuration as YAML text that ``load_config`` reads back to an equal value, but for masked secrets."""
    return dump_yaml(env.masked(_written(config)))


def check_layout(config: Config, world_size: int) -> None:
    """Checks that batches and experts divide over ``world_size`` ranks; raises ConfigError with the valid values."""
    train, problems = config.train, []
    batch, micro = train.global_batch_size, train.micro_batch_size
    if batch % world_size:
        below = batch // world_size * world_size
        valid = ", ".join(str(n) for n in (below, below + world_size) if n > 0)
        problems.append(
            Problem(
                place=None,
                key="train.global_batch_size",
                what=f"{batch} sequences do not divide over {world_size} ranks",
                hint=f"nearest valid values: {valid}",
            )
        )
    elif micro is not None and batch % (world_size * micro):
        share = batch // world_size
        valid = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        problems.append(
            Problem(
                place=None,
                key="train.micro_batch_size",
                what=f"{micro} does not divide the {share} sequences of each of {world_size} ranks",
                hint=f"valid values: {valid}",
            )
        )
    problems += _expert_layout(config, world_size)
    if problems:
        raise _as_error(problems)


def _expert_layout(config: Config, world_size: int) -> list[Problem]:
    num_experts = config.moe.num_experts if config.moe is not None else 1
    try:
        ep_size = choose_ep_size(config.parallel.ep_size, world_size, num_experts)
    except ValueError as error:
        return [Problem(place=None, key="parallel.ep_size", what=str(error), hint="or use 'auto'")]
    if config.moe is not None and config.moe.dispatcher == "local" and ep_size > 1:
        what = f"'local' needs all experts on every rank, but ep_size is {ep_size}"
        return [
            Problem(place=None, key="moe.dispatcher", what=what, hint="use 'auto', or parallel.ep_size=1")
        ]
    return _exchange_layout(config, world_size, ep_size)


def _exchange_layout(config: Config, world_size: int, ep_size: int) -> list[Problem]:
    parallel, problems = config.parallel, []
    num_local = config.moe.num_experts // ep_size if config.moe is not None else parallel.overlap_chunks
    if parallel.overlap_chunks > num_local:
        what = f"each of {parallel.overlap_chunks} chunks has rows for some of a rank's experts, and it has {num_local}"
        problems.append(
            Problem(
                place=None, key="parallel.overlap_chunks", what=what, hint=f"valid values: 1 to {num_local}"
            )
        )
    if parallel.exchange == "hierarchical" and parallel.ranks_per_node != "auto":
        try:
            choose_node_size(parallel.ranks_per_node, world_size, ep_size)
        except ValueError as error:
            problems.append(
                Problem(
                    place=None,
                    key="parallel.ranks_per_node",
                    what=str(error),
                    hint="or parallel.exchange: flat",
                )
            )
    return problems


def _cross_section(config: Config) -> Iterator[tuple[KeyPath, str, str]]:
    """Mistakes between sections that no single section can see: key, what is wrong, hint."""
    moe, model = config.moe, config.model
    if moe is not None and not _num_sparse(config):
        what = f"no layer is an MoE layer: every={moe.every}, first_dense={moe.first_dense}, "
        what += f"model.num_layers={model.num_layers}"
        yield ("moe", "every"), what, "for a dense model write moe: null"
    if config.parallel.overlap_shared and not (moe and moe.shared_experts):
        what = "there are no shared experts to compute while rows travel"
        yield ("parallel", "overlap_shared"), what, "moe.shared_experts: 1 or more, or overlap_shared: false"
    if problem := causality_problem(moe):
        yield ("moe", "router"), *problem
    yield from _groups(config)
    if config.data.tokenizer == "bpe" and config.data.vocab_size < BPE_ENTRIES_BELOW:
        what = f"a byte-level BPE has {BPE_ENTRIES_BELOW} entries before it learns anything"
        yield ("data", "vocab_size"), what, f"{BPE_ENTRIES_BELOW} or more, or data.tokenizer: byte"
    if config.profile.steps is not None and profiled_steps(config.profile.steps) is None:
        what = f"{config.profile.steps!r} is not a range of steps, which count from 1"
        yield ("profile", "steps"), what, "write first-last: 10-13"


def _num_sparse(config: Config) -> int:
    """Blocks that are mixtures of experts."""
    moe = config.moe
    if moe is None:
        return 0
    return sum((i + 1) % moe.every == 0 for i in range(moe.first_dense, config.model.num_layers))


def _groups(config: Config) -> Iterator[tuple[KeyPath, str, str]]:
    """Groups of parameters that are named must be there, and something must be left to train."""
    moe, model, train = config.moe, config.model, config.train
    sparse = _num_sparse(config)
    absent = {
        "head": model.tie_embeddings,
        "dense_ffn": sparse == model.num_layers,
        "router": sparse == 0,
        "experts": sparse == 0,
        "shared_experts": sparse == 0 or not (moe and moe.shared_experts),
    }
    groups = [group for group in get_args(ParameterGroup) if not absent.get(group)]
    for key, named in (("freeze", train.freeze), ("init_without", train.init_without)):
        for group in sorted({*named} - {*groups}):
            what = f"the model has no {group} of its own"
            yield ("train", key), what, f"groups of this model: {', '.join(groups)}"
    if {*groups} <= {*train.freeze}:
        yield ("train", "freeze"), "nothing is left to train", f"leave out one of {', '.join(groups)}"
    if train.init_without and train.init_from is None:
        what = "there is no checkpoint to leave them out of"
        yield ("train", "init_without"), what, "train.init_from: RUN, or init_without: []"


def _as_error(problems: Sequence[Problem]) -> ConfigError:
    problems = sorted(problems, key=_reading_order)
    if len(problems) == 1:
        return ConfigError(problems[0].headline(), fix=problems[0].hint)
    lines = [f"{len(problems)} mistakes in the configuration"]
    for problem in problems:
        lines.append(f"  {problem.headline()}")
        if problem.hint:
            lines.append(f"    fix: {problem.hint}")
    return ConfigError("\n".join(lines))


def _reading_order(problem: Problem) -> tuple[int, int]:
    """Down the file first, then the command line."""
    match = re.search(r":(\d+):(\d+)$", problem.place or "")
    return (int(match[1]), int(match[2])) if match else (sys.maxsize, 0)


# ------------------------------------------------------------------------- what pydantic says, in our words
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": "a number greater than {gt:.12g}",
    "greater_than_equal": "a number of at least {ge:.12g}",
    "less_than": "a number less than {lt:.12g}",
    "less_than_equal": "a number of at most {le:.12g}",
    "too_short": "at least {min_length} element(s)",
    "too_long": "at most {max_length} element(s)",
    "literal_error": "{expected}",
}


def _validation_problems(error: ValidationError, document: Document) -> list[Problem]:
    """One problem per key: the alternatives of a union (``int`` or ``'auto'``) become one sentence."""
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_document_path(detail, document), []).append(detail)
    return [
        _explain(path, details, document)
        for path, details in by_key.items()
        if not any(_within(path, unread) or _within(unread, path) for unread in document.unread)
        and not (details[0]["type"] == "too_short" and _holds_another(path, by_key))
    ]


def _within(path: KeyPath, outer: KeyPath) -> bool:
    return path[: len(outer)] == outer


def _holds_another(path: KeyPath, paths: Collection[KeyPath]) -> bool:
    """Whether a part of the value is wrong too: pydantic then says that the right parts are too few."""
    return any(path != other and _within(other, path) for other in paths)


def _document_path(detail: ErrorDetails, document: Document) -> KeyPath:
    """The key path inside the document: pydantic's location without its names for union members."""
    path: KeyPath = ()
    for part in detail["loc"]:
        if document.has((*path, part)):
            path = (*path, part)
    if detail["type"] == "missing":
        path = (*path, detail["loc"][-1])
    return path


def _explain(path: KeyPath, details: list[ErrorDetails], document: Document) -> Problem:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, document)
    place, key = document.value_place(path), dotted(path)
    if kind == "value_error":
        message = str(details[0]["ctx"]["error"])
        # A check of a whole section names the keys it compared: point at the first one the user wrote.
        named = [(*path, word) for word in re.findall(r"(\w+)=", message)]
        places = [document.value_place(p) for p in named if document.has(p)]
        return Problem(place=places[0] if places else place, key=key, what=message, hint=None)
    value = document.value(path)
    if kind == "union_tag_invalid":
        choices = re.findall(r"'([^']+)'", details[0]["ctx"]["expected_tags"])
        if isinstance(value, dict):
            path, value = (*path, "name"), value["name"]
        return _wrong_choice(path, value, choices, document)
    if all(d["type"] == "literal_error" for d in details):
        choices = re.findall(r"'([^']+)'", details[0]["ctx"]["expected"])
        return _wrong_choice(path, value, choices, document)
    phrases = [
        _EXPECTED[d["type"]].format(**d.get("ctx", {})) if d["type"] in _EXPECTED else d["msg"]
        for d in details
    ]
    typed = document.typed(path)
    got = "nothing" if typed == "" else _shown(value)
    if typed and type(value) in (int, float):
        got = typed if len(typed) <= 60 else typed[:57] + "..."
    what = f"expects {' or '.join(dict.fromkeys(phrases))}, got {got}"
    as_text = document.typed_as_text(path) if kind == "string_type" else None
    hint = f"as text: {as_text}" if as_text else _description(path, document)
    return Problem(place=place, key=key, what=what, hint=hint)


def _wrong_choice(path: KeyPath, value: object, choices: list[str], document: Document) -> Problem:
    near = get_close_matches(str(value), choices, n=1, cutoff=0.68)
    hint = f"did you mean {near[0]}? choices: " if near else "choices: "
    return Problem(
        place=document.value_place(path),
        key=dotted(path),
        what=f"{_shown(value)} is not a choice",
        hint=hint + ", ".join(choices),
    )


def _unknown_key(path: KeyPath, document: Document) -> Problem:
    parent, key = path[:-1], str(path[-1])
    sections = _sections_at(parent, document)
    valid = sorted({name for section in sections for name in section.model_fields})
    elsewhere = {f: dotted(p) for f, p in _all_keys(Config, ())}
    near = [dotted((*parent, name)) for name in get_close_matches(key, valid, n=2, cutoff=0.7)]
    if not near:
        near = [elsewhere[name] for name in get_close_matches(key, list(elsewhere), n=1, cutoff=0.8)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    if owners := _alternatives_with(key, parent, document):
        hint = f"{key} is a key of {', '.join(owners)}; "
    where = f"keys of {dotted(parent)}" if parent else "sections and keys"
    return Problem(
        place=document.key_place(path),
        key=dotted(path),
        what="unknown key",
        hint=f"{hint}{where}: {', '.join(valid)}",
    )


def _sections_at(path: KeyPath, document: Document) -> list[type[BaseModel]]:
    """The section classes a key path leads to; several where a union is decided by its ``name``."""
    sections: list[type[BaseModel]] = [Config]
    for depth, part in enumerate(path):
        if isinstance(part, int):
            continue
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [model for field in fields for model in _models_in(field.annotation)]
        value = document.value(path[: depth + 1])
        if len(sections) > 1 and isinstance(value, dict):
            sections = [
                s for s in sections if s.model_fields["name"].default == value.get("name")
            ] or sections
    return sections


def _alternatives_with(key: str, parent: KeyPath, document: Document) -> list[str]:
    """Where a section is one of several with a ``name``: those that know the key."""
    if not parent:
        return []
    outer = _sections_at(parent[:-1], document)
    fields = [
        section.model_fields[str(parent[-1])] for section in outer if parent[-1] in section.model_fields
    ]
    models = [model for field in fields for model in _models_in(field.annotation)]
    named = [model for model in models if len(models) > 1 and "name" in model.model_fields]
    return [str(model.model_fields["name"].default) for model in named if key in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _all_keys(section: type[BaseModel], path: KeyPath) -> Iterator[tuple[str, KeyPath]]:
    for name, field in section.model_fields.items():
        yield name, (*path, name)
        for model in _models_in(field.annotation):
            yield from _all_keys(model, (*path, name))


def _description(path: KeyPath, document: Document) -> str | None:
    """What the key means, from the docstring below the field."""
    for section in _sections_at(path[:-1], document) if path else []:
        if path[-1] in section.model_fields:
            text = section.model_fields[str(path[-1])].description
            return None if text is None else f"{path[-1]}: {' '.join(text.split())}"
    return None


def _shown(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
