"""Rows out of pieces: slices, paddings and both ways to read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.data import assemble
from llmtrain.data.assemble import assemble_pieces, assemble_windows
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.order import ConcatOrder, Pieces
from llmtrain.data.store import TokenStore
from tests.stores import random_documents, write_store

FIELDS = ("tokens", "targets", "positions", "document_ids", "loss_weight")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_store(tmp_path_factory.mktemp("a"), random_documents(60, 20), num_shards=4)


def rows_of(store: TokenStore, pieces: list[tuple[int, int, int, int]], length: int) -> StepBatch:
    """Rows of ``length`` with pieces (row, offset, start, length)."""
    columns = Pieces(*np.array(pieces).T)
    num_rows = int(columns.row.max()) + 1
    return assemble_pieces(
        [(store, columns)], np.zeros(num_rows, np.int32), sequence_length=length, num_microbatches=1
    )


@pytest.mark.parametrize("length", [1, 8, 16])
def test_short_rows_continue_each_other(store: TokenStore, length: int) -> None:
    order = ConcatOrder(store, "a", seed=1, window_tokens=16)
    windows = np.array([5, 0, 17])
    batch = assemble_windows(
        [order, order], np.array([0, 1, 0], np.int32), windows, unit_tokens=16,
        sequence_length=length, num_microbatches=3,
    )  # fmt: skip
    starts = (windows[:, None] * 16 + np.arange(0, 16, length)).reshape(-1)
    assert batch.source_ids.tolist() == np.repeat([0, 1, 0], 16 // length).tolist()
    assert batch.num_microbatches == 3
    for row, start in enumerate(starts.tolist()):
        alone = rows_of(store, [(0, 0, start, length)], length)
        for name in FIELDS:
            assert torch.equal(getattr(batch, name)[row], getattr(alone, name)[0]), name


def test_what_no_piece_covers_is_padding(store: TokenStore) -> None:
    start, end = store.document_span(3)
    batch = rows_of(store, [(1, 2, start, 4), (1, 8, end - 2, 2)], 12)
    expected = store.tokens(start, start + 5).astype(np.int64).tolist()
    last = store.tokens(end - 2, end).astype(np.int64).tolist()
    assert batch.tokens.tolist() == [[0] * 12, [0, 0, *expected[:4], 0, 0, *last, 0, 0]]
    no, padding = IGNORE_INDEX, [IGNORE_INDEX] * 2
    targets = [*padding, *expected[1:], *padding, last[1], no, *padding]
    assert batch.targets.tolist() == [[no] * 12, targets]
    assert batch.positions[1].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 0, 1]
    assert batch.document_ids[1].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert batch.positions[0].tolist() == list(range(12))
    assert torch.equal(batch.loss_weight, (batch.targets != IGNORE_INDEX).float())


def test_the_last_token_of_a_store_has_no_target(store: TokenStore) -> None:
    batch = rows_of(store, [(0, 0, store.num_tokens - 4, 4)], 4)
    assert batch.targets[0, 3] == IGNORE_INDEX
    assert batch.tokens[0].tolist() == store.tokens(store.num_tokens - 4, store.num_tokens).tolist()


def test_both_ways_to_read_agree(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    starts = rng.integers(0, store.num_tokens - 40, 50)
    starts[1] = store.num_tokens - 40
    lengths = [40 if i % 2 else 3 + i % 30 for i in range(50)]  # every other row is one piece
    pieces = [(i, 0, start, lengths[i]) for i, start in enumerate(starts.tolist())]
    found = []
    for limit in (0, 20, 1000):
        monkeypatch.setattr(assemble, "GATHER_BELOW", limit)
        found.append(rows_of(store, pieces, 40))
    for name in FIELDS:
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name
        assert torch.equal(getattr(found[0], name), getattr(found[2], name)), name


def test_tensors_are_contiguous_and_of_the_stated_types(tmp_path: Path, store: TokenStore) -> None:
    batch = rows_of(store, [(0, 0, 0, 32), (1, 0, 32, 32)], 32)
    types = [torch.int64, torch.int64, torch.int32, torch.int32, torch.float32]
    for name, dtype in zip(FIELDS, types, strict=True):
        tensor = getattr(batch, name)
        assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (dtype, (2, 32), True)
