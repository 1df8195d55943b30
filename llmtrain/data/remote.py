"""Stores on object storage or a network file system, read through a cache on a local disk.

A ``.bin`` or ``.idx`` is a sparse local file of its full size, mapped like any other, beside a file
with one byte per block that says whether the block is here. A block is fetched when one of its
bytes is first needed, written and synced before its byte is set: what is marked is whole, however a
process ended. The ranks of a node share the cache: a lock on the block's byte keeps two of them
from fetching the same one, and if it fails both write the same bytes. Entries are keyed by the hash
of the manifest, which covers the digest of every file; nothing is ever dropped: remove the folder
between runs to free it.

    store = TokenStore.open("s3://bucket/stores/wiki", cache_dir="/local/ssd/llmtrain")
"""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import blake3

from llmtrain.data.files import StoreFile, map_file
from llmtrain.data.manifest import sync
from llmtrain.errors import DataError

BLOCK_BYTES = 1 << 22
"""Bytes fetched at a time; part of the cache's key."""
FETCH_THREADS = 16
"""Blocks of a batch that are fetched at once."""
RETRY_AFTER_S = (1.0, 4.0, 16.0)
"""Pauses before a request that failed is made again."""
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
    "abfss": "adlfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp",
    "sftp": "paramiko", "ssh": "paramiko", "oci": "ocifs", "webdav": "webdav4",
}  # fmt: skip
"""What has to be installed for a protocol."""

T = TypeVar("T")


