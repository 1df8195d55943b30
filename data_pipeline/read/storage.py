"""Where the bytes of inputs lie: local paths, and addresses that ``fsspec`` opens (``s3://``...).

Lists come back sorted, so that they depend on names alone. A remote file is copied before it is
read: its readers go back and forth, and its digest is compared with the one it was noted with.

    with local_copy("s3://bucket/crawl.warc.gz", folder, sha256) as path: ...
"""

import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from llmtrain.errors import DataError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAGIC = re.compile(r"[*?\[]")
_CHUNK_BYTES = 1 << 20


class Listing(NamedTuple):
    """What a path, a folder or a glob stands for."""

    root: str
    """The folder that names are told from."""
    paths: list[str]
    """Files, sorted."""
    is_folder: bool
    """Whether a folder was named, so that not every file in it need be meant."""


def is_remote(path: str) -> bool:
    """Whether ``fsspec`` has to open it."""
    return _REMOTE.match(path) is not None and not path.startswith("file://")


def list_files(key: str, name: str) -> Listing:
    """Return the files that a path, a folder or a glob stands for; hidden ones are left out.

    Raises:
        DataError: there are none.
    """
    listing = _list_remote(key, name) if is_remote(name) else _list_local(name)
    if not listing.paths:
        what = "is a folder without files" if listing.is_folder else "matches no file"
        raise DataError(f"{key}={name} {what}; check the path")
    return listing


def _list_local(name: str) -> Listing:
    name = name.removeprefix("file://")
    if os.path.isdir(name):
        found = [
            os.path.join(folder, file)
            for folder, files in _walk(name)
            for file in files
            if not _hidden(os.path.relpath(os.path.join(folder, file), name))
        ]
        return Listing(name, sorted(p for p in found if os.path.isfile(p)), True)
    if os.path.isfile(name):
        return Listing(os.path.dirname(name), [name], False)
    found = sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p))
    return Listing(_fixed_part(name), found, False)


def _walk(name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, its files) of a tree; links are followed, but never into what holds them."""
    above = {name: frozenset((os.path.realpath(name),))}
    for folder, below, files in os.walk(name, followlinks=True):
        held, places = above.pop(folder), []
        for entry in below:
            place = os.path.join(folder, entry)
            real = os.path.realpath(place)
            if real not in held:
                above[place] = held | {real}
                places.append(entry)
        below[:] = places
        yield folder, files


def _list_remote(key: str, name: str) -> Listing:
    system, path = _system(key, name)
    try:
        if _MAGIC.search(path):
            folder, found = False, system.glob(path)
            found = [p for p in found if system.isfile(p)]
            path = _fixed_part(path)
        elif system.isdir(path):
            folder, found = True, [p for p in system.find(path) if not _hidden(_below(p, path))]
        else:
            folder, found = False, [path] if system.exists(path) else []
            path = path.rpartition("/")[0]
    except OSError as error:
        raise DataError(f"{key}={name} cannot be listed: {error}; check the address") from error
    paths = sorted(system.unstrip_protocol(p) for p in found)
    return Listing(system.unstrip_protocol(path), paths, folder)


def _system(key: str, name: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(name)
    except ImportError as error:
        raise DataError(f"{key}={name} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise DataError(f"{key}={name} is no address fsspec knows: {error}") from error
    return system, path


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _below(path: str, root: str) -> str:
    return path.lstrip("/").removeprefix(root.strip("/")).lstrip("/")


def _fixed_part(pattern: str) -> str:
    """Return the folder of a glob above its first wildcard."""
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "")


def relative_name(path: str, root: str) -> str:
    """Return the part of ``path`` below ``root`` with slashes, as UTF-8 can hold it."""
    name = _below(path, root) if is_remote(path) else os.path.relpath(path, root or ".")
    return name.replace(os.sep, "/").encode("utf-8", "replace").decode()


def open_bytes(path: str) -> IO[bytes]:
    """Open a file for reading, wherever it lies."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = _system("input", path)
    stream: IO[bytes] = system.open(name, "rb")
    return stream


def digest_of_raw(path: str) -> tuple[str, int]:
    """Return the sha256 and the size of a file."""
    digest, size = hashlib.sha256(), 0
    with open_bytes(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def size_of(path: str) -> int:
    """Return the bytes of a file."""
    if not is_remote(path):
        return os.stat(path).st_size
    system, name = _system("input", path)
    return int(system.size(name) or 0)


def stamp(path: str) -> list[Any] | None:
    """Return what changes when a file does, or None where nothing cheap tells."""
    if not is_remote(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    system, name = _system("input", path)
    facts = system.info(name)
    for tag in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"):
        if facts.get(tag):
            return [facts.get("size"), str(facts[tag])]
    return None


@contextmanager
def local_copy(path: str, folder: Path | None, sha256: str) -> Iterator[Path]:
    """Give a local path to a file; a remote one is copied into ``folder`` for as long as needed.

    Raises:
        DataError: a remote file is no longer the one that ``sha256`` was taken of.
    """
    if not is_remote(path):
        yield Path(path.removeprefix("file://"))
        return
    place = Path(tempfile.mkdtemp(prefix="input-", dir=folder))
    try:
        copy = place / (PurePosixPath(path).name or "input")
        digest = hashlib.sha256()
        with open_bytes(path) as stream, copy.open("wb") as file:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise DataError(f"{path} has changed since the run began; give the command again")
        yield copy
    finally:
        shutil.rmtree(place, ignore_errors=True)
