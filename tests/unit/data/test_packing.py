"""Packed orders: blocks, the file of counts, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data import pack_blocks, packing
from llmtrain.data.best_fit import pack_documents
from llmtrain.data.pack_blocks import PackBlocks, read_packing, write_packing
from llmtrain.data.packing import PackedOrder
from llmtrain.data.store import TokenStore, open_source
from llmtrain.errors import DataError
from tests.stores import pack_store, random_documents, write_store

WINDOW = 64


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_blocks, "BLOCK_TOKENS", 700)
    monkeypatch.setattr(pack_blocks, "BLOCK_WINDOWS", 1)
    monkeypatch.setattr(packing, "GROUP_BLOCKS", 3)


def packed(store: TokenStore, window_tokens: int = WINDOW) -> TokenStore:
    write_packing(store, pack_store(store, window_tokens))
    return store


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_runs_of_whole_documents(tmp_path: Path) -> None:
    store = write_store(tmp_path, [*random_documents(90, 40), [5] * 3000], num_shards=3)
    blocks = PackBlocks(store, WINDOW)
    assert blocks.num_blocks == sum(max(1, int(n) // 700) for n in np.diff(store.shard_starts))
    lengths, next_token = [], 0
    for block in range(blocks.num_blocks):
        start, own = blocks.documents(block)
        assert len(own) == 0 or start == next_token
        next_token += int(own.sum())
        lengths += own.tolist()
        for token in (start, start + int(own.sum()) - 1) if len(own) else ():
            assert blocks.block_of(token) == block
    spans = [store.document_span(document) for document in range(store.num_documents)]
    assert lengths == [end - start for start, end in spans]
    counts = [len(blocks.documents(block)[1]) for block in range(blocks.num_blocks)]
    assert 0 in counts  # the long document is a block, and those that would begin inside it


@pytest.mark.usefixtures("small_blocks")
def test_orders_differ_by_seed_name_and_epoch(tmp_path: Path) -> None:
    store = packed(write_store(tmp_path, random_documents(300, 40)))
    places = np.arange(pack_store(store, WINDOW).num_windows)

    def order(name: str = "a", seed: int = 1, epoch: int = 0) -> list[int]:
        made = PackedOrder(store, name, seed=seed, window_tokens=WINDOW)
        return made.windows(epoch, places).tolist()

    orders = [order(), order(seed=2), order(name="b"), order(epoch=1)]
    assert all(sorted(found) == places.tolist() for found in orders)
    assert len({tuple(found) for found in orders}) == 4
    assert order() == orders[0] != places.tolist()


@pytest.mark.usefixtures("small_blocks")
def test_windows_of_a_group_come_from_its_blocks(tmp_path: Path) -> None:
    store = packed(write_store(tmp_path, random_documents(300, 40)))
    order = PackedOrder(store, "a", seed=1, window_tokens=WINDOW)
    windows = pack_store(store, WINDOW).windows
    block_of = np.repeat(np.arange(len(windows)), windows)
    blocks = block_of[order.windows(0, np.arange(order.num_windows))].tolist()
    groups, seen = [], set[int]()
    while blocks:
        group: list[int] = []
        while blocks and (blocks[0] in group or len(set(group)) < packing.GROUP_BLOCKS):
            group.append(blocks.pop(0))
        assert not seen & set(group)
        seen |= set(group)
        groups.append(group)
    assert len(groups) == -(-len(windows) // packing.GROUP_BLOCKS)
    assert any(sorted(group) != group for group in groups)


@pytest.mark.usefixtures("small_blocks")
def test_little_memory_changes_nothing(tmp_path: Path) -> None:
    store = packed(write_store(tmp_path, random_documents(300, 40)))
    plenty, little = (
        PackedOrder(store, "a", seed=1, window_tokens=WINDOW, cache_bytes=size)
        for size in (1 << 20, 1)
    )
    windows = plenty.windows(0, np.arange(plenty.num_windows))
    for one, other in zip(plenty.pieces(windows), little.pieces(windows), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("small_blocks")
def test_several_stores_of_a_source_are_packed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        packed(write_store(tmp_path / name, random_documents(80, 40, seed)))
    joined = open_source([str(tmp_path / "a"), str(tmp_path / "b")])
    order = PackedOrder(joined, "both", seed=1, window_tokens=WINDOW)
    parts = [pack_store(member, WINDOW).num_windows for member in joined.members]
    assert order.num_windows == sum(parts)
    pieces = order.pieces(np.arange(order.num_windows))
    assert pieces.length.sum() == joined.num_tokens
    edge = joined.members[0].num_tokens
    assert ((pieces.start < edge) == (pieces.row < parts[0])).all()


def test_stores_of_other_programs_keep_it_beside_their_files(tmp_path: Path) -> None:
    write_store(tmp_path, random_documents(30, 40))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "part-00000.docs.parquet").unlink()
    store = packed(TokenStore.open(tmp_path / "part-00000"))
    assert (tmp_path / "part-00000.pack-00000064.json").is_file()
    assert PackedOrder(store, "a", seed=1, window_tokens=WINDOW).num_windows > 0


def test_what_is_not_this_stores_packing_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", random_documents(30, 40))
    other = packed(write_store(tmp_path / "b", random_documents(31, 40)))
    command = f"run `llmtrain-data pack store={store.name} sequence_length={WINDOW}`"

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            PackedOrder(store, "wiki", seed=1, window_tokens=WINDOW)
        assert command in str(caught.value)

    refused("source wiki is not packed for training.sequence_length=64: there is no")
    path, foreign = (tmp_path / name / "pack-00000064.json" for name in ("a", "b"))
    path.write_bytes(foreign.read_bytes())
    refused(f"is the packing of store {other.fingerprint[:16]}")
    path.write_text("{}")
    refused("is no packing of version 1")
    plain = json.loads(foreign.read_text())
    path.write_text(json.dumps({**plain, "num_tokens": 1}))
    refused("was changed after it was written")
    packed(store)
    assert read_packing(store, "wiki", WINDOW) == pack_store(store, WINDOW)


def test_a_changed_index_is_noticed_when_its_block_is_read(tmp_path: Path) -> None:
    store = write_store(tmp_path, random_documents(30, 40))
    found = pack_store(store, WINDOW)
    wrong = pack_blocks.replace(found, windows=(found.num_windows + 1,))
    write_packing(store, pack_blocks.replace(wrong, hash=wrong.computed_hash()))
    order = PackedOrder(store, "wiki", seed=1, window_tokens=WINDOW)
    with pytest.raises(DataError, match=f"packs into {found.num_windows} windows, its packing"):
        order.pieces(np.array([0]))


@pytest.mark.parametrize("window_tokens", [2048, 4096, 8192])
@pytest.mark.parametrize(("median", "sigma"), [(100, 1.0), (400, 1.0), (700, 1.2)])
def test_padding_is_below_one_percent(window_tokens: int, median: int, sigma: float) -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(median), sigma, 30_000)).astype(np.int64)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), pack_blocks.BLOCK_TOKENS)]
    found = pack_documents(lengths, window_tokens)
    assert 1 - lengths.sum() / (found.num_rows * window_tokens) < 0.01
