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

from data_pipeline.config import RunConfig
from data_pipeline.io import RawFile, fingerprint
from data_pipeline.stages import replace_file
from llmtrain.config.load import to_plain
from llmtrain.errors import ConfigError


def claim(out: Path, config: RunConfig) -> None:
    """Note the settings of a new folder; refuse others for one that was begun before."""
    path = out / "pipeline.json"
    plain = {"pipeline": to_plain(config.pipeline), "sources": sorted(config.input)}
    if not path.is_file():
        replace_file(path, json.dumps(plain, indent=1, sort_keys=True) + "\n")
        return
    before = _flat(json.loads(path.read_text()))
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


def fingerprints(out: Path, files: Sequence[RawFile]) -> list[RawFile]:
    """Return the files with their digests, read again only where size or time changed."""
    path = out / "inputs.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    result: list[RawFile] = []
    for file in files:
        if file.format == "hf":
            result.append(fingerprint(file))
            continue
        status = Path(file.path).stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(file.path)
        if entry is None or entry["stamp"] != stamp:
            entry = {"stamp": stamp, "sha256": fingerprint(file).sha256}
            known[file.path] = entry
        result.append(replace(file, size=status.st_size, sha256=entry["sha256"]))
    replace_file(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return result
