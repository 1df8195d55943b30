"""The files of a token store on this machine: listed once, mapped when they are first read.

A mapping keeps no descriptor, so a store may have more shards than a process may open files
(Python's own ``mmap`` keeps one for as long as the mapping lives). ``llmtrain.data.remote`` has the
same two classes for stores that are fetched.

    folder = LocalFolder(Path("stores/wiki"))
    folder.file("part-00000.bin", folder.sizes()["part-00000.bin"]).view()[:16]
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from llmtrain.errors import DataError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


class StoreFile(Protocol):
    """One file of a store, as a shard reads it."""

    @property
    def name(self) -> str:
        """Where it is, for messages."""

    @property
    def size(self) -> int:
        """Bytes."""

    def view(self) -> memoryview:
        """Return all bytes, mapped; only those that were asked for with ``need`` are right."""

    def need(self, start: int, end: int) -> None:
        """Have the bytes [start, end) in the view."""

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end), without keeping them."""


class Folder(Protocol):
    """Where a store is."""

    @property
    def name(self) -> str:
        """Its path or address, for messages."""

    @property
    def is_remote(self) -> bool:
        """Whether its files are fetched before they are read."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name; empty where there is no such folder."""

    def has(self, name: str) -> bool:
        """Whether it holds a file."""

    def content(self, name: str) -> bytes:
        """Return a whole file; FileNotFoundError where there is none."""

    def file(self, name: str, size: int) -> StoreFile:
        """Return a file of ``size`` bytes; nothing is read yet."""

    def whole(self, name: str) -> Path:
        """Return where a whole file lies on this machine."""

    def stamp(self, names: Iterable[str]) -> str:
        """Return what changes with the files, where no manifest tells."""

    def keyed(self, key: str) -> "Folder":
        """Return the folder as the place of the store whose content ``key`` tells."""


class LocalFile:
    """A file of this machine."""

    __slots__ = ("_mapped", "name", "size")

    def __init__(self, name: str, size: int) -> None:
        """Take the path ``name``; nothing is opened."""
        self.name = name
        self.size = size
        self._mapped: memoryview | None = None

    def view(self) -> memoryview:
        """Return all bytes, mapped read-only."""
        if self._mapped is None:
            self._mapped = map_file(self.name, self.size)
        return self._mapped

    def need(self, start: int, end: int) -> None:
        """Do nothing: all bytes are here."""

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end); the file is not mapped for them."""
        descriptor = opened(self.name)
        try:
            return os.pread(descriptor, end - start, start)
        finally:
            os.close(descriptor)


class LocalFolder:
    """A folder of this machine."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        """Name ``path``."""
        self.path = path
        self.name = str(path)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name, from one listing."""
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def has(self, name: str) -> bool:
        """Whether it holds a file."""
        return (self.path / name).is_file()

    def content(self, name: str) -> bytes:
        """Return a whole file."""
        return (self.path / name).read_bytes()

    def file(self, name: str, size: int) -> LocalFile:
        """Return a file."""
        return LocalFile(f"{self.name}/{name}", size)

    def whole(self, name: str) -> Path:
        """Return the path of a file."""
        return self.path / name

    def stamp(self, names: Iterable[str]) -> str:
        """Return nothing: no copy is kept that could be stale."""
        return ""

    def keyed(self, key: str) -> "LocalFolder":
        """Return the folder itself: its files are read in place."""
        return self


def opened(path: str) -> int:
    """Return a descriptor of a file.

    Raises:
        DataError: it is missing or may not be read.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); copy or write the store again"
        ) from None


def map_file(path: str, size: int) -> memoryview:
    """Map ``size`` bytes of a file read-only; unmapped when the last view of them is gone.

    Raises:
        DataError: the file is missing or shorter, or the system allows no further mapping.
    """
    descriptor = opened(path)
    try:
        found = os.fstat(descriptor).st_size
        if found < size:  # reading beyond its end would kill the process
            raise DataError(
                f"{path} holds {found:,} bytes, {size:,} are expected; it is damaged or still "
                "being copied: copy or write the store again"
            )
        address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise DataError(
            f"{path} cannot be mapped ({reason}); a process may map vm.max_map_count files, two "
            "per shard: raise it with sysctl, or write larger shards"
        )
    region = (ctypes.c_char * size).from_address(address)
    weakref.finalize(region, _LIBC.munmap, address, size).atexit = False
    return memoryview(region).cast("B").toreadonly()
