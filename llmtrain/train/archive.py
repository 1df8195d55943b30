"""The folder of checkpoints as files: written aside, checksummed, renamed in place, found by scan.

A checkpoint is ``step-000000100/`` with a valid ``meta.json``, which holds the size and the blake3
of every other file and a digest of itself. Nothing here knows what a tensor is.

    found = newest_good(Path("runs/demo/checkpoints"))   # None where there is no checkpoint yet
    found.path, found.meta["step"]
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from llmtrain.data.manifest import sync
from llmtrain.errors import CheckpointError
from llmtrain.train.rundir import write_json

FORMAT = 1
"""Version of the layout on disk; a reader refuses a newer one."""

META = "meta.json"
_STEP = re.compile(r"step-(\d{9})")
_ASIDE = ".tmp-"
_DAMAGED = ".damaged-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose files are as they were written."""

    path: Path
    """Its folder."""
    meta: dict[str, Any]
    """What ``meta.json`` holds: step, tokens, facts, carried, files."""

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.meta["step"])


def folder_name(step: int) -> str:
    """Name of the folder of one step; sorts by step."""
    return f"step-{step:09d}"


def fresh_aside(directory: Path, step: int) -> Path:
    """Make an empty folder to write ``step`` into; drops what a crash left behind."""
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"{_ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = aside_path(directory, step)
    aside.mkdir()
    return aside


def aside_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is committed."""
    return directory / f"{_ASIDE}{folder_name(step)}"


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and blake3 of the named files, several at a time."""

    def one(name: str) -> dict[str, Any]:
        path = folder / name
        return {"bytes": path.stat().st_size, "blake3": _file_digest(path)}

    names = sorted(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def commit(aside: Path, fields: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``meta.json`` last and give the folder its name; from here on the checkpoint exists.

    Raises CheckpointError when a file another rank wrote is not there.
    """
    missing = sorted(name for name in files if not (aside / name).exists())
    if missing:
        raise CheckpointError(
            f"{missing[0]} was written by another rank but is not in {aside}; the run folder must "
            "be on a file system that all ranks share"
        )
    meta = {"format": FORMAT, **fields, "files": dict(files)}
    write_json(aside / META, {**meta, "meta_blake3": _meta_digest(meta)})
    final = aside.with_name(aside.name.removeprefix(_ASIDE))
    if final.exists():
        set_aside(final)
    aside.rename(final)
    sync(final.parent)
    return final


def retire(directory: Path, keep_last: int, up_to_step: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints among those of at most ``up_to_step``.

    The one of ``up_to_step`` has just been written and is good, so a good one is always left.
    """
    old = [path for step, path in scan(directory) if step <= up_to_step][max(1, keep_last) :]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def scan(directory: Path) -> list[tuple[int, Path]]:
    """Folders that have the name of a checkpoint, newest first."""
    if not directory.is_dir():
        return []
    named = [(_STEP.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def newest_good(directory: Path, *, move_damaged: bool = False) -> Checkpoint | None:
    """Find the newest checkpoint whose files are all as written, and say which were passed over.

    ``move_damaged`` renames damaged ones to ``.damaged-step-...``, so that they are met once.
    Raises CheckpointError when there are checkpoints and none of them is whole.
    """
    found: list[tuple[Path, str]] = []
    good = None
    for _, path in scan(directory):
        try:
            good = open_checkpoint(path)
            break
        except CheckpointError as error:
            found.append((path, str(error)))
    if found and good is None:
        listed = "; ".join(reason for _, reason in found)
        raise CheckpointError(
            f"no checkpoint in {directory} is whole: {listed}; restore one from a copy, or delete "
            "the folder to start from the first step"
        )
    for path, reason in found:
        name = good.path.name if good else ""
        logger.warning("%s; falling back to the one before, %s", reason, name)
        if move_damaged:
            set_aside(path)
    return good


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint against its ``meta.json``; raises CheckpointError naming the bad file."""
    meta = _read_meta(path)
    files: dict[str, dict[str, Any]] = meta["files"]
    for name, record in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != record["bytes"]:
            have = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{path.name} is damaged: {name} {have}, expected {record['bytes']:,} bytes"
            )
    for name, record in digests(path, files).items():
        if record["blake3"] != files[name]["blake3"]:
            raise CheckpointError(
                f"{path.name} is damaged: {name} does not match its checksum in {META}"
            )
    return Checkpoint(path, meta)


def locate(path: Path) -> Checkpoint:
    """Open a checkpoint folder, or the newest good one of a run folder; raises CheckpointError."""
    if (path / META).exists() or _STEP.fullmatch(path.name):
        return open_checkpoint(path)
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = newest_good(directory)
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run folder (runs/NAME) or one of its "
            "checkpoints/step-... folders"
        )
    return found


def set_aside(path: Path) -> None:
    """Rename a checkpoint that is damaged or replaced, so that no scan meets it again."""
    target = path.with_name(f"{_DAMAGED}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / META).read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is damaged: it has no {META}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged: {META} is not JSON") from error
    digest = meta.pop("meta_blake3", None) if isinstance(meta, dict) else None
    if digest is None or digest != _meta_digest(meta):
        raise CheckpointError(f"{path.name} is damaged: {META} does not match its own checksum")
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"{path.name} has format {meta['format']}, this llmtrain reads up to {FORMAT}; "
            "read it with the version that wrote it"
        )
    return dict(meta)


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return blake3(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    if path.stat().st_size == 0:
        return blake3().hexdigest()
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
