"""External sorting and reducing against sorting in memory."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dedup.keyed import PLACE, settle
from data_pipeline.dedup.keys import RECORD
from data_pipeline.dedup.sorted_runs import (
    ALL_KEYS,
    RecordFile,
    SortedWriter,
    bucket_range,
    limit_bytes,
    num_buckets,
    reduce_slices,
    split_range,
    write_array,
)


def records(number: int, keys: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    made = np.zeros(number, RECORD)
    made["key_hi"] = rng.choice(rng.integers(0, 2**64, keys, dtype=np.uint64), number)
    made["order_hi"] = rng.integers(0, 50, number)
    made["row"] = np.arange(number)
    return made


def test_buckets_cover_all_keys_and_follow_the_size() -> None:
    assert bucket_range(0, 1) == ALL_KEYS
    edges = [bucket_range(b, 8) for b in range(8)]
    assert (edges[0][0], edges[-1][1]) == ALL_KEYS
    assert all(low == high + 1 for (_, high), (low, _) in pairwise(edges))
    assert [num_buckets(size, 1000) for size in (0, 250, 251, 1000, 1100)] == [1, 1, 2, 4, 8]
    assert limit_bytes(1 << 30) == 1 << 26


@pytest.mark.parametrize("limit", [1 << 30, 5000, 900])
@pytest.mark.parametrize("keys", [1, 40, 600])
def test_runs_that_are_merged_equal_one_sort(limit: int, keys: int, tmp_path: Path) -> None:
    made = records(600, keys)
    winners, losers = settle(made)
    writer = SortedWriter(tmp_path, "keys", "local", "key_hi", limit, settle)
    for part in np.array_split(made, 13):
        writer.add(part)
    work = writer.close()
    found = np.fromfile(tmp_path / "work/keys.bin", RECORD)
    assert found.tolist() == winners.tolist()
    lost = np.concatenate([
        np.fromfile(path, PLACE) for path in sorted((tmp_path / "work").glob("local-*"))
    ])  # fmt: skip
    assert sorted(lost.tolist()) == losers.tolist()
    assert {p.name for p in (tmp_path / "work").iterdir()} == {Path(name).name for name in work}
    assert all((tmp_path / name).stat().st_size == size for name, size in work.items())


def test_a_writer_that_got_nothing_writes_an_empty_file(tmp_path: Path) -> None:
    work = SortedWriter(tmp_path, "keys", "local", "key_hi", 100, settle).close()
    assert work == {"work/keys.bin": 0}


def test_ranges_above_the_limit_are_split_by_further_bits(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        winners, _ = settle(records(200 + i, 150))
        write_array(tmp_path / f"{i}.bin", [winners])
        files.append(RecordFile(tmp_path / f"{i}.bin", RECORD))
    limit = 20 * RECORD.itemsize
    ranges = list(split_range(files, "key_hi", ALL_KEYS, limit))
    assert len(ranges) > 15
    assert all(sum(part.size for part in slices) <= limit for _, slices in ranges)
    assert all(low == high + 1 for ((_, high), _), ((low, _), _) in pairwise(ranges))
    assert sum(part.end - part.start for _, slices in ranges for part in slices) == sum(
        file.count for file in files
    )


def test_a_single_key_above_the_limit_is_folded(tmp_path: Path) -> None:
    made = records(500, 1)
    write_array(tmp_path / "hot.bin", [made])
    file = RecordFile(tmp_path / "hot.bin", RECORD)
    ranges = split_range([file], "key_hi", ALL_KEYS, 50 * RECORD.itemsize)
    ((bounds, slices),) = [(bounds, slices) for bounds, slices in ranges if slices[0].size]
    assert bounds[0] == bounds[1] == int(made["key_hi"][0])
    parts = list(reduce_slices(slices, 50 * RECORD.itemsize, settle))
    assert len(parts) > 5
    assert all(len(kept) == 0 for kept, _ in parts[:-1])
    assert parts[-1][0].tolist() == settle(made)[0].tolist()
    assert sum(len(given) for _, given in parts) == 499


def test_search_finds_the_first_record_by_any_field(tmp_path: Path) -> None:
    made = np.array([(0, 5, 1), (0, 7, 2), (2, 1, 0), (2, 1, 4), (2, 9, 0)], PLACE)
    write_array(tmp_path / "places.bin", [made[:2], made[2:]])
    file = RecordFile(tmp_path / "places.bin", PLACE)
    assert [file.search("shard", value) for value in (0, 1, 2, 3)] == [0, 2, 2, 5]
    assert [file.search("row", value, 2, 5) for value in (0, 1, 2, 10)] == [2, 2, 4, 5]
    assert file.read(1, 3).tolist() == [(0, 7, 2), (2, 1, 0)]
