"""The strict builder: a plain tree becomes a frozen dataclass, or one error with every problem.

Types are the schema: bool, int, float, str, Path, Literal, Optional, unions (of dataclasses by
their ``kind`` tag), tuples, sequences, mappings and nested dataclasses. Nothing is guessed:
``true`` is no number, ``3`` is no text, an unknown key is a problem that names the nearest one.

    build(ModelConfig, {"vocab_size": 2048, ...}, "model")
"""

import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llmtrain.errors import ConfigError

T = TypeVar("T")

_BAD = object()
"""Returned by a conversion that has noted its problem."""


def build(schema: type[T], tree: Mapping[str, object], path: str = "") -> T:
    """A ``schema`` built from ``tree``; ``path`` is its dotted place in messages.

    Raises:
        ConfigError: unknown keys, missing or mistyped values, and what ``__post_init__`` refuses.
    """
    builder = _Builder(schema, f"{path}." if path else "")
    result = builder.convert(schema, tree, path)
    if builder.problems:
        raise ConfigError(builder.problems)
    if not isinstance(result, schema):
        raise TypeError(f"{schema} is not a dataclass")
    return result


def nearest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """The end of a message: the nearest of ``choices``, or all of them when none is near."""
    names = list(choices)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; use one of {', '.join(names)}" if names else ""


