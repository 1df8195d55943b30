"""Raw inputs: what a path, a glob or ``hf:NAME`` means, and the documents text files hold.

A source is a list of raw files in sorted order; every file is fingerprinted (sha256) before the
first task runs, so an input that is missing is one clear error at the start and never a smaller
corpus. Damaged rows are yielded as ``Unreadable`` and counted; a compressed text file that ends
early is refused, because nothing after the cut can be found again.

    files = find_raw_files({"news": "crawl/*.warc.gz"})
"""

import glob
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import blake3

from data_pipeline.config import FieldsConfig
from data_pipeline.document import Document, identity
from llmtrain.errors import DataError

HF_PREFIX = "hf:"
"""Marks an input that the ``datasets`` library reads."""
_CHUNK_BYTES = 1 << 20
_FORMATS = {
    ".warc": "warc", ".warc.gz": "warc", ".wet.gz": "warc", ".wet": "warc",
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFile:
    """One input file of a source."""

    source: str
    """Source it belongs to."""
    path: str
    """Where it stands, or ``hf:NAME``."""
    format: str
    """``warc``, ``jsonl``, ``parquet`` or ``hf``."""
    size: int = 0
    """Bytes."""
    sha256: str = ""
    """Digest of the whole file."""

    @property
    def name(self) -> str:
        """Last part of the path: what manifests show, so that they do not depend on folders."""
        return self.path if self.format == "hf" else Path(self.path).name


class Unreadable(NamedTuple):
    """A row that holds no document."""

    offset: int
    """Byte offset or row number in the file."""
    length: int
    """Bytes of it, where known."""
    reason: str
    """What was wrong."""


def document_id(source: str, *key: str) -> str:
    """blake3-128 of the source and what names the document inside it, as 32 hex digits."""
    return blake3.blake3("\0".join((source, *key)).encode()).hexdigest(length=16)


def find_raw_files(
    inputs: Mapping[str, str | Iterable[str]], *, key: str | None = None
) -> list[RawFile]:
    """Resolve source name -> path, glob, folder or ``hf:NAME`` (or a list of them), sorted.

    Messages call an input ``key``, or ``input.SOURCE``.

    Raises:
        DataError: nothing matches, the same file is named twice, or the format is unknown.
    """
    found: list[RawFile] = []
    for source, patterns in sorted(inputs.items()):
        names = [patterns] if isinstance(patterns, str) else list(patterns)
        said = key or f"input.{source}"
        paths = [p for name in names for p in _expand(said, name)]
        twice = [path for path, times in Counter(paths).items() if times > 1]
        if twice:
            raise DataError(f"{said} names {twice[0]} twice; name it once")
        found += [RawFile(source=source, path=p, format=_format(said, p)) for p in paths]
    if not found:
        example = f"{key}=PATH" if key else "input.NAME=PATH, such as input.web=crawl/*.warc.gz"
        raise DataError(f"no input given; say {example}")
    return found


def _expand(key: str, name: str) -> list[str]:
    if name.startswith(HF_PREFIX):
        return [name]
    path = Path(name)
    if path.is_dir():
        names = sorted(str(p) for p in path.rglob("*") if p.is_file() and _suffix(p.name))
        wanted = ", ".join(sorted(_FORMATS))
        if not names:
            raise DataError(f"{key}={name} holds no file that ends in {wanted}")
        return names
    if path.is_file():
        return [name]
    names = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
    if not names:
        raise DataError(f"{key}={name} matches no file; check the path")
    return names


def _suffix(name: str) -> str:
    return next((s for s in sorted(_FORMATS, key=len, reverse=True) if name.endswith(s)), "")


def _format(key: str, path: str) -> str:
    if path.startswith(HF_PREFIX):
        return "hf"
    suffix = _suffix(Path(path).name)
    if not suffix:
        known = ", ".join(sorted(_FORMATS))
        raise DataError(f"{key}: {path} is of no known kind; expected one of {known}")
    return _FORMATS[suffix]


def fingerprint(file: RawFile) -> RawFile:
    """Return the file with its size and digest; for ``hf:`` the fingerprint ``datasets`` keeps."""
    if file.format == "hf":
        rows = _open_hf(file)
        digest = f"{version('datasets')}-{rows._fingerprint}"
        return replace(file, size=len(rows), sha256=digest)
    with open(file.path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return replace(file, size=Path(file.path).stat().st_size, sha256=digest)


def file_inputs(files: Iterable[RawFile]) -> list[dict[str, str]]:
    """Return what a stage's key and manifest say of raw files."""
    return [{"source": f.source, "name": f.name, "digest": f.sha256} for f in files]


def read_text_file(file: RawFile, fields: FieldsConfig) -> Iterator[Document | Unreadable]:
    """Yield the documents of a JSONL, Parquet or Hugging Face input in order.

    Raises:
        DataError: the file is cut or damaged beyond rows, or its rows lack a field that was named.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hf": _read_hf}
    first, seen = True, False
    for ordinal, row, length in readers[file.format](file):
        if isinstance(row, str):
            yield Unreadable(ordinal, length, row)
            continue
        if first:
            _check_named(file, fields, row)
            first = False
        text = row.get(fields.text)
        if not isinstance(text, str):
            if not seen and fields.text not in row:
                raise _absent(
                    file, fields.text, row, "text_field= (pipeline.fields.text= in a run)"
                )
            yield Unreadable(ordinal, length, f"field {fields.text!r} holds no text")
            continue
        seen = True
        yield _document(file, fields, row, text, ordinal, length)


def _check_named(file: RawFile, fields: FieldsConfig, row: Mapping[str, Any]) -> None:
    """Refuse a first row without an optional field that does not have its default name."""
    usual = FieldsConfig()
    if fields.id is not None and fields.id not in row:
        raise _absent(file, fields.id, row, "id_field= (pipeline.fields.id= in a run)")
    if fields.url != usual.url and fields.url not in row:
        raise _absent(file, fields.url, row, "pipeline.fields.url=")
    if fields.timestamp != usual.timestamp and fields.timestamp not in row:
        raise _absent(file, fields.timestamp, row, "pipeline.fields.timestamp=")


def _absent(file: RawFile, field: str, row: Mapping[str, Any], key: str) -> DataError:
    return DataError(
        f"{file.path} has no field {field!r}; its fields are {', '.join(sorted(map(str, row)))}; "
        f"name the right one with {key}"
    )


def _document(
    file: RawFile, fields: FieldsConfig, row: dict[str, Any], text: str, ordinal: int, length: int
) -> Document:
    own_id = row.get(fields.id) if fields.id else None
    key = (_storable(own_id),) if own_id is not None else (file.sha256, str(ordinal))
    text = _storable(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Document(
        id=document_id(file.source, *key),
        source=file.source,
        text=text,
        url=_storable(row.get(fields.url) or ""),
        timestamp=_storable(row.get(fields.timestamp) or ""),
        source_file_id=file.sha256,
        member_offset=ordinal,
        member_length=length,
        payload_sha256=digest,
        extracted_sha256=digest,
        edits=identity(text),
    )


def _storable(value: object) -> str:
    """Return a value as text that UTF-8 can hold; a lone surrogate becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode()


_Row = tuple[int, dict[str, Any] | str, int]
"""Number of a line or row, its content or why there is none, its bytes in the file where known."""


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain or compressed file; EOFError where the stream is cut."""
    if path.suffix == ".zst":
        rest = b""
        for chunk in _zstd_chunks(path):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        yield rest
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        yield from stream


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Yield decompressed chunks of all frames; the library's own reader takes a cut for the end."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    inflater = None
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                while chunk:
                    inflater = inflater or decompressor.decompressobj()
                    yield inflater.decompress(chunk)
                    chunk = inflater.unused_data
                    inflater = None if inflater.eof else inflater
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if inflater is not None:
        raise EOFError("the last frame has no end")


def _read_jsonl(file: RawFile) -> Iterator[_Row]:
    try:
        for number, line in enumerate(_lines(Path(file.path))):
            if line.strip():
                yield number, _parse_line(line), len(line.rstrip(b"\n"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{file.path} is cut or damaged ({error}); fetch it again or leave it out"
        ) from error


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "line is no JSON"
    return row if isinstance(row, dict) else "line is no JSON object"


def _read_parquet(file: RawFile) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path) as parquet:
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield number, row, 0
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path} does not read as Parquet: {error}") from error


def _read_hf(file: RawFile) -> Iterator[_Row]:
    for number, row in enumerate(_open_hf(file)):
        yield number, row, 0


def _open_hf(file: RawFile) -> Any:
    """Open ``hf:FOLDER[:SPLIT]`` (``save_to_disk``, or files) or ``hf:NAME[:SPLIT]``."""
    import datasets

    name, _, split = file.path.removeprefix(HF_PREFIX).partition(":")
    split = split or "train"
    folder = Path(name)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{file.path} does not open as a dataset: {first}") from error
