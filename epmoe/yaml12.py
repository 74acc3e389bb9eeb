"""YAML 1.2 scalars with positions: a safe reader that knows where every key and value stands. No torch.

PyYAML follows YAML 1.1, where ``1e-4`` is text, ``010`` is eight and ``no`` is false; and it keeps the last of
two equal keys. Here scalars follow the core schema of YAML 1.2, duplicate keys and foreign tags are mistakes,
and aliases cannot make a small file large.
"""

from __future__ import annotations

import re
import shlex
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from epmoe.errors import ConfigError

KeyPath = tuple[str | int, ...]

COMMAND_LINE = "command line"
CONFIGS = Path(__file__).with_name("configs")
"""Configurations that come with the package."""
MAX_BYTES = 100_000
MAX_VALUES = 10_000
MAX_DEPTH = 30

_PREFIX = "tag:yaml.org,2002:"
_CORE = (
    ("null", re.compile(r"~|null|Null|NULL|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    (
        "float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake: where it stands, the dotted key, what is wrong, and what would be right."""

    place: str | None
    key: str
    what: str
    hint: str | None

    def headline(self) -> str:
        """``file:line:column: key: what``."""
        return ": ".join(part for part in (self.place, self.key, self.what) if part)


def dotted(path: KeyPath) -> str:
    """``("data", "sources", 0)`` -> ``data.sources.0``."""
    return ".".join(str(part) for part in path)


def core_tag(text: str) -> str:
    """The tag of a plain scalar in the YAML 1.2 core schema."""
    kinds = [kind for kind, pattern in _CORE if pattern.fullmatch(text)]
    return _PREFIX + (kinds[0] if kinds else "str")


def core_value(text: str, tag: str) -> bool | int | float | str | None:
    """The value of a scalar; raises ValueError when the text does not fit the tag."""
    kind = tag.removeprefix(_PREFIX)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind == "float":
        return float(re.sub(r"\.(?=[a-zA-Z])", "", text))
    raise ValueError(f"the tag {tag.replace(_PREFIX, '!!')} is not allowed")


class _Core:
    """Resolves plain scalars by the core schema; mixed into PyYAML's safe reader and writer."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode:
            return core_tag(value) if implicit[0] else _PREFIX + "str"
        return _PREFIX + ("seq" if kind is yaml.SequenceNode else "map")


class _Loader(_Core, yaml.SafeLoader):
    """PyYAML's safe reader; only its node tree is used, no object is ever constructed."""


class _Dumper(_Core, yaml.SafeDumper):
    """PyYAML's safe writer; quotes exactly the texts that the core schema would read as something else."""


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML text of plain values, keys in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class Document:
    """Plain values, the place of each, and the problems met while reading them."""

    def __init__(self, name: str, values: dict[str, Any] | None = None) -> None:
        self.name = name
        self.values: dict[str, Any] = {} if values is None else values
        self.problems: list[Problem] = []
        self.unread: set[KeyPath] = set()
        """Values that could not be made out, which is a problem already; they are None."""
        self._places: dict[KeyPath, tuple[str, str]] = {}
        self._typed: dict[KeyPath, str] = {}
        self._count = 0

    @staticmethod
    def read(path: Path) -> Document:
        """Reads a YAML file, or one of the package's by its name. Raises ConfigError when it cannot be read at all."""
        path = _packaged(path)
        document = Document(str(path))
        node = document._compose(_file_text(path), document.name)
        if node is None:
            return document
        values = document._build(node, (), None)
        if not isinstance(values, dict):
            raise ConfigError(
                f"{document._mark(node)}: the file is not a mapping of sections", fix="write key: value"
            )
        document.values = values
        return document

    def override(self, text: str) -> None:
        """Applies ``dotted.key=value``; the value is a YAML scalar, or a list or mapping in flow style."""
        key, equals, raw = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            self._problem(COMMAND_LINE, (text,), "is not of the form key=value", "example: moe.router=switch")
            return
        path: KeyPath = tuple(int(part) if re.fullmatch("[0-9]{1,6}", part) else part for part in parts)
        if raw.startswith(("[", "{", '"', "'")):
            try:
                node = self._compose(raw, COMMAND_LINE)
            except ConfigError as error:
                self._problem(COMMAND_LINE, path, error.what.removeprefix(f"{COMMAND_LINE}:"), error.why)
                return
            value = None if node is None else self._build(node, path, COMMAND_LINE)
        else:
            # Everything else is one plain scalar, so globs, colons and hashes need no quotes.
            value = self._scalar(raw, path)
        before = deepcopy(self.values)
        if not self._put(path, value):
            self.values = before
        else:
            here = (COMMAND_LINE, COMMAND_LINE)
            self._places.update({p: here for p in self._places if p[: len(path)] == path})
            self._places[path] = here
            self._typed = {p: typed for p, typed in self._typed.items() if not _overlap(p, path)} | {
                path: raw
            }
            for length in range(1, len(path)):  # sections the override made
                self._places.setdefault(path[:length], here)

    def has(self, path: KeyPath) -> bool:
        """Whether the document holds this key."""
        node: Any = self.values
        for part in path:
            in_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
            if not in_list and not (isinstance(node, dict) and part in node):
                return False
            node = node[part]
        return True

    def value(self, path: KeyPath) -> Any:
        """The value at a path, None where there is none."""
        node: Any = self.values
        for part in path if self.has(path) else ():
            node = node[part]
        return node if self.has(path) else None

    def typed(self, path: KeyPath) -> str | None:
        """The value at a path as it was typed, where that is known and one line."""
        text = self._typed.get(path)
        return None if text is None or "\n" in text or text.startswith(("!", "&", "*")) else text

    def typed_as_text(self, path: KeyPath) -> str | None:
        """What to type for the value at a path to be text; None where nothing was typed that could be meant so."""
        text = self.typed(path)
        if not text:
            return None
        quoted = f"'{text.replace(chr(39), chr(39) * 2)}'" if '"' in text or "\\" in text else f'"{text}"'
        if self.value_place(path) == COMMAND_LINE:
            return shlex.quote(f"{dotted(path)}={quoted}")  # the shell takes one pair of quotes away
        return quoted

    def key_place(self, path: KeyPath) -> str:
        """Where the key stands, or its nearest enclosing key."""
        return self._nearest(path)[0]

    def value_place(self, path: KeyPath) -> str:
        """Where the value stands, or that of its nearest enclosing key."""
        return self._nearest(path)[1]

    def frozen(self) -> Any:
        """The values with tuples for lists, as the frozen configuration holds them."""
        return _frozen(self.values)

    def _nearest(self, path: KeyPath) -> tuple[str, str]:
        for length in range(len(path), 0, -1):
            if path[:length] in self._places:
                return self._places[path[:length]]
        return self.name, self.name

    def _problem(self, place: str, path: KeyPath, what: str, hint: str | None = None) -> None:
        self.problems.append(Problem(place=place, key=dotted(path), what=what, hint=hint))

    def _unread(self, place: str, path: KeyPath, what: str) -> None:
        self._problem(place, path, what)
        self.unread.add(path)

    def _mark(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _compose(self, text: str, name: str) -> yaml.Node | None:
        try:
            return _Loader(text).get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
            raise ConfigError(
                f"{place}: {error.problem or error.context}", why="this is not valid YAML"
            ) from error
        except yaml.reader.ReaderError as error:
            before = text[: error.position].split("\n")
            place = f"{name}:{len(before)}:{len(before[-1]) + 1}"
            raise ConfigError(f"{place}: {error.reason}", why="this is not valid YAML") from error
        except RecursionError:
            raise ConfigError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None

    def _build(self, node: yaml.Node, path: KeyPath, place: str | None) -> Any:
        """Plain values of a node; ``place`` overrides the marks for what came from the command line."""
        self._count += 1
        if self._count > MAX_VALUES or len(path) > MAX_DEPTH:
            limits = f"{MAX_VALUES} values and {MAX_DEPTH} levels"
            raise ConfigError(f"{self.name}: more than {limits}", why="an alias repeats a part too often")
        here = place or self._mark(node)
        self._places.setdefault(path, (here, here))
        if node.start_mark.buffer is not None:
            self._typed[path] = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self._build_mapping(node, path, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return [self._build(child, (*path, i), place) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node.value, path, node.tag, here)
        self._unread(here, path, f"the tag {node.tag.replace(_PREFIX, '!!')} is not allowed")
        return None

    def _build_mapping(self, node: yaml.MappingNode, path: KeyPath, place: str | None) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = place or self._mark(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(here, path, "a key must be plain text")
                continue
            child = (*path, key_node.value)
            if key_node.value in values:
                first = self._places[child][0]
                self._problem(here, child, "this key is given twice", f"the first one stands at {first}")
                continue
            self._places[child] = (here, place or self._mark(value_node))
            values[key_node.value] = self._build(value_node, child, place)
        return values

    def _scalar(self, text: str, path: KeyPath, tag: str | None = None, place: str = COMMAND_LINE) -> Any:
        tag = tag or core_tag(text.strip())
        try:
            return core_value(text if tag.endswith(":str") else text.strip(), tag)
        except (ValueError, KeyError) as error:
            self._unread(
                place,
                path,
                str(error)
                if "tag" in str(error)
                else f"{text[:40]!r} cannot be read as {tag.removeprefix(_PREFIX)}",
            )
            return None

    def _put(self, path: KeyPath, value: Any) -> bool:
        """Sets one value, making the mappings and list elements on the way; False after a problem."""
        container: Any = self.values
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            if isinstance(container, list):
                if not isinstance(part, int) or part > len(container):
                    hint = f"it has {len(container)} element(s) here; the next one is number {len(container)}"
                    self._problem(COMMAND_LINE, path, f"{dotted(path[:depth])} is a list", hint)
                    return False
                if part == len(container):
                    container.append(None)
            else:
                part = str(part)
            child = value if last else _opened(container, part, path[: depth + 2])
            container[part] = child
            container = child
        return True


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    """Whether one path leads into the other's value, or is the same."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _opened(container: Any, part: Any, path: KeyPath) -> Any:
    """The mapping or list below ``part``, made when something else or nothing is there."""
    child = container[part] if isinstance(container, list) else container.get(part)
    if isinstance(child, str) and path[-2:-1] == ("router",):
        return {"name": child}  # a router given by its name alone gets an option
    if isinstance(child, dict | list):
        return child
    return [] if isinstance(path[-1], int) else {}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(child) for key, child in value.items()}
    return tuple(_frozen(child) for child in value) if isinstance(value, list) else value


def _packaged(path: Path) -> Path:
    """The path itself or, where nothing is there, the package's configuration of that name: ``quickstart``."""
    own = CONFIGS / f"{path.name.removesuffix('.yaml')}.yaml"
    named = str(path) in (own.stem, f"configs/{own.name}")
    return own if named and own.is_file() and not path.exists() else path


def _file_text(path: Path) -> str:
    if not path.is_file():
        what = (
            f"{path}: there is no such file" if not path.is_dir() else f"{path} is a folder, not a YAML file"
        )
        names = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = get_close_matches(str(path), [*names, *(p.stem for p in CONFIGS.glob("*.yaml"))], n=1)
        raise ConfigError(what, fix=f"did you mean {near[0]}?" if near else None)
    if path.stat().st_size > MAX_BYTES:
        size = path.stat().st_size
        raise ConfigError(f"{path}: {size} bytes, but a configuration has at most {MAX_BYTES}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text", why=str(error)) from error
