"""What a pipeline's folder was begun with: its settings, and the digests of its raw files.

``OUT/pipeline.json`` holds the settings; another setting is refused by name. ``OUT/inputs.json``
remembers digests, so that a raw file is read again only where its size or time has changed.

    claim(Path("corpus"), config)
    files = fingerprints(Path("corpus"), find_raw_files(config.input))
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.config.run import RunConfig
from data_pipeline.read.inputs import RawFile, fingerprint, identity_of
from data_pipeline.read.raw_files import INPUTS
from data_pipeline.stages import replace_file
from llmtrain.config.load import to_plain
from llmtrain.errors import ConfigError, DataError


def claim(out: Path, config: RunConfig) -> None:
    """Note the settings of a new folder; refuse others for one that was begun before."""
    path = out / "pipeline.json"
    plain = {"pipeline": to_plain(config.pipeline), "sources": sorted(config.input)}
    if not path.is_file():
        replace_file(path, json.dumps(plain, indent=1, sort_keys=True) + "\n")
        return
    try:
        before = _flat(json.loads(path.read_text()))
    except ValueError:
        raise DataError(
            f"{path} is damaged, so nobody can say what {out} was begun with; put it back, or use "
            "another out="
        ) from None
    now = _flat(plain)
    changes = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise ConfigError(
            f"{out} was begun with other settings: {'; '.join(changes)}; use another out=, or "
            "remove the folder"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, entry in tree.items()
        for key, value in _flat(entry, f"{prefix}.{name}" if prefix else name).items()
    }


def _known(path: Path) -> dict[str, Any]:
    """Return the digests noted before; a file that cannot be read notes none."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return known


def fingerprints(out: Path, files: Sequence[RawFile]) -> list[RawFile]:
    """Return the files with their digests, read again only where size or time changed."""
    path = out / INPUTS
    known = _known(path)
    result: list[RawFile] = []
    for file in files:
        if file.format == "hf":
            result.append(fingerprint(file))
            known[file.path] = _entry(result[-1], None)
            continue
        name, stamp = identity_of(file)
        entry = known.get(name)
        if entry is None or stamp is None or entry["stamp"] != stamp or "size" not in entry:
            known[name] = entry = _entry(fingerprint(file), stamp)
        result.append(replace(file, size=entry["size"], sha256=entry["sha256"]))
    replace_file(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return result


def note_inputs(out: Path, files: Sequence[RawFile]) -> None:
    """Note where files of rows were read, for those who want to open them again."""
    known = {file.path: _entry(file, None) for file in files}
    replace_file(out / INPUTS, json.dumps(known, indent=1, sort_keys=True) + "\n")


def _entry(file: RawFile, stamp: list[Any] | None) -> dict[str, Any]:
    """What is noted of a file; ``stamp`` tells whether it has changed, where that is asked."""
    return {"stamp": stamp, "sha256": file.sha256, "size": file.size}
