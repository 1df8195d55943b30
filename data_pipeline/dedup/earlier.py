"""What earlier runs hold already: the keys they kept, found and checked.

files = earlier_keys("corpus-2025", "minhash", {"preset": "fineweb"})
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config.dedup import Folders
from data_pipeline.manifest import Manifest
from data_pipeline.shards import digest_of_file
from llmtrain.errors import DataError


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file of sorted keys that an earlier run kept."""

    path: str
    """Where it lies."""
    digest: str
    """blake3 of it, as that run's manifest has it."""


def earlier_keys(against: Folders, stage: str, settings: Mapping[str, Any]) -> list[KeyFile]:
    """Return the keys a stage of earlier runs kept; ``settings`` are those it must agree in.

    Raises:
        DataError: a folder has no finished stage of this name, or one with other settings, or it
            kept no keys.
    """
    if against is None:
        return []
    folders = (against,) if isinstance(against, str) else against
    return [file for folder in folders for file in _keys_of(Path(folder), stage, settings)]


def _keys_of(out: Path, stage: str, settings: Mapping[str, Any]) -> list[KeyFile]:
    found = sorted(out.glob(f"stages/*-{stage}/manifest.json"))
    if len(found) != 1:
        raise DataError(
            f"pipeline.{stage}.against={out} has {len(found)} finished stages named {stage}, "
            f"expected one; give the output folder of a run with that stage"
        )
    manifest = Manifest.read(found[0])
    for name, value in settings.items():
        if manifest.settings.get(name) != value:
            raise DataError(
                f"{found[0].parent} was made with {name}={manifest.settings.get(name)!r}, this run "
                f"has {name}={value!r}; their keys never meet: use the same"
            )
    if not manifest.settings.get("keep_keys"):
        raise DataError(
            f"{found[0].parent} kept no keys; run it again with pipeline.{stage}.keep_keys=true"
        )
    folder = found[0].parent
    return [
        KeyFile(str(folder / name), digest)
        for name, digest in sorted(manifest.files.items())
        if name.startswith("keys/")
    ]


def check_files(files: list[KeyFile]) -> None:
    """Raise DataError if a file is missing or is not the one its manifest names."""
    for file in files:
        path = Path(file.path)
        if not path.is_file():
            raise DataError(f"{path} is missing; restore it, or leave its run out of against=")
        if digest_of_file(path) != file.digest:
            raise DataError(f"{path} is damaged; restore it, or leave its run out of against=")