def schema_paths(schema: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all fields below a dataclass, sections included."""
    paths = list[str]()
    for name, hint in _hints(schema).items():
        paths.append(prefix + name)
        for arm in arms(hint):
            if is_dataclass(arm):
                paths += schema_paths(arm, f"{prefix}{name}.")
    return paths


def key_of(name: str) -> str:
    """How users spell a field; its trailing underscore only keeps Python's keywords apart."""
    return name.removesuffix("_")


def _hints(schema: Any) -> dict[str, Any]:
    """Key of a field -> resolved type, in order."""
    hints = get_type_hints(schema)
    return {key_of(f.name): hints[f.name] for f in fields(schema)}


def arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a plain type is its own only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@dataclass
class _Builder:
    """Converts values by their type hints and gathers what is wrong."""

    root: Any
    prefix: str = ""
    problems: list[str] = field(default_factory=list)

    def bad(self, message: str) -> object:
        """Note a problem."""
        self.problems.append(message)
        return _BAD

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        """``value`` as ``hint``, or _BAD with the problem noted."""
        origin = get_origin(hint)
        if hint in (Any, object):
            return value
        if origin is Annotated:
            return self.convert(get_args(hint)[0], value, path)
        if is_dataclass(hint):
            return self._dataclass(hint, value, path)
        if origin is Literal:
            return self._literal(get_args(hint), value, path)
        if origin in (Union, types.UnionType):
            return self._union(get_args(hint), value, path)
        if origin is tuple:
            return self._tuple(get_args(hint), value, path)
        if origin in (list, Sequence):
            items = self._items(value, path)
            return _BAD if items is None else self._each(get_args(hint)[0], items, path)
        if origin in (dict, Mapping):
            return self._mapping(get_args(hint), value, path)
        return self._scalar(hint, value, path)

    def _scalar(self, hint: Any, value: Any, path: str) -> Any:
        read = _SCALARS.get(hint)
        if read is None:
            raise TypeError(f"{path}: the config builder does not know the type {hint}")
        result = read(value)
        return self.bad(_mismatch(path, value, (hint,))) if result is _BAD else result

    def _literal(self, choices: tuple[Any, ...], value: Any, path: str) -> Any:
        if any(value == c and type(value) is type(c) for c in choices):
            return value
        return self.bad(f"{path}={show(value)} is not a choice"
                        f"{nearest(str(value), [str(c) for c in choices])}")  # fmt: skip

    def _union(self, arms: tuple[Any, ...], value: Any, path: str) -> Any:
        if value is None and type(None) in arms:
            return None
        arms = tuple(a for a in arms if a is not type(None))
        if len(arms) == 1:
            return self.convert(arms[0], value, path)
        tagged = [a for a in arms if is_dataclass(a)]
        if tagged and isinstance(value, Mapping):
            return self._tagged(tagged, value, path)
        for arm in arms:
            trial = _Builder(self.root, self.prefix)
            result = trial.convert(arm, value, path)
            if not trial.problems:
                return result
        return self.bad(_mismatch(path, value, arms))

    def _tagged(self, arms: Sequence[Any], value: Mapping[str, Any], path: str) -> Any:
        by_kind = {k: arm for arm in arms for k in get_args(_hints(arm).get("kind"))}
        kind = value.get("kind")
        if kind not in by_kind:
            return self.bad(
                f"{path}.kind={show(kind)} is not a choice{nearest(str(kind), by_kind)}"
            )
        return self._dataclass(by_kind[kind], value, path)

    def _items(self, value: Any, path: str) -> list[Any] | None:
        if isinstance(value, (list, tuple)):
            return list(value)
        self.bad(f"{path}={show(value)} is not a list; write {path}=[{value}]")
        return None

    def _each(self, hint: Any, items: list[Any], path: str) -> Any:
        built = [self.convert(hint, v, f"{path}[{i}]") for i, v in enumerate(items)]
        return _BAD if any(v is _BAD for v in built) else tuple(built)

    def _tuple(self, hints: tuple[Any, ...], value: Any, path: str) -> Any:
        items = self._items(value, path)
        if items is None:
            return _BAD
        if len(hints) == 2 and hints[1] is Ellipsis:
            return self._each(hints[0], items, path)
        if len(items) != len(hints):
            return self.bad(f"{path} has {len(items)} items, expected {len(hints)}")
        pairs = enumerate(zip(hints, items, strict=True))
        built = [self.convert(hint, v, f"{path}[{i}]") for i, (hint, v) in pairs]
        return _BAD if any(v is _BAD for v in built) else tuple(built)

    def _mapping(self, hints: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self.bad(
                f"{path}={show(value)} is not a group of names; write {path}.NAME=VALUE"
            )
        built = {str(k): self.convert(hints[1], v, f"{path}.{k}") for k, v in value.items()}
        return _BAD if any(v is _BAD for v in built.values()) else built

    def _dataclass(self, schema: Any, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self.bad(f"{path or 'the config'}={show(value)} is not a section with keys")
        hints, dot = _hints(schema), f"{path}." if path else ""
        for key in value:
            if key not in hints and f"{dot}{key}" in schema_paths(self.root, self.prefix):
                self.bad(f"{dot}{key} has no meaning for kind={show(value.get('kind'))}; "
                         f"use one of {', '.join(hints)}")  # fmt: skip
            elif key not in hints:
                self.bad(self._unknown(str(key), value[key], hints, dot))
        arguments = {
            f.name: self.convert(hints[key], value[key], dot + key)
            if _given(value, key := key_of(f.name)) else self._absent(f, dot)
            for f in fields(schema)
        }  # fmt: skip
        arguments = {name: v for name, v in arguments.items() if v is not MISSING}
        if any(v is _BAD for v in arguments.values()):
            return _BAD
        try:
            return schema(**arguments)
        except ConfigError as error:
            self.problems += [_prefixed(p, path, hints) for p in error.problems]
            return _BAD

    def _unknown(self, key: str, value: Any, siblings: Iterable[str], dot: str) -> str:
        """A message with the nearest sibling; else the same name elsewhere; else all siblings."""
        found = dot + key
        while isinstance(value, Mapping) and value:
            name, value = next(iter(value.items()))
            found += f".{name}"
        known = schema_paths(self.root, self.prefix)
        near = get_close_matches(found, known, n=1, cutoff=0.8)
        elsewhere = {p.rsplit(".", 1)[-1]: p for p in reversed(known)}
        near = near or [elsewhere[k] for k in get_close_matches(key, elsewhere, n=1, cutoff=0.8)]
        hint = f"; did you mean {near[0]}?" if near else nearest(key, siblings, dot)
        return f"unknown key {found}{hint}"

    def _absent(self, item: Field[Any], dot: str) -> Any:
        if item.default is not MISSING or item.default_factory is not MISSING:
            return MISSING
        path = dot + key_of(item.name)
        return self.bad(f"{path} is required; set {path}=VALUE")


def _given(value: Mapping[str, Any], name: str) -> bool:
    """Whether a key is present and not left open with OmegaConf's '???'."""
    return name in value and value[name] != "???"


def _prefixed(problem: str, path: str, names: Iterable[str]) -> str:
    """A problem of ``__post_init__`` with the dotted path of its section."""
    if not path or problem.startswith(f"{path}."):
        return problem
    first = re.split(r"[ =.\[]", problem, maxsplit=1)[0]
    return f"{path}.{problem}" if first in names else f"{path}: {problem}"


def show(value: Any) -> str:
    """A value as the user would write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _mismatch(path: str, value: Any, arms: Sequence[Any]) -> str:
    """The message for a value of the wrong type."""
    words, choices = list[str](), list[str]()
    for arm in arms:
        choices += [str(c) for c in get_args(arm)] if get_origin(arm) is Literal else []
        words += [str(c) for c in get_args(arm)] if get_origin(arm) is Literal else [_word(arm)]
    hint = nearest(value, choices) if isinstance(value, str) and choices else ""
    if str in arms and isinstance(value, (bool, int, float)):
        hint = f"""; quote it: '{path}="{show(value)}"'"""
    return f"{path}={show(value)} is not {' or '.join(words)}{hint}"


def _word(hint: Any) -> str:
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _int(value: Any) -> Any:
    """An int, or a float that is one (1e9)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _BAD
    return int(value) if isinstance(value, int) or value.is_integer() else _BAD


def _float(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and not math.isnan(value) else _BAD


_SCALARS: Mapping[Any, Callable[[Any], Any]] = {
    bool: lambda v: v if isinstance(v, bool) else _BAD,
    int: _int,
    float: _float,
    str: lambda v: v if isinstance(v, str) else _BAD,
    Path: lambda v: Path(v) if isinstance(v, str) else _BAD,
    type(None): lambda v: v if v is None else _BAD,
}

_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
}  # fmt: skip
