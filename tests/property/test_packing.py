"""Best-fit packing over any lengths: no token lost or repeated, and both directions agree."""

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import pack_blocks, packing
from llmtrain.data.assemble import assemble_windows
from llmtrain.data.batch import IGNORE_INDEX
from llmtrain.data.best_fit import best_fit, pack_documents
from llmtrain.data.pack_blocks import write_packing
from llmtrain.data.packing import PackedOrder
from llmtrain.data.store import TokenStore
from tests.stores import pack_store, write_store

ROW = 12
LENGTHS = st.lists(
    st.one_of(st.integers(2, 9), st.sampled_from([ROW - 1, ROW, ROW + 1, 2 * ROW, 61])),
    min_size=1,
    max_size=40,
)
"""Tokens of documents, EOS included: short ones, a row exactly, around it, and huge ones."""


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Make blocks and groups so small that a few documents fill several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_blocks, "BLOCK_TOKENS", 50)
        patch.setattr(pack_blocks, "BLOCK_WINDOWS", 1)
        patch.setattr(packing, "GROUP_BLOCKS", 2)
        yield


def numbered_order(folder: str, lengths: list[int], num_shards: int, seed: int) -> PackedOrder:
    """A packed store whose token number n is n + 3, but for EOS at the end of each document."""
    ends = np.cumsum(lengths)
    documents = [
        list(range(end - n + 3, end + 2)) for end, n in zip(ends.tolist(), lengths, strict=True)
    ]
    store = write_store(Path(folder) / "a", documents, min(num_shards, len(lengths)))
    write_packing(store, pack_store(store, ROW))
    return PackedOrder(store, "a", seed=seed, window_tokens=ROW, cache_bytes=500)


def places_of(order: PackedOrder, windows: np.ndarray) -> np.ndarray:
    """The token of the store at every input of windows, -1 for padding."""
    places = np.full((len(windows), ROW), -1)
    for row, offset, start, length in zip(*order.pieces(windows)[:4], strict=True):
        assert (places[row, offset : offset + length] == -1).all()
        places[row, offset : offset + length] = np.arange(start, start + length)
    return places


def expected_rows(store: TokenStore, places: np.ndarray) -> dict[str, list[list[float]]]:
    """What the rows at ``places`` have to be, one input after the other."""
    rows: dict[str, list[list[float]]] = {
        name: [] for name in ("tokens", "targets", "positions", "document_ids", "loss_weight")
    }
    for row in places.tolist():
        new = {name: list[float]() for name in rows}
        for i, place in enumerate(row):
            document = store.document_at(place) if place >= 0 else -1
            before = row[i - 1] if i else -2
            same = i > 0 and (
                before == place == -1
                or (min(before, place) >= 0 and store.document_at(before) == document)
            )
            ends = place < 0 or place + 1 == store.document_span(document)[1]
            new["tokens"].append(int(store.tokens(place, place + 1)[0]) if place >= 0 else 0)
            new["targets"].append(
                IGNORE_INDEX if ends else int(store.tokens(place + 1, place + 2)[0])
            )
            new["positions"].append(new["positions"][-1] + 1 if same else 0)
            new["document_ids"].append(0 if i == 0 else new["document_ids"][-1] + (not same))
            new["loss_weight"].append(float(not ends))
        for name, values in new.items():
            rows[name].append(values)
    return rows


@settings(max_examples=15)
@given(lengths=LENGTHS, num_shards=st.integers(1, 3), seed=st.integers(0, 2**63 - 1))
def test_an_epoch_holds_every_token_once(lengths: list[int], num_shards: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        order = numbered_order(folder, lengths, num_shards, seed)
        store = order.store
        for epoch in range(2):
            windows = order.windows(epoch, np.arange(order.num_windows))
            assert sorted(windows.tolist()) == list(range(order.num_windows))
            assert np.array_equal(order.positions(epoch, windows), np.arange(order.num_windows))
            places = places_of(order, windows)
            assert sorted(places[places >= 0].tolist()) == list(range(store.num_tokens))
            expected = expected_rows(store, places)
            batch = _assembled(order, windows, ROW)
            for name, values in expected.items():
                assert getattr(batch, name).tolist() == values, name
            assert batch.loss_weight.sum() == store.num_tokens - store.num_documents
        for document in range(store.num_documents):
            start, end = store.document_span(document)
            touched = ((places >= start) & (places < end)).any(axis=1)
            assert order.windows_of(start, end).tolist() == sorted(windows[touched].tolist())


@settings(max_examples=15)
@given(lengths=LENGTHS, length=st.sampled_from([1, 2, 3, 4, 6]), seed=st.integers(0, 99))
def test_shorter_rows_are_slices_of_the_windows(lengths: list[int], length: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        order = numbered_order(folder, lengths, 2, seed)
        windows = order.windows(0, np.arange(order.num_windows))
        whole, batch = (_assembled(order, windows, size) for size in (ROW, length))
        assert batch.tokens.shape == (len(windows) * ROW // length, length)
        for name in ("tokens", "targets", "loss_weight"):
            sliced = getattr(whole, name).reshape(-1, length)
            assert torch.equal(getattr(batch, name), sliced)
        expected = expected_rows(order.store, places_of(order, windows).reshape(-1, length))
        assert batch.positions.tolist() == expected["positions"]
        assert batch.document_ids.tolist() == expected["document_ids"]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=80),
    row_length=st.sampled_from([1, 2, 7, 16, 40]),
)
def test_pieces_go_where_best_fit_puts_them(lengths: list[int], row_length: int) -> None:
    packed = pack_documents(np.array(lengths, dtype=np.int64), row_length)
    pieces = sorted(zip(packed.start.tolist(), packed.length.tolist(), strict=True))
    assert [start + length for start, length in pieces[:-1]] == [start for start, _ in pieces[1:]]
    assert sum(packed.length.tolist()) == sum(lengths)
    ends = {start + n for start, n, end in zip(*packed[2:], strict=True) if end}
    assert ends == set(np.cumsum(lengths, dtype=np.int64).tolist())
    for row in range(packed.num_rows):
        own = packed.row == row
        stretches = list(zip(packed.offset[own].tolist(), packed.length[own].tolist(), strict=True))
        assert stretches[0][0] == 0
        assert all(a + n == b for (a, n), (b, _) in pairwise(stretches))
        assert sum(stretches[-1]) <= row_length
    falling = sorted((n for _, n in pieces), reverse=True)
    rows = best_fit(np.array(falling, dtype=np.int64), row_length)
    filled = np.bincount(rows, weights=falling, minlength=packed.num_rows)
    assert sorted(row_length - filled) == sorted(_rooms(falling, row_length))


def _rooms(falling: list[int], row_length: int) -> list[int]:
    """Best fit decreasing, one piece after the other: what every row has left."""
    rooms: list[int] = []
    for length in falling:
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(row_length - length)
    return rooms


def _assembled(order: PackedOrder, windows: np.ndarray, length: int):  # type: ignore[no-untyped-def]
    return assemble_windows(
        [order], np.zeros(len(windows), np.int32), windows, unit_tokens=ROW,
        sequence_length=length, num_microbatches=1,
    )  # fmt: skip
