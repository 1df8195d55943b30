"""Keyed deduplication against the rule in ten lines of Python."""

import hashlib
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dedup import (
    RECORD,
    bucket_range,
    drop_documents,
    emit_keys,
    num_buckets,
    page_order,
    reduce_keys,
    settle,
    without_lines,
)
from data_pipeline.document import Document
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard, read_documents, text_size, to_table, write_table
from data_pipeline.url import normalize_c4


def make_shards(out: Path, documents: list[Document], rows: int) -> list[Shard]:
    shards = []
    for start in range(0, len(documents), rows):
        part = documents[start : start + rows]
        path = f"stages/in/documents/s-{start:05d}.parquet"
        digest, size = write_table(out / path, to_table(part))
        text_bytes, characters = text_size(d.text for d in part)
        shards.append(Shard(path=path, source="s", rows=len(part), text_bytes=text_bytes,
                            text_characters=characters, digest=digest, size=size))  # fmt: skip
    return shards


def survivors(out: Path, kind: str, shards: list[Shard], buckets: int) -> list[Document]:
    stage = f"{kind}-{buckets}"
    folder = out / "stages" / stage
    for i, shard in enumerate(shards):
        emit_keys(folder, str(out), kind, shard, i)
    for bucket in range(buckets):
        reduce_keys(folder, str(folder), bucket, buckets, len(shards))
    kept: list[Document] = []
    for i, shard in enumerate(shards):
        result: TaskResult = drop_documents(folder, stage, str(out), kind, shard, i, buckets)
        result.counts.check(stage)
        kept += [d for s in result.shards for d in read_documents(out, s)]
    return kept


def random_documents(number: int) -> list[Document]:
    rng = random.Random(5)
    return [
        Document(
            id=hashlib.md5(str(i).encode()).hexdigest(),
            source="s",
            text=f"text {rng.randrange(number // 2)}",
            url=f"https://www.x.org/{rng.randrange(number // 2)}" if rng.random() < 0.9 else "",
            timestamp=f"2026-01-{rng.randint(1, 9):02d}T00:00:00Z" if rng.random() < 0.9 else "",
        )
        for i in range(number)
    ]


@pytest.mark.parametrize("buckets", [1, 4])
@pytest.mark.parametrize("rows", [7, 100])
def test_newest_page_per_address_stays(buckets: int, rows: int, tmp_path: Path) -> None:
    documents = random_documents(60)
    best: dict[str, Document] = {}
    for document in documents:
        key = normalize_c4(document.url) if document.url else document.id
        if key not in best or document.timestamp > best[key].timestamp:
            best[key] = document
    kept = survivors(tmp_path, "url", make_shards(tmp_path, documents, rows), buckets)
    assert {d.id for d in kept} == {d.id for d in best.values()}


def test_times_without_a_zone_are_utc_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        documents = [
            Document(id=f"{i:032x}", source="s", text="x", url="https://x.org", timestamp=moment)
            for i, moment in enumerate(("2026-01-01T12:00:00", "2026-01-01T13:00:00Z", "no time"))
        ]
        kept = survivors(tmp_path, "url", make_shards(tmp_path, documents, 2), 1)
        assert [d.timestamp for d in kept] == ["2026-01-01T13:00:00Z"]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("buckets", [1, 8])
def test_smallest_id_per_text_stays(buckets: int, tmp_path: Path) -> None:
    documents = random_documents(60)
    best = {
        text: min(d.id for d in documents if d.text == text) for text in {d.text for d in documents}
    }
    kept = survivors(tmp_path, "exact", make_shards(tmp_path, documents, 11), buckets)
    assert sorted(d.id for d in kept) == sorted(best.values())


def test_hot_key_costs_one_record_per_shard() -> None:
    records = np.zeros(1000, RECORD)
    records["row"] = np.arange(1000)
    winners, losers = settle(records)
    assert winners["row"].tolist() == [0]
    assert len(losers) == 999


def test_buckets_cover_all_keys_and_follow_the_size() -> None:
    assert bucket_range(0, 1) == (0, 2**64 - 1)
    edges = [bucket_range(b, 8) for b in range(8)]
    assert edges[0][0] == 0
    assert edges[-1][1] == 2**64 - 1
    assert all(low == high + 1 for (_, high), (low, _) in pairwise(edges))
    assert [num_buckets(size, 1000) for size in (0, 250, 251, 1000, 1100)] == [1, 1, 2, 4, 8]


def test_page_order_is_md5_of_the_normalised_address() -> None:
    digest = hashlib.md5(b"x.org/a").hexdigest()
    high, low = page_order("https://www.x.org/a/", "id")
    assert f"{high:016x}{low:016x}" == digest


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ({0}, "bb\nccc"), ({1}, "a\nccc"), ({2}, "a\nbb"), ({0, 1}, "ccc"), ({1, 2}, "a"),
        ({0, 2}, "bb"), ({0, 1, 2}, ""), (set(), "a\nbb\nccc"),
    ],
)  # fmt: skip
def test_lines_go_with_their_newline(gone: set[int], expected: str) -> None:
    before = "a\nbb\nccc"
    text, runs = without_lines(before, gone)
    assert text == expected
    assert "".join(before[r.extracted_start :][: r.length] for r in runs) == expected
    for run in runs:
        assert text[run.final_start :][: run.length] == before[run.extracted_start :][: run.length]
