"""Raw inputs: what a path, a glob, a folder, an address or ``hf:NAME`` means.

A source is a list of raw files in sorted order; every file is fingerprinted (sha256) before the
first task runs, so an input that is missing is one clear error at the start and never a smaller
corpus. Pages that lie as single files (HTML, text, Markdown, code) are gathered into groups, each
read by one task. A folder that holds crawls or tables is read for those alone.

    files = find_raw_files({"news": "crawl/*.warc.gz", "docs": "s3://bucket/manual"})
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import blake3

from data_pipeline.read.page_kinds import page_kind
from data_pipeline.read.storage import digest_of_raw, list_files, relative_name, size_of, stamp
from llmtrain.errors import DataError

HF_PREFIX = "hf:"
"""Marks an input that the ``datasets`` library reads."""
ROW_FORMATS = ("jsonl", "parquet", "hf")
"""Formats whose records hold text already."""
GROUP_BYTES = 64_000_000
"""Bytes of single files that one task reads."""
GROUP_FILES = 4096
"""Single files that one task reads at most."""
_PACKED = ("", ".gz", ".zst", ".bz2", ".xz")
_FORMATS = {
    **dict.fromkeys((".warc", ".warc.gz", ".wet", ".wet.gz"), "warc"),
    **{f".jsonl{end}": "jsonl" for end in _PACKED},
    **{f".ndjson{end}": "jsonl" for end in _PACKED},
    **{f".json{end}": "jsonl" for end in _PACKED if end},
    ".parquet": "parquet",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFile:
    """One input file of a source, or a group of single pages."""

    source: str
    """Source it belongs to."""
    path: str
    """Where it stands, or ``hf:NAME``; the folder of a group."""
    format: str
    """``warc``, ``jsonl``, ``parquet``, ``hf`` or ``pages``."""
    size: int = 0
    """Bytes."""
    sha256: str = ""
    """Digest of the whole file; of names and digests of the members for a group."""
    members: tuple[str, ...] = ()
    """Paths of the files of a group, in order."""
    group: int = 0
    """Number of the group in its folder."""

    @property
    def name(self) -> str:
        """Last part of the path: what manifests show, so that they do not depend on folders."""
        if self.format == "hf":
            return self.path
        last = PurePosixPath(self.path).name.encode("utf-8", "replace").decode()
        return f"{last}#{self.group:05d}" if self.format == "pages" else last


def document_id(source: str, *key: str) -> str:
    """blake3-128 of the source and what names the document inside it, as 32 hex digits."""
    return blake3.blake3("\0".join((source, *key)).encode()).hexdigest(length=16)


def find_raw_files(
    inputs: Mapping[str, str | Iterable[str]], *, key: str | None = None
) -> list[RawFile]:
    """Resolve source name -> path, glob, folder, address or ``hf:NAME`` (or a list), sorted.

    Messages call an input ``key``, or ``input.SOURCE``.

    Raises:
        DataError: nothing matches, the same file is named twice, the format is unknown, or two
            pages would have one address.
    """
    found: list[RawFile] = []
    for source, patterns in sorted(inputs.items()):
        names = [patterns] if isinstance(patterns, str) else list(patterns)
        said = key or f"input.{source}"
        files = [file for name in names for file in _expand(source, said, name)]
        paths = Counter(path for file in files for path in file.members or (file.path,))
        twice = [path for path, times in paths.items() if times > 1]
        if twice:
            raise DataError(f"{said} names {twice[0]} twice; name it once")
        _check_addresses(said, files)
        found += files
    if not found:
        example = f"{key}=PATH" if key else "input.NAME=PATH, such as input.web=crawl/*.warc.gz"
        raise DataError(f"no input given; say {example}")
    return found


def _check_addresses(key: str, files: Sequence[RawFile]) -> None:
    """Raise DataError if single pages of several folders are named alike below them."""
    if len({file.path for file in files if file.format == "pages"}) < 2:
        return
    seen: dict[str, str] = {}
    for file in files:
        for path in file.members:
            other = seen.setdefault(relative_name(path, file.path), path)
            if other != path:
                raise DataError(
                    f"{key}: {other} and {path} would have one address, and the url stage would "
                    "keep one of them; give a folder that holds both, or make them two sources"
                )


def _expand(source: str, key: str, name: str) -> list[RawFile]:
    if name.startswith(HF_PREFIX):
        return [RawFile(source=source, path=name, format="hf")]
    listing = list_files(key, name)
    formats = {path: _format(path) for path in listing.paths}
    pages = [path for path in listing.paths if formats[path] == "pages"]
    files = [
        RawFile(source=source, path=path, format=form)
        for path, form in formats.items()
        if form not in ("", "pages")
    ]
    left = sum(not form for form in formats.values())
    if listing.is_folder:
        left += len(pages) if files else 0
        pages = [] if files else pages
    elif left:
        wrong = next(path for path, form in formats.items() if not form)
        raise DataError(f"{key}: {wrong} is of no known kind; expected one of {_known()}")
    files += _groups(source, listing.root, pages)
    if not files:
        raise DataError(f"{key}={name} holds no file that ends in one of {_known()}")
    if left:
        logger.info("%s=%s: %d files of other kinds are left out", key, name, left)
    return files


def _known() -> str:
    return f"{', '.join(sorted(_FORMATS))}, or a page (.html, .txt, .md, .py and the like)"


def _format(path: str) -> str:
    """Return how a file is read, or an empty string."""
    name = PurePosixPath(path).name.lower()
    for suffix in sorted(_FORMATS, key=len, reverse=True):
        if name.endswith(suffix):
            return _FORMATS[suffix]
    return "pages" if page_kind(name) is not None else ""


def _groups(source: str, root: str, paths: Sequence[str]) -> Iterator[RawFile]:
    """Yield consecutive files as groups of bounded size."""
    members: list[str] = []
    size = group = 0
    for path in [*paths, ""]:
        weight = size_of(path) if path else GROUP_BYTES + 1
        if members and (size + weight > GROUP_BYTES or len(members) >= GROUP_FILES):
            yield RawFile(
                source=source, path=root, format="pages", members=tuple(members), group=group,
                size=size,
            )  # fmt: skip
            members, size, group = [], 0, group + 1
        members.append(path)
        size += weight


def identity_of(file: RawFile) -> tuple[str, list[Any] | None]:
    """Return (what names a file among inputs, what changes when its content may have)."""
    if file.format == "pages":
        stamps = [(path, stamp(path)) for path in file.members]
        known = all(entry is not None for _, entry in stamps)
        text = hashlib.sha256(repr(stamps).encode("utf-8", "replace")).hexdigest()
        return f"{file.path}#{file.group}", [file.size, text] if known else None
    return file.path, stamp(file.path)


def fingerprint(file: RawFile) -> RawFile:
    """Return the file with its size and digest; for ``hf:`` the fingerprint ``datasets`` keeps."""
    if file.format == "hf":
        from data_pipeline.read.rows import hf_fingerprint

        digest, size = hf_fingerprint(file.path)
    elif file.format == "pages":
        digests = [digest_of_raw(path) for path in file.members]
        digest = group_digest(file, [digest for digest, _ in digests])
        size = sum(size for _, size in digests)
    else:
        digest, size = digest_of_raw(file.path)
    return replace(file, size=size, sha256=digest)


def group_digest(file: RawFile, digests: Iterable[str]) -> str:
    """Digest of a group: of the names of its members below its folder, and of their digests."""
    names = (relative_name(path, file.path) for path in file.members)
    lines = (f"{digest} {name}\n" for digest, name in zip(digests, names, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_inputs(files: Iterable[RawFile]) -> list[dict[str, str]]:
    """Return what a stage's key and manifest say of raw files."""
    return [{"source": f.source, "name": f.name, "digest": f.sha256} for f in files]
