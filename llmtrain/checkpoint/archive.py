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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from llmtrain.data.manifest import sync
from llmtrain.errors import CheckpointError
from llmtrain.run.directory import write_json

FORMAT = 1
"""Version of the layout on disk; a reader refuses a newer one."""

META = "meta.json"
_BLOCK_BYTES = 1 << 24
_STEP = re.compile(r"step-(\d{9})")
_ASIDE = ".tmp-"
DAMAGED = ".damaged-"
"""Before the name of a checkpoint that is not used any more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose files are as they were written."""

    path: Path
    """Its folder."""
    meta: dict[str, Any]
    """What ``meta.json`` holds: step, tokens, facts, journal, guard, carried, scores, files."""

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.meta["step"])


class Tally:
    """Bytes that a long work has gone through; others read them meanwhile."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count some more; calls that meet may lose one, which still moves."""
        self.num_bytes += num_bytes


def folder_name(step: int) -> str:
    """Name of the folder of one step; sorts by step."""
    return f"step-{step:09d}"


def fresh_aside(directory: Path, step: int, attempt: int = 0) -> Path:
    """Make an empty folder to write ``step`` into; drops what a crash left behind."""
    clean(directory)
    aside = aside_path(directory, step, attempt)
    aside.mkdir(parents=True)
    return aside


def aside_path(directory: Path, step: int, attempt: int = 0) -> Path:
    """Where the checkpoint of ``step`` is written before it is committed.

    ``attempt`` tells the saves of one process apart, so that a failed one leaves nothing to the
    next.
    """
    return directory / f"{_ASIDE}{folder_name(step)}.{attempt}"


def clean(directory: Path) -> None:
    """Delete what was never committed and what was not deleted to the end."""
    for left in uncommitted(directory):
        shutil.rmtree(left, ignore_errors=True)


def uncommitted(directory: Path) -> list[Path]:
    """Folders of what was never committed, or is not yet, or is being deleted."""
    return list(directory.glob(f"{_ASIDE}*"))