class RemoteFolder:
    """A folder behind an fsspec file system."""

    is_remote = True

    def __init__(self, url: str, filesystem: Any, root: str, cache: Path) -> None:
        """Use ``at``; ``cache`` is where blocks of this folder are kept."""
        self.name = url.rstrip("/")
        self._filesystem, self._root, self._cache = filesystem, root.rstrip("/"), cache

    @classmethod
    def at(cls, url: str, cache_dir: Path) -> "RemoteFolder":
        """Reach the folder ``url``.

        Raises:
            DataError: a package is missing, or fsspec does not know the protocol.
        """
        try:
            import fsspec

            filesystem, root = fsspec.url_to_fs(url)
        except ImportError:
            protocol = url.partition("://")[0]
            wanted = " ".join(dict.fromkeys(["fsspec", PACKAGES.get(protocol, protocol)]))
            raise DataError(
                f"{url} needs a package that is not installed; run `pip install {wanted}`"
            ) from None
        except ValueError as error:
            raise DataError(
                f"{url} cannot be reached ({error}); use an address fsspec knows, such as "
                "s3://BUCKET/DIR, gs://BUCKET/DIR or file:///DIR"
            ) from None
        return cls(url, filesystem, root, cache_dir)

    def keyed(self, key: str) -> "RemoteFolder":
        """Return the folder with the cache of the content that ``key`` tells."""
        cache = self._cache / f"{key[:32]}-{BLOCK_BYTES >> 10}k"
        return RemoteFolder(self.name, self._filesystem, self._root, cache)

    def stamp(self, names: Iterable[str]) -> str:
        """Return a hash of what the file system says of the files: size, time, version."""
        digest = blake3.blake3(self.name.encode())
        for name in names:
            digest.update(str(self._ask(name, self._filesystem.ukey)).encode())
        return str(digest.hexdigest())

    def has(self, name: str) -> bool:
        """Whether it holds a file."""
        return bool(self._ask(name, lambda path: self._filesystem.isfile(path)))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name, from one listing."""
        try:
            entries = self._ask("", lambda path: self._filesystem.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"])
            for entry in entries
            if entry["type"] == "file"
        }

    def content(self, name: str) -> bytes:
        """Return a whole file."""
        content: bytes = self._ask(name, lambda path: self._filesystem.cat_file(path))
        return content

    def span(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file.

        Raises:
            DataError: there are fewer.
        """
        try:
            found: bytes = self._ask(
                name, lambda path: self._filesystem.cat_file(path, start=start, end=end)
            )
        except FileNotFoundError:
            raise DataError(
                f"{self.name}/{name} is missing, the store lists it; copy the store again"
            ) from None
        if len(found) != end - start:
            raise DataError(
                f"{self.name}/{name} gave {len(found):,} bytes where [{start:,}, {end:,}) was "
                "asked for; it is truncated or still being copied: copy the store again"
            )
        return found

    def file(self, name: str, size: int) -> "RemoteFile":
        """Return a file; nothing is fetched."""
        return RemoteFile(self, name, size, self._cache)

    def whole(self, name: str) -> Path:
        """Return where a whole file lies on this machine, fetched if it is not there."""
        path = self._cache / name
        if not path.is_file():
            temporary = path.with_name(f"{name}.{secrets.token_hex(6)}.tmp")
            try:
                content = self.content(name)
            except FileNotFoundError:
                return path  # stores of other programs have no records
            _make(self._cache)
            temporary.write_bytes(content)
            sync(temporary)
            temporary.rename(path)
        return path

    def _ask(self, name: str, request: Callable[[str], T]) -> T:
        """Make a request, again after a pause where it failed."""
        path = f"{self._root}/{name}" if name else self._root
        for pause_s in RETRY_AFTER_S:
            try:
                return request(path)
            except (FileNotFoundError, PermissionError):
                break
            except OSError:
                time.sleep(pause_s)
        try:
            return request(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(
                f"{self.name}/{name} cannot be read ({error}); check the network, the credentials "
                "and the address"
            ) from error


class RemoteFile:
    """A file whose blocks are fetched when they are first needed."""

    def __init__(self, folder: RemoteFolder, base: str, size: int, cache: Path) -> None:
        """Name the file ``base`` of ``folder``; nothing is fetched or written."""
        self.name = f"{folder.name}/{base}"
        self.size = size
        self._folder, self._base = folder, base
        self._path, self._marks = cache / base, cache / f"{base}.blocks"
        self._here = bytearray(-(-size // BLOCK_BYTES))
        self._mapped: memoryview | None = None
        self._opening = threading.Lock()

    def view(self) -> memoryview:
        """Return all bytes, mapped; those that were not asked for with ``need`` are zero."""
        with self._opening:
            if self._mapped is None:
                self._create()
                self._mapped = map_file(str(self._path), self.size)
        return self._mapped

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end) without keeping them."""
        if self.missing(start, end):
            return self._folder.span(self._base, start, end)
        return bytes(self.view()[start:end])

    def need(self, start: int, end: int) -> None:
        """Have the bytes [start, end) in the view."""
        for block in self.missing(start, end):
            self.fetch(block)

    def missing(self, start: int, end: int) -> list[int]:
        """Return the blocks of [start, end) that are not known to be here."""
        blocks = range(start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1)
        return [block for block in blocks if not self._here[block]]

    def fetch(self, block: int) -> None:
        """Have a block in the cache: by another process, or fetched now."""
        self.view()
        marks = os.open(self._marks, os.O_RDWR)
        try:
            # a lock of this process alone does not keep its own threads out: they write the same
            fcntl.lockf(marks, fcntl.LOCK_EX, 1, block)
            if os.pread(marks, 1, block) != b"\1":
                start = block * BLOCK_BYTES
                self._write(start, min(start + BLOCK_BYTES, self.size))
                os.pwrite(marks, b"\1", block)
        finally:
            os.close(marks)
        self._here[block] = 1

    def _write(self, start: int, end: int) -> None:
        content = self._folder.span(self._base, start, end)
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(descriptor, content[written:], start + written)
            os.fsync(descriptor)
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be written ({error.strerror}); make room on the disk of "
                "data.cache_dir or set another"
            ) from error
        finally:
            os.close(descriptor)

    def _create(self) -> None:
        """Make the sparse file and its marks; doing it twice changes nothing."""
        _make(self._path.parent)
        for path, size in ((self._path, self.size), (self._marks, len(self._here))):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)


def fetch_all(spans: Iterable[tuple[StoreFile, int, int]]) -> None:
    """Fetch what is missing of some spans, several blocks at a time."""
    wanted = {
        (file, block): None
        for file, start, end in spans
        if isinstance(file, RemoteFile)
        for block in file.missing(start, end)
    }
    if len(wanted) <= 1:
        for file, block in wanted:
            file.fetch(block)
        return
    with ThreadPoolExecutor(min(FETCH_THREADS, len(wanted)), "fetch") as pool:
        for done in [pool.submit(file.fetch, block) for file, block in wanted]:
            done.result()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache {folder} cannot be made ({error.strerror}); set data.cache_dir to a folder "
            "this process may write"
        ) from None
