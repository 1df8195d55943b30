"""Inputs that both sides of benchmarks/data.py read, made once from a corpus of WARC files.

``sample`` is what the ratios are measured on: pages drawn by a hash of their address, in two
halves, one for each worker. ``tiny`` is a few pages to warm up with. ``whole`` is everything, for
what the project does in absolute terms. Each is there as WARC files, as document shards of the
pipeline and as plain Parquet; texts are resiliparse's.

    inputs = prepare(Path("/data/corpus"), Path("/data/bench"), sample_mb=24, limit_mb=None)
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_sides import WORKERS, Side

from llmtrain.errors import DataError

TINY_MB = 1.5
"""Text to warm up with; some of it has to get through every filter."""
VOCAB_SIZE = 32_000
"""Pieces of the tokenizer both sides use."""
SHARD_BYTES = 4_000_000
"""Text in one shard, so that every worker gets some."""
SOURCES = (
    "shards",
    "document",
    "read/extract",
    "read/extractors",
    "read/extract_task",
    "read/warc",
)
"""Modules of the pipeline whose change makes prepared inputs stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One set of pages in all its forms; lists have an entry per worker."""

    warcs: list[list[str]]
    """WARC files."""
    shards: list[list[dict[str, Any]]]
    """Document shards, below ``root``."""
    parquet: list[str]
    """Plain Parquet files."""
    root: str
    """Folder of the shards."""
    html_bytes: int
    """Bytes of the pages."""
    text_bytes: int
    """UTF-8 bytes of the texts."""
    documents: int
    """Pages with a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that is read."""

    sample: Part
    tiny: Part
    whole: Part
    tokenizer: str
    """Folder with a byte-level BPE ``tokenizer.json``."""


def prepare(
    corpus: Path, out: Path, *, sample_mb: float, limit_mb: float | None, side: Side
) -> Inputs:
    """Make the inputs, unless they are there already; ``side`` runs the project's own stages."""
    summaries = [json.loads(path.read_text()) for path in sorted(corpus.glob("packages/*.json"))]
    if not summaries:
        raise DataError(f"{corpus} holds no finished package; run benchmarks/corpus.py first")
    key = _key(summaries, sample_mb, limit_mb)
    done = out / "inputs.json"
    if done.is_file() and (saved := json.loads(done.read_text()))["key"] == key:
        parts = {name: Part(**saved[name]) for name in ("sample", "tiny", "whole")}
        return Inputs(**parts, tokenizer=saved["tokenizer"])
    out.mkdir(parents=True, exist_ok=True)
    text_mb = sum(summary["text_bytes"] for summary in summaries) / 1e6
    sizes = {"sample": sample_mb, "tiny": TINY_MB} | ({"whole": limit_mb} if limit_mb else {})
    shares = {name: min(1.0, size / text_mb) for name, size in sizes.items()}
    files = [str(corpus / name) for summary in summaries for name in summary["files"]]
    warcs, html_bytes = _copies(files, out, shares, side)
    if not limit_mb:
        warcs["whole"] = balanced(files, [Path(path).stat().st_size for path in files])
        html_bytes["whole"] = sum(summary["html_bytes"] for summary in summaries)
    parts = {
        name: _documents(out / name, warcs[name], html_bytes[name], side)
        for name in ("sample", "tiny", "whole")
    }
    tokenizer = out / "tokenizer"
    training = {"shards": parts["sample"].shards[0], "root": parts["sample"].root}
    side.run("train", [{**training, "out": str(tokenizer), "vocab_size": VOCAB_SIZE}])
    content: dict[str, Any] = {"key": key, "tokenizer": str(tokenizer)}
    content |= {name: asdict(part) for name, part in parts.items()}
    done.write_text(json.dumps(content))
    return Inputs(**parts, tokenizer=str(tokenizer))


def _key(summaries: Sequence[dict[str, Any]], sample_mb: float, limit_mb: float | None) -> str:
    sources = Path(__file__).resolve().parents[1] / "data_pipeline"
    code = [(sources / f"{name}.py").read_text() for name in SOURCES]
    content = json.dumps([summaries, sample_mb, limit_mb, TINY_MB, VOCAB_SIZE, SHARD_BYTES, code])
    return hashlib.sha256(content.encode()).hexdigest()


def _copies(
    files: list[str], out: Path, shares: dict[str, float], side: Side
) -> tuple[dict[str, list[list[str]]], dict[str, int]]:
    """Draw pages for each share, in one WARC file per worker."""
    ranges = {
        f"{name}-{half}": [share * half / WORKERS, share * (half + 1) / WORKERS]
        for name, share in shares.items()
        for half in range(WORKERS)
    }
    jobs: list[dict[str, Any]] = []
    for number, inputs in enumerate(balanced(files, [Path(f).stat().st_size for f in files])):
        folder = out / f"copies-{number}"
        folder.mkdir(exist_ok=True)
        jobs.append({"inputs": inputs, "out": str(folder), "ranges": ranges})
    counts = side.run("sample", jobs).results
    warcs: dict[str, list[list[str]]] = {}
    html_bytes = dict.fromkeys(shares, 0)
    for name in shares:
        for half in range(WORKERS):
            path = out / f"{name}-{half}.warc.gz"
            pieces = [Path(job["out"], path.name) for job in jobs]
            path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
            warcs.setdefault(name, []).append([str(path)])
            html_bytes[name] += sum(count[f"{name}-{half}"][1] for count in counts)
    return warcs, html_bytes


def _documents(root: Path, warcs: list[list[str]], html_bytes: int, side: Side) -> Part:
    """Extract the texts of some pages, into shards and into plain Parquet."""
    shutil.rmtree(root, ignore_errors=True)
    job = {
        "inputs": [path for paths in warcs for path in paths], "root": str(root),
        "overrides": [f"pipeline.extract.shard_bytes={SHARD_BYTES}"],
    }  # fmt: skip
    (extracted,) = side.run("extract", [job], driver=True).results
    everything = extracted["shards"]
    shards = balanced(everything, [shard["text_bytes"] for shard in everything])
    parquet = [str(root / f"plain-{number}.parquet") for number in range(WORKERS)]
    side.run(
        "export",
        [
            {"root": str(root), "shards": group, "out": path}
            for group, path in zip(shards, parquet, strict=True)
        ],
    )
    return Part(
        warcs=warcs, shards=shards, parquet=parquet, root=str(root), html_bytes=html_bytes,
        text_bytes=sum(shard["text_bytes"] for shard in everything),
        documents=sum(shard["rows"] for shard in everything),
    )  # fmt: skip


def balanced(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Share items out to the workers, the largest first, always to the one with the least."""
    groups: list[list[Any]] = [[] for _ in range(WORKERS)]
    loads = [0] * WORKERS
    for i in sorted(range(len(items)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        groups[least].append(items[i])
        loads[least] += sizes[i]
    return groups
