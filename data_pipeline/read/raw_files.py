"""Where the raw files of a finished pipeline lie today, told by their digests.

``OUT/inputs.json`` notes every file with its digest under the path it was given by. A path that
leads nowhere from here is tried from every folder above OUT, so that a tree that was moved as a
whole is found; files that were moved on their own are looked for in ``raw``, by size and digest.

    files = RawFiles(Path("corpus"), raw=["/archive/crawl"])
    files.find(sha256="39e5...", size=1_650_593, name="crawl-00000.warc.gz")
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

from data_pipeline.read.inputs import HF_PREFIX
from data_pipeline.read.storage import digest_of_raw, is_remote, list_files, size_of
from llmtrain.errors import DataError

INPUTS = "inputs.json"
"""Name of the file in a pipeline's folder."""


class Noted(NamedTuple):
    """A raw file as the pipeline noted it."""

    path: str
    """Path as it was given; for a group of pages, their folder."""
    size: int | None
    """Bytes, where noted."""


class RawFiles:
    """The raw files behind one pipeline's folder."""

    def __init__(self, folder: Path | None, raw: Sequence[str] = ()) -> None:
        """Read what ``folder`` notes; ``raw`` are paths, folders or globs to look in besides.

        Raises:
            DataError: the notes are damaged, or ``raw`` names nothing.
        """
        self._folder = folder
        self._noted, self._page_folders = _read_notes(folder)
        self._others = [path for name in raw for path in list_files("raw", name).paths]
        self._digests: dict[str, str] = {}

    def find(self, sha256: str) -> str:
        """Return the path or address of a raw file.

        Raises:
            DataError: it is not where it was, and nowhere in ``raw``.
        """
        noted = self._noted.get(sha256)
        if noted is not None:
            for path in self._places(noted.path):
                if _stands(path, noted.size):
                    return path
            if noted.path.startswith(HF_PREFIX):
                return noted.path  # a name on the hub, unless it was a folder
        name = "" if noted is None else PurePosixPath(noted.path).name
        found = self._search(sha256, None if noted is None else noted.size, name)
        if found is not None:
            return found
        where = f"as {noted.path}" if noted is not None else f"and {self._folder} does not note it"
        raise DataError(
            f"the raw file with sha256 {sha256[:16]} was read {where}; it is not there now as it "
            "was then: give raw=DIR where it lies"
        )

    def find_page(self, sha256: str, size: int, source: str, url: str) -> str:
        """Return the path of a page that was a file of its own, ``file:///SOURCE/PATH``.

        Raises:
            DataError: it is in none of the noted folders, and nowhere in ``raw``.
        """
        name = unquote(url.removeprefix(f"file:///{quote(source)}/"))
        for folder in self._page_folders:
            for path in self._places(f"{folder.rstrip('/')}/{name}"):
                if _stands(path, size):
                    return path
        found = self._search(sha256, size, PurePosixPath(name).name)
        if found is not None:
            return found
        raise DataError(
            f"the page {name} with sha256 {sha256[:16]} is in no folder it was read from; give "
            "raw=DIR where it lies"
        )

    def is_noted(self, sha256: str) -> bool:
        """Whether the digest is that of a whole input."""
        return sha256 in self._noted

    def _places(self, path: str) -> Iterator[str]:
        """Yield where a noted path may lead: from here, and from every folder above OUT."""
        yield path.removeprefix("file://")
        name = path.removeprefix(HF_PREFIX)
        if is_remote(path) or Path(name).is_absolute() or self._folder is None:
            return
        prefix = path[: len(path) - len(name)]
        yield from (f"{prefix}{above / name}" for above in self._folder.resolve().parents)

    def _search(self, sha256: str, size: int | None, name: str) -> str | None:
        """Look in ``raw``, files of the same name first."""
        same = [path for path in self._others if size is None or size_of(path) == size]
        for path in sorted(same, key=lambda path: PurePosixPath(path).name != name):
            if path not in self._digests:
                self._digests[path] = digest_of_raw(path)[0]
            if self._digests[path] == sha256:
                return path
        return None


def _read_notes(folder: Path | None) -> tuple[dict[str, Noted], list[str]]:
    """Digest -> file, and the folders of single pages."""
    path = None if folder is None else folder / INPUTS
    if path is None or not path.is_file():
        return {}, []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        noted = {
            entry["sha256"]: Noted(name, entry.get("size") or _stamped_size(entry))
            for name, entry in known.items()
        }
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; put it back, or give raw=DIR") from None
    return noted, sorted({name.rpartition("#")[0] for name in known if "#" in name})


def _stamped_size(entry: dict[str, list[int] | None]) -> int | None:
    stamp = entry.get("stamp")
    return stamp[0] if stamp else None


def _stands(path: str, size: int | None) -> bool:
    """Whether something of this size is there."""
    if path.startswith(HF_PREFIX):
        return Path(path.removeprefix(HF_PREFIX).partition(":")[0]).exists()
    try:
        return size_of(path) == size if size is not None else is_remote(path) or Path(path).exists()
    except OSError:
        return False
