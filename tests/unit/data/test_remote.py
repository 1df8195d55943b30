"""Stores behind a file system: fetched in blocks, shared by processes, refused if they differ."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from llmtrain.data import remote
from llmtrain.data.store import MANIFEST, TokenStore
from llmtrain.errors import DataError
from tests.stores import random_documents, write_store

BLOCK = 1 << 12


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.0,))


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return write_store(tmp_path / "wiki", random_documents(400, 60), num_shards=3)


@pytest.fixture
def in_memory(store: TokenStore) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{store.path}/", "/wiki/", recursive=True)
    yield "memory://wiki"
    filesystem.rm("/wiki", recursive=True)


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in cache.rglob("*.bin"))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_remote_store_reads_like_the_local_one(
    store: TokenStore, in_memory: str, tmp_path: Path, scheme: str
) -> None:
    address = in_memory if scheme == "memory" else f"file://{store.path}"
    fetched = TokenStore.open(address, tmp_path / "cache")
    assert fetched.fingerprint == store.fingerprint
    assert fetched.num_documents == store.num_documents
    for start in range(0, store.num_tokens - 900, 777):
        assert np.array_equal(fetched.tokens(start, start + 900), store.tokens(start, start + 900))
    begins = np.arange(0, store.num_tokens - 300, 211)
    for ours, theirs in zip(
        fetched.boundaries(begins, 300), store.boundaries(begins, 300), strict=True
    ):
        assert np.array_equal(ours, theirs)
    assert [fetched.record(d) for d in (0, 399)] == [store.record(d) for d in (0, 399)]
    assert fetched.document_at(1000) == store.document_at(1000)


def test_only_blocks_that_are_read_are_fetched(
    in_memory: str, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[str, int, int]] = []
    original = remote.RemoteFolder.span

    def counted(self: remote.RemoteFolder, name: str, start: int, end: int) -> bytes:
        spans.append((name, start, end))
        return original(self, name, start, end)

    monkeypatch.setattr(remote.RemoteFolder, "span", counted)
    fetched = TokenStore.open(in_memory, tmp_path / "cache")
    assert spans == []
    fetched.fetch(np.array([3000, 3100, 6500]), np.array([100, 100, 100]))
    assert sorted(spans) == [
        ("part-00000.bin", BLOCK, 2 * BLOCK), ("part-00000.bin", 3 * BLOCK, 4 * BLOCK)
    ]  # fmt: skip
    assert 0 < cached_bytes(tmp_path / "cache") < sum(s.bin_file.size for s in store.shards) / 3
    again = TokenStore.open(in_memory, tmp_path / "cache")
    spans.clear()
    again.fetch(np.array([3000]), np.array([100]))
    assert spans == []
    assert np.array_equal(again.tokens(3000, 3100), store.tokens(3000, 3100))


def test_another_content_has_another_cache(
    in_memory: str, store: TokenStore, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    before = TokenStore.open(in_memory, cache).tokens(0, 50).tolist()
    other = write_store(tmp_path / "other", random_documents(400, 60, seed=1), num_shards=3)
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{other.path}/", "/wiki/", recursive=True)
    assert TokenStore.open(in_memory, cache).tokens(0, 50).tolist() == other.tokens(0, 50).tolist()
    assert before == store.tokens(0, 50).tolist() != other.tokens(0, 50).tolist()


def test_a_remote_pair_of_another_program(
    in_memory: str, store: TokenStore, tmp_path: Path
) -> None:
    fsspec.filesystem("memory").rm(f"/wiki/{MANIFEST}")
    cache = tmp_path / "cache"
    opened = TokenStore.open(f"{in_memory}/part-00001", cache)
    start, end = store.shard_starts[1:3].tolist()
    assert opened.manifest is None
    assert np.array_equal(opened.tokens(0, end - start), store.tokens(start, end))
    fsspec.filesystem("memory").rm("/wiki/part-00001.docs.parquet")
    with pytest.raises(DataError, match="their documents' origin there, stores of other programs"):
        opened.record(0)


def test_truncated_missing_and_swapped_files(in_memory: str, tmp_path: Path) -> None:
    filesystem, cache = fsspec.filesystem("memory"), tmp_path / "cache"
    path = "/wiki/part-00001.bin"
    content = filesystem.cat_file(path)
    fetched = TokenStore.open(in_memory, cache)
    filesystem.pipe_file(path, content[:-6])
    with pytest.raises(DataError, match=r"part-00001.bin holds .* bytes, its manifest says"):
        TokenStore.open(in_memory, cache)
    with pytest.raises(DataError, match=r"part-00001.bin gave .* bytes where .* truncated or"):
        fetched.document(store_documents(fetched, 1))
    filesystem.pipe_file(path, content[::-1])
    with pytest.raises(DataError, match=r"part-00001.bin is not the file its manifest lists"):
        TokenStore.open(in_memory, cache).document(store_documents(fetched, 1))
    filesystem.rm(path)
    with pytest.raises(DataError, match=r"part-00001.bin is missing, its manifest lists it"):
        TokenStore.open(in_memory, cache)


def store_documents(store: TokenStore, shard: int) -> int:
    """The first document of a shard."""
    return store.document_at(int(store.shard_starts[shard]))


def test_no_cache_no_package_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.cache_dir is null; set data.cache_dir to a folder"):
        TokenStore.open("s3://bucket/wiki")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"not installed; run `pip install fsspec s3fs`"):
        TokenStore.open("s3://bucket/wiki", tmp_path)
    with pytest.raises(DataError, match=r"cannot be reached .*use an address fsspec knows"):
        TokenStore.open("s4://bucket/wiki", tmp_path)
    with pytest.raises(DataError, match="memory://nowhere does not exist or is empty"):
        TokenStore.open("memory://nowhere", tmp_path)


def test_a_request_that_fails_is_made_again(
    in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = TokenStore.open(in_memory, tmp_path)
    filesystem = fsspec.filesystem("memory")
    original, failures = type(filesystem).cat_file, [OSError("reset"), OSError("reset")]

    def flaky(self: Any, *arguments: Any, **keywords: Any) -> bytes:
        if failures:
            raise failures.pop()
        content: bytes = original(self, *arguments, **keywords)
        return content

    monkeypatch.setattr(type(filesystem), "cat_file", flaky)
    with pytest.raises(DataError, match=r"cannot be read \(reset\); check the network"):
        fetched.tokens(0, 10)
    failures[:] = [OSError("reset")]
    assert len(fetched.tokens(0, 10)) == 10


def read_all(address: str, cache: str, delay_s: float, results: Any) -> None:
    """Read the whole store in another process, each request after a pause."""
    remote.BLOCK_BYTES = BLOCK
    original = remote.RemoteFolder.span
    requests = []

    def slow(self: remote.RemoteFolder, name: str, start: int, end: int) -> bytes:
        if name.endswith(".bin"):
            requests.append((name, start))
        time.sleep(delay_s)
        return original(self, name, start, end)

    remote.RemoteFolder.span = slow  # type: ignore[method-assign]
    store = TokenStore.open(address, cache)
    total = int(store.tokens(0, store.num_tokens).astype(np.int64).sum())
    results.put((total, requests))


def test_processes_share_a_cache(store: TokenStore, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (f"file://{store.path}", str(tmp_path / "cache"), 0.01, results)
    workers = [context.Process(target=read_all, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    expected = int(store.tokens(0, store.num_tokens).astype(np.int64).sum())
    assert [total for total, _ in found] == [expected, expected]
    blocks = sorted(span for _, requests in found for span in requests if span[1] % BLOCK == 0)
    ends = {f"{shard.name.rpartition('/')[2]}.bin" for shard in store.shards}
    whole = [(name, start) for name, start in blocks if start]  # 0 is also where the check reads
    assert ends == {name for name, _ in blocks}
    assert len(set(whole)) <= len(whole) <= len(set(whole)) + 6


def test_a_killed_fetch_leaves_nothing_wrong(store: TokenStore, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    address, cache = f"file://{store.path}", tmp_path / "cache"
    results = context.Queue()
    worker = context.Process(target=read_all, args=(address, str(cache), 0.05, results))
    worker.start()
    until = time.monotonic() + 30
    while not (cache.is_dir() and cached_bytes(cache) > 2 * BLOCK) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    marks = b"".join(path.read_bytes() for path in sorted(cache.rglob("*.bin.blocks")))
    assert 0 < sum(marks) < len(marks)
    fetched = TokenStore.open(address, cache)
    assert np.array_equal(fetched.tokens(0, store.num_tokens), store.tokens(0, store.num_tokens))
