"""Pages that lie as single files: a folder of HTML, text, Markdown or code, a group at a time.

A file is named by its path below the folder that was given, as ``file:///SOURCE/PATH``, so that its
id and its address do not depend on where the folder lies, and pages of two sources never share one.

    for page in read_pages(file, max_record_bytes=16 << 20):
        ...
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote

from data_pipeline.read.encoding import has_mark
from data_pipeline.read.inputs import RawFile, group_digest
from data_pipeline.read.page_kinds import PageKind, page_kind
from data_pipeline.read.rows import Unreadable
from data_pipeline.read.storage import digest_of_raw, open_bytes, relative_name, size_of
from llmtrain.errors import DataError

_HEAD_BYTES = 8192


class Page(NamedTuple):
    """One file with its content."""

    source: str
    """Source it belongs to."""
    name: str
    """Path below the folder, with slashes."""
    kind: PageKind
    """What it holds."""
    payload: bytes
    """Its bytes."""
    sha256: str
    """Their digest."""

    @property
    def url(self) -> str:
        """Address that names it."""
        return f"file:///{quote(self.source)}/{quote(self.name)}"

    @property
    def metadata(self) -> dict[str, str]:
        """What is noted of it."""
        noted = {"kind": self.kind.name}
        return {**noted, "code_language": self.kind.language} if self.kind.language else noted

    @property
    def is_binary(self) -> bool:
        """Whether it holds zeros where text has none."""
        return b"\0" in self.payload[:_HEAD_BYTES] and not has_mark(self.payload)


def read_pages(file: RawFile, max_record_bytes: int) -> Iterator[Page | Unreadable]:
    """Yield the files of a group in order.

    Raises:
        DataError: they are no longer those that were fingerprinted.
    """
    digests: list[str] = []
    for number, path in enumerate(file.members):
        name = relative_name(path, file.path)
        size = size_of(path)
        kind = page_kind(path)
        if size > max_record_bytes or kind is None:
            digests.append(digest_of_raw(path)[0])
            reason = f"{name} has {size} bytes, more than max_record_bytes={max_record_bytes}"
            yield Unreadable(number, size, reason)
            continue
        with open_bytes(path) as stream:
            payload = stream.read()
        digests.append(hashlib.sha256(payload).hexdigest())
        yield Page(file.source, name, kind, payload, digests[-1])
    if group_digest(file, digests) != file.sha256:
        raise DataError(
            f"files of {file.path} have changed since the run began; give the command again"
        )