def remove(path: Path) -> None:
    """Delete a checkpoint; no scan sees a part of it, however this process ends."""
    hidden = path.with_name(f"{_ASIDE}old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def digests(
    folder: Path, names: Iterable[str], tally: Tally | None = None
) -> dict[str, dict[str, Any]]:
    """Size and blake3 of the named files, several at a time; ``tally`` counts what is read."""

    def one(name: str) -> dict[str, Any]:
        path = folder / name
        return {"bytes": path.stat().st_size, "blake3": _file_digest(path, tally or Tally())}

    names = sorted(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def commit(
    aside: Path,
    fields: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    here: Collection[str] | None = None,
) -> Path:
    """Write ``meta.json`` last and give the folder its name; from here on the checkpoint exists.

    ``fields`` hold the step. What else lies in ``aside`` is deleted. Those of the ``files`` that
    have to be ``here`` are all, or the names given.
    Raises CheckpointError when a file another rank wrote is not there.
    """
    here = files if here is None else here
    missing = sorted(name for name in here if _size(aside / name) != files[name]["bytes"])
    if missing:
        raise CheckpointError(
            f"{missing[0]} was written by another rank but is not in {aside} as it was written; "
            "the run folder must be on a file system that all ranks share"
        )
    for path in aside.iterdir():
        if path.name not in here:
            path.unlink()
    meta = {"format": FORMAT, **fields, "files": dict(files)}
    write_json(aside / META, {**meta, "meta_blake3": _meta_digest(meta)})
    final = aside.with_name(folder_name(int(fields["step"])))
    install(aside, final)
    return final


def amend(path: Path, **fields: Any) -> None:
    """Put other ``fields`` into the ``meta.json`` of a checkpoint; a reader sees the old or new."""
    meta = {**read_meta(path), **fields}
    write_json(path / META, {**meta, "meta_blake3": _meta_digest(meta)})


def install(aside: Path, final: Path) -> None:
    """Give a whole folder the name under which it exists; what has it already makes way."""
    if final.exists():
        remove(final)
    sync(aside)
    aside.rename(final)
    sync(final.parent)


def step_of(name: str) -> int | None:
    """Step of the checkpoint whose folder has this name; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def scan(directory: Path) -> list[tuple[int, Path]]:
    """Folders that have the name of a checkpoint, newest first."""
    if not directory.is_dir():
        return []
    named = [(step_of(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted(((step, path) for step, path in named if step is not None), reverse=True)


def newest_good(directory: Path, *, move_damaged: bool = False) -> Checkpoint | None:
    """Find the newest checkpoint whose files are all as written; see ``first_good``."""
    paths = [path for _, path in scan(directory)]
    return first_good(directory, paths, open_checkpoint, move_damaged=move_damaged)


def first_good(
    directory: Path,
    paths: Sequence[Path],
    check: Callable[[Path], Checkpoint],
    *,
    move_damaged: bool = False,
) -> Checkpoint | None:
    """Find the first of ``paths`` that ``check`` opens, and say which were passed over.

    ``move_damaged`` renames those before it to ``.damaged-step-...``, so that they are met once.
    Raises CheckpointError when none of them can be opened.
    """
    found: list[tuple[Path, str]] = []
    good = None
    for path in paths:
        try:
            good = check(path)
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


def open_checkpoint(path: Path, tally: Tally | None = None) -> Checkpoint:
    """Check a checkpoint against its ``meta.json``; raises CheckpointError naming the bad file."""
    opened = open_unread(path)
    refuse(path, differing(opened, opened.meta["files"], tally))
    return opened


def open_unread(path: Path) -> Checkpoint:
    """Check a checkpoint but for what its files hold; raises CheckpointError naming the bad one."""
    meta = read_meta(path)
    for name, record in meta["files"].items():
        size = _size(path / name)
        if size != record["bytes"]:
            have = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{path.name} is damaged: {name} {have}, expected {record['bytes']:,} bytes"
            )
    return Checkpoint(path, meta)


def differing(opened: Checkpoint, names: Iterable[str], tally: Tally | None = None) -> list[str]:
    """Those of the named files that do not match their checksum."""
    files = opened.meta["files"]
    found = digests(opened.path, names, tally)
    return [name for name, record in found.items() if record["blake3"] != files[name]["blake3"]]


def refuse(path: Path, names: Sequence[str]) -> None:
    """Raise CheckpointError where there are files that do not match their checksum."""
    if names:
        raise CheckpointError(
            f"{path.name} is damaged: {names[0]} does not match its checksum in {META}"
        )


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
    target = path.with_name(f"{DAMAGED}{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def read_meta(path: Path) -> dict[str, Any]:
    """Read ``meta.json`` without its own digest; raises CheckpointError where that is another."""
    try:
        content = (path / META).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is damaged: it has no {META}") from error
    return parse_meta(content, path.name)


def parse_meta(content: bytes, name: str) -> dict[str, Any]:
    """Understand the ``meta.json`` of the checkpoint ``name``; raises CheckpointError."""
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{name} is damaged: {META} is not JSON") from error
    digest = meta.pop("meta_blake3", None) if isinstance(meta, dict) else None
    if digest is None or digest != _meta_digest(meta):
        raise CheckpointError(f"{name} is damaged: {META} does not match its own checksum")
    if meta["format"] > FORMAT:
        raise CheckpointError(
            f"{name} has format {meta['format']}, this llmtrain reads up to {FORMAT}; "
            "read it with the version that wrote it"
        )
    return dict(meta)


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _meta_digest(meta: Mapping[str, Any]) -> str:
    return blake3(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path, tally: Tally) -> str:
    """Hash a file in blocks: mapped whole, it would count as memory of this process."""
    digest, block = blake3(max_threads=blake3.AUTO), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            tally.add(count)
    return digest.hexdigest()
