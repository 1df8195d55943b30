"""Which run a configuration belongs to, and what changed since the run was started.

fatal, allowed = changes(from_yaml(old_text), new_config)
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from llmtrain.config.load import config_hash, to_plain
from llmtrain.config.strict import arms, build, show
from llmtrain.errors import ConfigError

ABSENT = "absent"


def identity(config: Any) -> str:
    """Hash of the fields that decide which run this is; the others may change on the way."""
    marks = _marks(type(config))
    leaves = _leaves(to_plain(config))
    return config_hash({path: value for path, value in leaves.items() if _mark(path, marks)})


def changes(before: Mapping[str, object], config: Any) -> tuple[list[str], list[str]]:
    """Fields that differ from the tree ``before``: those that may not, and those that may.

    Each is a line ``training.seed: 0 -> 1``; where a run is kept does not count. A field that
    ``before`` is too old to have stands for its default.
    """
    marks = _marks(type(config))
    old, new = _leaves(_completed(before, type(config))), _leaves(to_plain(config))
    fatal, allowed = list[str](), list[str]()
    for path in [*new, *(p for p in old if p not in new)]:
        was, now = old.get(path, ABSENT), new.get(path, ABSENT)
        if was == now or path in ("name", "runs_dir"):
            continue
        mark = _mark(path, marks)
        stays = mark is None or (mark == "names" and ABSENT not in (was, now))
        (allowed if stays else fatal).append(f"{path}: {show(was)} -> {show(now)}")
    return fatal, allowed


def _completed(before: Mapping[str, object], schema: Any) -> Mapping[str, object]:
    """``before`` with the defaults of the fields it lacks; as it is where it no longer builds."""
    try:
        completed: Mapping[str, object] = to_plain(build(schema, before))
    except ConfigError:
        return before
    return completed


def _marks(schema: Any, prefix: str = "") -> dict[str, str]:
    """Dotted path of every marked field or section -> its mark."""
    marks, hints = dict[str, str](), get_type_hints(schema)
    for item in fields(schema):
        path = prefix + item.name
        if "resume" in item.metadata:
            marks[path] = item.metadata["resume"]
        for arm in arms(hints[item.name]):
            if is_dataclass(arm):
                marks |= _marks(arm, f"{path}.")
    return marks


def _mark(path: str, marks: Mapping[str, str]) -> str | None:
    """The mark of a leaf: its own or that of a section above it."""
    parts = path.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((marks[p] for p in above if p in marks), None)


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value; an empty mapping has no leaf."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    dot = f"{prefix}." if prefix else ""
    return {p: v for key, value in tree.items() for p, v in _leaves(value, f"{dot}{key}").items()}
