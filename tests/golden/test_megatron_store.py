"""Megatron-Core reads the stores written here, and the stores it writes are read here."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.store import TokenStore, verify
from llmtrain.errors import DataError
from tests.stores import EOS_ID, random_documents, write_store


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns about packages it could use
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.parametrize("vocab_size", [32_000, 128_256])
def test_megatron_reads_our_store(megatron: Any, tmp_path: Path, vocab_size: int) -> None:
    documents = random_documents(50, 30)
    store = write_store(tmp_path / "ours", documents, num_shards=2, vocab_size=vocab_size)
    number = 0
    for shard in store.shards:
        theirs = megatron.IndexedDataset(shard.name)
        assert theirs.document_indices.tolist() == list(range(len(theirs) + 1))
        for sequence in range(len(theirs)):
            expected = [*documents[number], EOS_ID]
            assert theirs[sequence].tolist() == expected == store.document(number).tolist()
            assert theirs[sequence].dtype == store.shards[0].dtype
            number += 1
    assert number == len(documents)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_are_those_megatron_writes(megatron: Any, tmp_path: Path, dtype: type) -> None:
    documents = random_documents(20, 15)
    vocab_size = 32_000 if dtype is np.uint16 else 100_000
    store = write_store(tmp_path / "ours", documents, vocab_size=vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document([*document, EOS_ID], [len(document) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        ours = (store.path / f"part-00000.{end}").read_bytes()
        assert ours == (tmp_path / f"theirs.{end}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_a_store_megatron_wrote(megatron: Any, tmp_path: Path, dtype: type) -> None:
    """Documents of one to three sequences, as its tools write paragraphs."""
    rng = np.random.default_rng(0)
    prefix = tmp_path / "text_document"
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    documents = []
    for number in range(40):
        lengths = rng.integers(1, 9, 1 + number % 3).tolist()
        documents.append(rng.integers(0, 30_000, sum(lengths)).tolist())
        builder.add_document(documents[-1], lengths)
    builder.finalize(f"{prefix}.idx")
    store = TokenStore.open(prefix)
    assert store.shards[0].header.num_sequences > store.num_documents == len(documents)
    assert [store.document(i).tolist() for i in range(len(documents))] == documents
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    assert np.array_equal(store.document_boundaries(0, store.num_tokens), starts)
    assert verify(tmp_path).num_tokens == sum(map(len, documents))


def test_empty_documents_of_megatron_are_refused(megatron: Any, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3], [2, 1])
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match=r"holds 1 empty documents \(the first is number 1\)"):
        TokenStore.open(tmp_path)
