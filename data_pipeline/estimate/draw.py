"""Nested samples of raw records, chosen by hashes and written as small raw files of their own.

Files are chosen by a hash of their name until ``read_bytes`` is reached, for every source alike;
of those, every record whose hash is below a threshold is copied. The thresholds are set so that a
record of any source has the same chance, and a smaller sample is a part of every larger one.

    draw = draw_samples(find_raw_files({"web": "crawl"}), FieldsConfig(), Path("scratch"), ...)
    draw.inputs[-1]   # {"web": "scratch/sample-2/web"}, the largest sample
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO

import blake3

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.read.inputs import RawFile, fingerprint
from data_pipeline.read.rows import Unreadable, read_text_file
from data_pipeline.read.storage import is_remote, local_copy, open_bytes, size_of
from data_pipeline.read.warc import read_warc
from llmtrain.errors import DataError

NESTED = (0.25, 0.5, 1.0)
"""Sizes of the samples, in shares of the largest."""
_BROKEN_LINE = b"{ a record that could not be read\n"


@dataclass(slots=True)
class FileDraw:
    """One file that was read."""

    source: str
    """Its source."""
    size: int
    """Its bytes."""
    shards: str = ""
    """What the names of shards made of its largest sample begin with; empty for single pages."""
    records: int = 0
    """Records in it."""
    chosen: int = 0
    """Records in the largest sample."""


@dataclass(slots=True)
class Draw:
    """The samples, and what they were drawn from."""

    num_files: int
    """Raw files of the whole input."""
    total_bytes: int
    """Bytes of the whole input."""
    files: list[FileDraw] = field(default_factory=list)
    """Files that were read."""
    inputs: list[dict[str, str]] = field(default_factory=list)
    """Source -> folder of every nested sample, smallest first."""

    @property
    def share(self) -> float:
        """Share of the records of the whole that the largest sample holds, estimated."""
        return sum(file.chosen for file in self.files) / max(1.0, self.records)

    @property
    def records(self) -> float:
        """Records of the whole, estimated from those of the files that were read."""
        read = sum(file.size for file in self.files)
        return sum(file.records for file in self.files) * self.total_bytes / max(1, read)


def draw_samples(
    files: Sequence[RawFile], fields: FieldsConfig, folder: Path, *, sample_bytes: int,
    read_bytes: int, max_record_bytes: int,
) -> Draw:  # fmt: skip
    """Write the nested samples below ``folder``; longer records are read as a run reads them.

    Raises:
        DataError: no record was chosen.
    """
    sized = [replace(file, size=file.size or _size(file)) for file in files]
    total = sum(file.size for file in sized)
    draw = Draw(num_files=len(files), total_bytes=total)
    by_source: dict[str, list[RawFile]] = {}
    for file in sized:
        by_source.setdefault(file.source, []).append(file)
    chosen = {s: _choose(members, read_bytes / max(1, total)) for s, members in by_source.items()}
    shares = {s: _bytes(chosen[s]) / max(1, _bytes(members)) for s, members in by_source.items()}
    share = min([1.0, sample_bytes / max(1, total), *shares.values()])
    draw.inputs = [
        {source: str(folder / f"sample-{i}" / source) for source in by_source}
        for i in range(len(NESTED))
    ]
    copied = 0
    for source, members in sorted(chosen.items()):
        targets = [Path(sample[source]) for sample in draw.inputs]
        for number, file in enumerate(members):
            records = _records(file, fields, folder, max_record_bytes)
            drawn = _copy(file, number, records, targets, share / shares[source])
            if drawn.chosen and file.format != "pages":
                drawn.shards = f"{source}-{copied:05d}"
                copied += 1
            draw.files.append(drawn)
    if not any(file.chosen for file in draw.files):
        raise DataError(
            f"the sample is empty: {share:.2e} of {draw.records:,.0f} records; raise "
            f"sample_bytes={sample_bytes}"
        )
    return draw


def _bytes(files: Sequence[RawFile]) -> int:
    return sum(file.size for file in files)


def _size(file: RawFile) -> int:
    if file.format == "hf":
        from data_pipeline.read.rows import hf_fingerprint

        return hf_fingerprint(file.path)[1]
    return size_of(file.path)


def _choose(files: Sequence[RawFile], share: float) -> list[RawFile]:
    """Return about ``share`` of the bytes of some files, at least one file, in their order."""
    left = share * _bytes(files)
    chosen: set[int] = set()
    for i in sorted(range(len(files)), key=lambda i: (_hash(files[i].name), files[i].path)):
        if not chosen or files[i].size <= left:
            chosen.add(i)
            left -= files[i].size
    return [file for i, file in enumerate(files) if i in chosen]


def _hash(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = blake3.blake3("\0".join(map(str, key)).encode("utf-8", "replace")).digest(length=8)
    return int.from_bytes(digest, "big") / 2**64


def _copy(
    file: RawFile, number: int, records: Iterable[tuple[int, bytes | str]],
    targets: Sequence[Path], share: float,
) -> FileDraw:  # fmt: skip
    """Copy the chosen records of one file into every sample they belong to."""
    drawn = FileDraw(source=file.source, size=file.size)
    ending = ".jsonl"
    if file.format == "warc":
        ending = ".warc.gz" if file.path.lower().endswith(".gz") else ".warc"
    with ExitStack() as stack:
        outputs: dict[int, IO[bytes]] = {}
        for place, record in records:
            drawn.records += 1
            rank = _hash(file.name, place)
            if rank >= share:
                continue
            drawn.chosen += 1
            for i, part in enumerate(NESTED):
                if rank >= share * part:
                    continue
                if isinstance(record, str):
                    ending = PurePosixPath(record).suffix
                    _copy_page(record, targets[i] / f"{number:05d}-{place}{ending}")
                    continue
                if i not in outputs:
                    targets[i].mkdir(parents=True, exist_ok=True)
                    path = targets[i] / f"{number:05d}{ending}"
                    outputs[i] = stack.enter_context(path.open("wb"))
                outputs[i].write(record)
    return drawn


def _copy_page(page: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_bytes(page) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def _records(
    file: RawFile, fields: FieldsConfig, scratch: Path, max_record_bytes: int
) -> Iterator[tuple[int, bytes | str]]:
    """Yield (number or offset, raw bytes of a record, or the path of a page)."""
    if file.format != "pages" and is_remote(file.path):
        file = fingerprint(file)  # the copy that is read has to be this one
    if file.format == "warc":
        with local_copy(file.path, scratch, file.sha256) as path, path.open("rb") as raw:
            last = -1
            for record in read_warc(path, max_record_bytes):
                if record.offset != last:  # a gzip member may hold many records
                    raw.seek(record.offset)
                    yield record.offset, raw.read(record.length)
                last = record.offset
    elif file.format == "pages":
        yield from enumerate(file.members)
    else:
        for i, item in enumerate(read_text_file(file, fields, max_record_bytes, scratch)):
            yield i, _BROKEN_LINE if isinstance(item, Unreadable) else _line(item.text, fields, {
                fields.url: item.url, fields.timestamp: item.timestamp,
                **({fields.id: item.id} if fields.id else {}), **item.metadata,
            })  # fmt: skip


def _line(text: str, fields: FieldsConfig, more: dict[str, str]) -> bytes:
    row = {**more, fields.text: text}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
