"""Roles of tokens: written, read, joined, damaged, and what becomes of them in a batch."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.config.commands import BucketsConfig
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.tokens.buckets import cut
from llmtrain.config.data import FimConfig
from llmtrain.data.assemble import assemble_pieces, assemble_windows
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.fim import FillInMiddle
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.order import ConcatOrder, Pieces
from llmtrain.data.roles import ANSWER, SECOND, second_starts, texts
from llmtrain.data.store import ShardWriter, TokenStore, open_source, verify, write_manifest
from llmtrain.data.trace import numbered, sightings, step_content
from llmtrain.errors import DataError
from tests.stores import EOS_ID, plan_over, random_documents, write_store

VOCABULARY = 32_000
A, S = ANSWER, SECOND


def role_documents(num_documents: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Documents of 1 to 30 tokens with roles, every other one a pair."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(num_documents):
        length = int(rng.integers(2, 30))
        roles = rng.integers(0, 2, length)
        if i % 2:
            roles[int(rng.integers(1, length)) :] |= SECOND
        found.append((rng.integers(3, VOCABULARY, length - 1).tolist(), roles.tolist()))
    return found


def write_roles(
    folder: Path, documents: Sequence[tuple[list[int], list[int]]], num_shards: int = 2
) -> TokenStore:
    infos = []
    for index, part in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        with ShardWriter(folder, index, vocab_size=VOCABULARY, eos_id=EOS_ID) as writer:
            for i in part.tolist():
                writer.add(documents[i][0], DocumentRecord(id=f"{i:032x}"), documents[i][1])
        infos.append(writer.info)
    write_manifest(folder, infos, tokenizer_hash="0" * 64, vocab_size=VOCABULARY, eos_id=EOS_ID)
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def documents() -> list[tuple[list[int], list[int]]]:
    return role_documents(40)


@pytest.fixture(scope="module")
def store(
    documents: list[tuple[list[int], list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> TokenStore:
    return write_roles(tmp_path_factory.mktemp("roles") / "chat", documents)


def test_texts_of_a_document() -> None:
    roles = np.array([0, A, A, S, S, S | A], dtype=np.uint8)
    assert texts(roles) == [slice(0, 3), slice(3, 6)]
    assert second_starts(roles).tolist() == [3]
    assert texts(roles[:3]) == [slice(0, 3)]
    assert texts(roles[3:]) == [slice(0, 3)]


def test_gives_back_roles(store: TokenStore, documents: list[tuple[list[int], list[int]]]) -> None:
    flat = np.concatenate([roles for _, roles in documents])
    assert store.has_roles
    assert np.array_equal(store.roles(0, store.num_tokens), flat)
    edge = int(store.shard_starts[1])
    assert np.array_equal(store.roles(edge - 7, edge + 9), flat[edge - 7 : edge + 9])
    assert verify(store.path).num_tokens == len(flat)


def test_batches_give_the_bytes_of_single_documents(
    store: TokenStore, documents: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(store.records_path(0)).drop_columns("num_tokens")
    own = documents[: table.num_rows]
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in own)])
    ids = np.concatenate([tokens for tokens, _ in own])
    roles = np.concatenate([roles for _, roles in own]).astype(np.uint8)
    with ShardWriter(tmp_path, 0, vocab_size=VOCABULARY, eos_id=EOS_ID) as writer:
        writer.add_batch(ids, offsets, table, roles)
    assert store.manifest is not None
    assert writer.info == store.manifest.shards[0]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([A, A], "2 roles for 3 tokens"),
        ([0, 7, 0], "has role 7"),
        ([S, 0, 0], "first text, then second"),
        ([0, S, 0], "first text, then second"),
    ],
)
def test_roles_that_are_none_are_refused(roles: list[int], message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=message),
        ShardWriter(tmp_path, 0, vocab_size=9, eos_id=2) as writer,
    ):
        writer.add([5, 6], DocumentRecord(id="a"), roles)
    assert list(tmp_path.iterdir()) == []


def test_some_with_and_some_without_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, vocab_size=9, eos_id=2)
    writer.add([5], DocumentRecord(id="a"), [0, A])
    writer.add([5], DocumentRecord(id="b"))
    with pytest.raises(DataError, match="roles for 2 of its 4 tokens"):
        writer.close()
    infos = []
    for index, roles in enumerate(([0, A], None)):
        with ShardWriter(tmp_path, index, vocab_size=9, eos_id=2) as shard:
            shard.add([5], DocumentRecord(id="a"), roles)
        infos.append(shard.info)
    with pytest.raises(DataError, match="part-00001 has no roles"):
        write_manifest(tmp_path, infos, tokenizer_hash="", vocab_size=9, eos_id=2)


def test_a_remote_store_fetches_roles(store: TokenStore, tmp_path: Path) -> None:
    remote = TokenStore.open(f"file://{store.path}", cache_dir=tmp_path)
    pieces = Pieces(*np.array([[0, 1], [0, 0], [0, store.num_tokens - 40], [40, 40]]))
    given = {"sequence_length": 40, "num_microbatches": 1}
    far, near = (
        assemble_pieces([(s, pieces)], np.zeros(2, np.int32), **given) for s in (remote, store)
    )
    assert torch.equal(far.targets, near.targets)
    assert list(tmp_path.rglob("part-00000.roles"))


def test_damage_is_found(store: TokenStore, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "copy")
    path = copy / "part-00001.roles"
    content = bytearray(path.read_bytes())
    content[5] ^= ANSWER
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00001.roles has sha256"):
        verify(copy)
    with pytest.raises(DataError, match=r"part-00001.roles is not the file its manifest lists"):
        TokenStore.open(copy).check_ends()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"part-00001.roles holds"):
        TokenStore.open(copy)


def test_buckets_keep_roles(store: TokenStore, tmp_path: Path) -> None:
    config = BucketsConfig(store=str(store.path), out=str(tmp_path), by="length", buckets=2)
    cut(config, InlineExecutor())
    of_id = {store.record(d).id: d for d in range(store.num_documents)}
    for number in (1, 2):
        bucket = verify(tmp_path / f"bucket-{number}")
        for document in range(bucket.num_documents):
            same = of_id[bucket.record(document).id]
            assert np.array_equal(bucket.document(document), store.document(same))
            assert np.array_equal(
                bucket.roles(*bucket.document_span(document)),
                store.roles(*store.document_span(same)),
            )


def reference(store: TokenStore, start: int, length: int) -> list[list[int]]:
    """Tokens, targets, positions, ids of a row [start, start + length), token by token."""
    tokens = store.tokens(0, store.num_tokens).tolist()
    roles = store.roles(0, store.num_tokens)
    begins = set(store.document_boundaries(0, store.num_tokens).tolist())
    begins |= {
        low + text.start
        for low, high in map(store.document_span, range(store.num_documents))
        for text in texts(roles[low:high])
    }
    rows: list[list[int]] = [[], [], [], []]
    position = number = -1
    for place in range(start, start + length):
        fresh = place in begins or place == start
        position, number = (0, number + 1) if fresh else (position + 1, number)
        after = place + 1
        silent = after == len(tokens) or after in begins or not roles[after] & ANSWER
        target = IGNORE_INDEX if silent else tokens[after]
        for row, value in zip(rows, (tokens[place], target, position, number), strict=True):
            row.append(value)
    return rows


def assert_row(batch: StepBatch, row: int, expected: list[list[int]]) -> None:
    names = ("tokens", "targets", "positions", "document_ids")
    for name, values in zip(names, expected, strict=True):
        assert getattr(batch, name)[row].tolist() == values, name
    assert torch.equal(batch.loss_weight, (batch.targets != IGNORE_INDEX).float())


@pytest.mark.parametrize("length", [7, 60, 300])
def test_rows_follow_the_definition(store: TokenStore, length: int) -> None:
    order = ConcatOrder(store, "chat", seed=1, window_tokens=length)
    windows = np.arange(order.num_windows)
    batch = assemble_windows(
        [order], np.zeros(len(windows), np.int32), windows, unit_tokens=length,
        sequence_length=length, num_microbatches=1,
    )  # fmt: skip
    for window in windows.tolist():
        assert_row(batch, window, reference(store, window * length, length))


def test_the_last_tokens_and_pieces_side_by_side(store: TokenStore) -> None:
    end, first = store.num_tokens, store.document_span(3)
    pieces = Pieces(*np.array([(0, 0, end - 20, 20), (1, 0, *first), (1, 30, end - 9, 9)]).T)
    pieces.length[1] -= first[0]
    batch = assemble_pieces(
        [(store, pieces)], np.zeros(2, np.int32), sequence_length=40, num_microbatches=1
    )
    for row, offset, start, length in zip(*(a.tolist() for a in pieces[:4]), strict=True):
        tokens, targets, positions, _ = reference(store, start, length)
        where = (row, slice(offset, offset + length))
        assert batch.tokens[where].tolist() == tokens
        assert batch.targets[where].tolist() == targets
        assert batch.positions[where].tolist() == positions


def test_a_store_without_roles_beside_one_with(store: TokenStore, tmp_path: Path) -> None:
    plain = write_store(tmp_path / "plain", random_documents(30, 20))
    both = open_source([str(plain.path), str(store.path)])
    assert both.has_roles
    assert not plain.has_roles
    assert (both.roles(0, plain.num_tokens) == ANSWER).all()
    edge = plain.num_tokens
    for start in (edge - 30, edge - 1, edge, edge + 40):
        pieces = Pieces(*np.array([[0], [0], [start], [50]]))
        batch = assemble_pieces(
            [(both, pieces)], np.zeros(1, np.int32), sequence_length=50, num_microbatches=1
        )
        assert_row(batch, 0, reference(both, start, 50))


def test_a_mixture_counts_every_token_of_the_one_and_answers_of_the_other(
    store: TokenStore, tmp_path: Path
) -> None:
    plain = write_store(tmp_path / "plain", random_documents(60, 20))
    plan = plan_over(
        {"chat": store, "plain": plain}, {"chat": 0.5, "plain": 0.5}, sequence_length=32,
        global_batch_size=8,
    )  # fmt: skip
    chosen = plan.windows(0)
    batch = assemble_windows(
        plan.orders, chosen.sources, chosen.windows, unit_tokens=32, sequence_length=32,
        num_microbatches=1,
    )  # fmt: skip
    stores = (store, plain)
    for row, (source, window) in enumerate(zip(chosen.sources, chosen.windows, strict=True)):
        assert_row(batch, row, reference(stores[source], int(window) * 32, 32))


def test_fill_in_the_middle_leaves_answers_alone(store: TokenStore, tmp_path: Path) -> None:
    plain = write_store(tmp_path / "plain", random_documents(60, 40))
    fim = FillInMiddle(
        FimConfig(rate=1.0, prefix_id=3, suffix_id=4, middle_id=5), seed=1,
        source_names=("chat", "plain"),
    )  # fmt: skip
    orders = [ConcatOrder(s, "x", seed=1, window_tokens=64) for s in (store, plain)]
    given = {"unit_tokens": 64, "sequence_length": 64, "num_microbatches": 1}
    sources, windows = np.array([0, 1, 0], np.int32), np.array([1, 2, 3])
    mixed = assemble_windows(orders, sources, windows, fim=fim, **given)
    alone = assemble_windows(orders, sources, windows, **given)
    assert torch.equal(mixed.tokens[::2], alone.tokens[::2])
    assert torch.equal(mixed.targets[::2], alone.targets[::2])
    assert not torch.equal(mixed.tokens[1], alone.tokens[1])


def test_trace_tells_the_texts_of_pairs_apart(store: TokenStore) -> None:
    plan = plan_over({"chat": store}, None, sequence_length=32, global_batch_size=4)
    roles = store.roles(0, store.num_tokens)
    for step in range(3):
        content = step_content(plan, step)
        chosen = plan.windows(step)
        batch = assemble_windows(
            plan.orders, chosen.sources, chosen.windows, unit_tokens=32, sequence_length=32,
            num_microbatches=1,
        )  # fmt: skip
        assert {(r, n) for r, row in enumerate(batch.document_ids.tolist()) for n in row} == set(
            numbered(content)
        )
        for (row, number), found in numbered(content).items():
            begin = store.document_span(found.document)[0]
            low, high = (begin + token for token in found.tokens)
            inputs = batch.document_ids[row] == number
            assert batch.tokens[row][inputs].tolist() == store.tokens(low, high).tolist()
            assert len({role & SECOND for role in roles[low:high].tolist()}) == 1
            assert found in sightings(plan, 0, found.document, before_step=3)
