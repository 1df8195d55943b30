"""Damaged inputs of every kind, and what has to hold of whatever is read from them.

A case is a kind, a file name and bytes: random ones, or real records that were changed at random.
``check`` runs the task that reads raw files and raises AssertionError if it crashes with anything
but a clear refusal, or if a record is neither a document, nor dropped, nor counted as lost.
"""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipeline.config.extract import ExtractConfig, FieldsConfig
from data_pipeline.manifest import TaskResult
from data_pipeline.read.extract import Extracted, payload_text
from data_pipeline.read.extract_task import extract_file
from data_pipeline.read.inputs import find_raw_files, fingerprint
from data_pipeline.shards import read_documents
from llmtrain.errors import DataError
from tests.crawl import page, paragraphs_of, write_warc

KINDS = ("warc", "html", "jsonl", "parquet")
STAGE = "00-extract"
SETTINGS = ExtractConfig(max_record_bytes=200_000, shard_bytes=100_000)
_PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
_MARKUP = (
    "<table><tr><td>a<td>b</table>", "<pre>  x\n y</pre>", "<!-- c -->", "<![CDATA[x]]>", "<svg>",
    "<math><mi>x", "<template><p>", "<select><option>o", "<ul><li>1<li>2</ul>", "&#xD800;&#0;&bad;",
    "<script>if (a<b) { '</p>' }</script>", "<style>p{}</style>", "<iframe srcdoc='<p>'></iframe>",
    "<meta charset=utf-16>", "<plaintext>", "<frameset><frame>", "<a href='http://[x'>l</a>",
    "<link rel=canonical href='//e.org:99999999/'>", "<meta property=og:title content='\0'>",
    "<title>t</title>", "<b><i><u></b></i></u>", "<p>é ü 日本語 \U0001f600</p>", "<base href='::'>",
)  # fmt: skip


class Case(NamedTuple):
    """One input."""

    kind: str
    """One of ``KINDS``."""
    name: str
    """File name, whose ending says how it is read; for HTML the content type."""
    content: bytes
    """Its bytes."""


@cache
def _warc(packed: bool) -> tuple[bytes, tuple[bytes, ...]]:
    """A crawl, and the pieces of it that hold one record each."""
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    path = folder / f"fuzzing-{random.Random().getrandbits(64):x}"
    write_warc(path, seed=2, number=8, gzip=packed)
    content = path.read_bytes()
    path.unlink()
    mark = b"\x1f\x8b\x08" if packed else b"WARC/1."
    starts = [i for i in range(len(content)) if content.startswith(mark, i)]
    if not packed:
        starts = [i for i in starts if i == 0 or content[i - 4 : i] == b"\r\n\r\n"]
    ends = [*starts[1:], len(content)]
    return content, tuple(content[a:b] for a, b in zip(starts, ends, strict=True))


@cache
def _rows() -> tuple[dict[str, object], ...]:
    rng = random.Random(4)
    return tuple(
        {"text": "\n".join(paragraphs_of(rng)), "url": f"https://example.org/{i}", "n": i}
        for i in range(24)
    )


@cache
def _jsonl(suffix: str) -> tuple[bytes, tuple[bytes, ...]]:
    """Lines in members of six, and those members."""
    lines = [json.dumps(row).encode() + b"\n" for row in _rows()]
    parts = tuple(_PACK[suffix](b"".join(lines[i : i + 6])) for i in range(0, len(lines), 6))
    return b"".join(parts), parts


@cache
def _parquet(compression: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(list(_rows())), sink, row_group_size=6, compression=compression
    )
    return sink.getvalue()


@cache
def _html() -> tuple[bytes, ...]:
    rng = random.Random(6)
    pages = []
    for _ in range(12):
        markup = "".join(rng.choices(_MARKUP, k=rng.randrange(12)))
        pages.append(page(rng, [*paragraphs_of(rng), markup]))
    encodings = ("utf-8", "utf-16", "latin-1", "shift_jis")
    return tuple(text.encode(encodings[i % 4], "replace") for i, text in enumerate(pages))


def random_case(rng: random.Random, kind: str) -> Case:
    """Random bytes half of the time with a real beginning, or a real input with changes."""
    name, content = _real(rng, kind)
    if rng.random() < 0.2:
        head = content[: rng.choice((0, 4, 10, 200))]
        return Case(kind, name, head + rng.randbytes(rng.randrange(3000)))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 8))):
        content = _change(rng, content, _real(rng, kind)[1])
    return Case(kind, name, content)


def _real(rng: random.Random, kind: str) -> tuple[str, bytes]:
    if kind == "warc":
        packed = rng.random() < 0.5
        return ("c.warc.gz" if packed else "c.warc"), _warc(packed)[0]
    if kind == "jsonl":
        suffix = rng.choice(list(_PACK))
        return f"a.jsonl{suffix}", _jsonl(suffix)[0]
    if kind == "parquet":
        return "a.parquet", _parquet(rng.choice(("zstd", "snappy", "none", "gzip")))
    types = ("text/html", "text/html; charset=utf-8", "text/html; charset=gbk", "", "text/plain")
    return rng.choice(types), rng.choice(_html())


def _change(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """One random change: bits, bytes, a stretch gone, doubled, zeroed or taken from another."""
    size = len(content)
    at = rng.randrange(size + 1)
    length = min(size - at, int(2 ** rng.uniform(0, 12)))
    kind = rng.randrange(9)
    if kind == 0 and at < size:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + rng.randbytes(length) + content[at + length :]
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[: at + length] + content[at : at + length] + content[at + length :]
    if kind == 4:
        return content[:at] + bytes(length) + content[at + length :]
    if kind == 5:
        return content[:at] + rng.randbytes(length) + content[at:]
    if kind == 6:
        start = rng.randrange(len(other) + 1)
        return content[:at] + other[start : start + length] + content[at:]
    if kind == 7:
        return content[:at]
    numbers = (b"0", b"-1", b"99999999999999999999", b"2147483648", b"\xff" * 8, b"\r\n\r\n", b"\n")
    return content[:at] + rng.choice(numbers) + content[at + rng.randrange(4) :]


def check(case: Case, folder: Path) -> str:
    """Read a case and prove that nothing is lost; returns ``read`` or ``refused``."""
    if case.kind == "html":
        return _check_html(case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / case.name
    path.write_bytes(case.content)
    (file,) = map(fingerprint, find_raw_files({"s": str(path)}))
    stage = folder / "stages" / STAGE
    try:
        result = extract_file(stage, STAGE, 0, file, SETTINGS, FieldsConfig())
    except DataError:
        return "refused"
    result.counts.check(STAGE)
    found = _written(folder, result)
    if case.kind == "warc":
        _check_warc(case, found)
    elif case.kind == "jsonl":
        _check_jsonl(case, result, found)
    else:
        rows = pq.ParquetFile(path).metadata.num_rows
        assert result.counts.documents_in == rows, (result.counts, rows)
    return "read"


def _written(folder: Path, result: TaskResult) -> Counter[str]:
    """How often every address and payload stands in the files, which are as many as counted."""
    documents = [d for s in (*result.shards, *result.dropped) for d in read_documents(folder, s)]
    names = [folder / "stages" / STAGE / name for name in result.files]
    noted = [json.loads(line) for path in names for line in path.read_text().splitlines()]
    lost = sum(entry["records"] for entry in noted)
    assert len(documents) + lost == result.counts.documents_in
    assert lost == sum(result.counts.quarantined.values())
    return Counter(document.url for document in documents)


def _check_html(case: Case) -> str:
    first = payload_text(case.content, case.name, "https://example.org/")
    assert first == payload_text(case.content, case.name, "https://example.org/")
    if not isinstance(first, Extracted):
        return "refused"
    for text in (first.text, *first.metadata.values()):
        assert "\0" not in text or case.name == "text/plain"
        assert text.encode(), "what is kept is never empty"
    return "read"


def _check_warc(case: Case, found: Counter[str]) -> None:
    """Every record that stands in the file as it was comes out."""
    for piece in _warc(case.name.endswith(".gz"))[1]:
        plain = gzip.decompress(piece) if case.name.endswith(".gz") else piece
        url = plain.partition(b"WARC-Target-URI: ")[2].partition(b"\r\n")[0].decode()
        if url and piece in case.content:
            assert found[url] >= 1, f"{url} is lost"


def _check_jsonl(case: Case, result: TaskResult, found: Counter[str]) -> None:
    """Every line is counted; of a compressed file those of the members that are as they were."""
    suffix = case.name.removeprefix("a.jsonl")
    if not suffix:
        lines = [line for line in case.content.split(b"\n") if line.strip()]
        assert result.counts.documents_in == len(lines)
        return
    for i, piece in enumerate(_jsonl(suffix)[1]):
        if piece in case.content:
            for row in _rows()[6 * i + 1 : 6 * i + 6]:  # a cut line may end in the first one
                assert found[str(row["url"])] >= 1, f"{row['url']} is lost"
