"""A store gives back what was written, and every kind of damage has its sentence."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import blake3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.store import (
    MANIFEST,
    ShardWriter,
    TokenStore,
    open_source,
    verify,
    write_manifest,
)
from llmtrain.errors import DataError
from tests.stores import EOS_ID, random_documents, write_store


@pytest.fixture
def documents() -> list[list[int]]:
    return random_documents(60, 20)


@pytest.fixture
def store(tmp_path: Path, documents: list[list[int]]) -> TokenStore:
    return write_store(tmp_path / "wiki", documents, num_shards=3)


def flat(documents: list[list[int]]) -> np.ndarray:
    return np.concatenate([[*document, EOS_ID] for document in documents])


def test_gives_back_tokens_and_documents(store: TokenStore, documents: list[list[int]]) -> None:
    tokens = flat(documents)
    assert store.num_tokens == len(tokens)
    assert store.num_documents == len(documents)
    assert np.array_equal(store.tokens(0, len(tokens)), tokens)
    assert all(
        store.document(i).tolist() == [*document, EOS_ID] for i, document in enumerate(documents)
    )
    edge = int(store.shard_starts[1])
    assert np.array_equal(store.tokens(edge - 5, edge + 5), tokens[edge - 5 : edge + 5])


@pytest.mark.parametrize("max_known_starts", [1 << 21, 10])
def test_boundaries_come_from_the_index(
    store: TokenStore,
    documents: list[list[int]],
    max_known_starts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmtrain.data.store.MAX_KNOWN_STARTS", max_known_starts)
    lengths = np.array([len(document) + 1 for document in documents])
    starts = np.cumsum(lengths) - lengths
    assert np.array_equal(store.document_boundaries(0, store.num_tokens), starts)
    begin = np.arange(0, store.num_tokens - 90, 37)
    rows, offsets = store.boundaries(begin, 90)
    for row, start in enumerate(begin):
        inside = starts[(starts >= start) & (starts < start + 90)] - start
        assert np.array_equal(offsets[rows == row], inside)


def test_finds_the_document_of_a_token(store: TokenStore) -> None:
    for document in range(store.num_documents):
        start, end = store.document_span(document)
        assert store.document_at(start) == store.document_at(end - 1) == document
    assert store.record(41).url == "https://example.org/41"
    assert store.record(41).num_tokens == len(store.document(41))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_408, "uint16"), (65_409, "int32"), (128_256, "int32")]
)
def test_dtype_follows_the_padded_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    store = write_store(tmp_path, [[vocab_size - 1]], vocab_size=vocab_size)
    assert store.shards[0].dtype == dtype
    assert store.tokens(0, 2).tolist() == [vocab_size - 1, EOS_ID]


def test_two_writers_of_one_shard_give_the_same_bytes(
    tmp_path: Path, documents: list[list[int]]
) -> None:
    one = write_store(tmp_path / "one", documents, num_shards=2)
    two = write_store(tmp_path / "two", documents, num_shards=2)
    names = sorted(path.name for path in one.path.iterdir())
    assert names == sorted(path.name for path in two.path.iterdir())
    assert len(names) == 7
    for name in names:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_batches_give_the_bytes_of_single_documents(tmp_path: Path) -> None:
    documents = random_documents(2600, 6)
    records = [
        DocumentRecord(id=f"{i:032x}", text_bytes=i, edits=((0, i, 3), (5, i + 9, 2)))
        for i in range(len(documents))
    ]
    with ShardWriter(tmp_path / "a", 0, vocab_size=40_000, eos_id=EOS_ID) as single:
        for document, record in zip(documents, records, strict=True):
            single.add(document, record)
    table = pq.read_table(tmp_path / "a" / "part-00000.docs.parquet").drop_columns("num_tokens")
    offsets = np.cumsum([0, *map(len, documents)])
    tokens = np.concatenate(documents).astype(np.uint32)
    with ShardWriter(tmp_path / "b", 0, vocab_size=40_000, eos_id=EOS_ID) as batched:
        batched.add(documents[0], records[0])
        for low, high in ((1, 1), (1, 700), (700, 701), (701, 2500), (2500, 2600)):
            batched.add_batch(tokens, offsets[low : high + 1], table.slice(low, high - low))
    assert batched.info == single.info


def test_batches_are_checked_like_documents(tmp_path: Path) -> None:
    table = pa.table({"id": ["first", "second"]})
    writer = ShardWriter(tmp_path, 0, vocab_size=300, eos_id=EOS_ID)
    with pytest.raises(DataError, match="document second of part-00000 is empty"):
        writer.add_batch(np.array([5, 6]), np.array([0, 2, 2]), table)
    with pytest.raises(DataError, match="document second holds token 300, the vocabulary ends at"):
        writer.add_batch(np.array([5, 6, 300]), np.array([0, 2, 3]), table)
    assert writer.close().num_documents == 0


def test_pieces_of_a_shard_follow_it(tmp_path: Path) -> None:
    infos = []
    for index, piece in ((1, 0), (0, 1), (0, 0), (0, 2)):
        writer = ShardWriter(tmp_path, index, vocab_size=300, eos_id=EOS_ID, piece=piece)
        writer.add([10 * index + piece + 3], DocumentRecord(id=f"{index}-{piece}"))
        infos.append(writer.close())
    write_manifest(tmp_path, infos, tokenizer_hash="0", vocab_size=300, eos_id=EOS_ID)
    store = verify(tmp_path)
    assert store.tokens(0, 8)[::2].tolist() == [3, 4, 5, 13]


def test_notes_are_kept_and_change_no_fingerprint(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, vocab_size=300, eos_id=EOS_ID) as writer:
        writer.add([5], DocumentRecord(id="a"))
    common = {"tokenizer_hash": "0", "vocab_size": 300, "eos_id": EOS_ID}
    plain = write_manifest(tmp_path, [writer.info], **common)
    noted = write_manifest(tmp_path, [writer.info], **common, notes={"encoder": "some 1.0"})
    assert noted.hash == plain.hash
    assert TokenStore.open(tmp_path).manifest == noted


def test_a_manifest_without_notes_opens(store: TokenStore) -> None:
    path = store.path / MANIFEST
    before = json.loads(path.read_text())
    del before["notes"]
    path.write_text(json.dumps(before))
    hashed = json.dumps({**before, "hash": ""}, sort_keys=True, separators=(",", ":"))
    assert before["hash"] == blake3.blake3(hashed.encode()).hexdigest()
    assert TokenStore.open(store.path).fingerprint == store.fingerprint


def test_empty_shards_are_left_out_and_empty_documents_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, vocab_size=100, eos_id=2) as empty:
        pass
    with ShardWriter(tmp_path, 1, vocab_size=100, eos_id=2) as full:
        full.add([5], DocumentRecord(id="a"))
        with pytest.raises(DataError, match="is empty"):
            full.add([], DocumentRecord(id="b"))
        with pytest.raises(DataError, match="holds token 100, the vocabulary ends at 99"):
            full.add([100], DocumentRecord(id="c"))
    identity = {"tokenizer_hash": "0", "vocab_size": 100, "eos_id": 2}
    manifest = write_manifest(tmp_path, [full.info, empty.info], **identity)
    assert [shard.name for shard in manifest.shards] == ["part-00001"]
    assert TokenStore.open(tmp_path).num_tokens == 2
    with pytest.raises(DataError, match="would be empty"):
        write_manifest(tmp_path, [empty.info], **identity)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, 0, vocab_size=100, eos_id=2) as writer:
            writer.add([5], DocumentRecord(id="a"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_truncated_bin_is_named_with_both_sizes(store: TokenStore) -> None:
    path = store.path / "part-00001.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=f"part-00001.bin holds {size - 6:,} bytes") as error:
        TokenStore.open(store.path)
    assert f"its manifest says {size:,}" in str(error.value)


def test_flipped_byte_is_found_by_verify_alone(store: TokenStore) -> None:
    assert verify(store.path).num_tokens == store.num_tokens
    path = store.path / "part-00002.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    assert TokenStore.open(store.path).num_tokens == store.num_tokens
    with pytest.raises(DataError, match=r"part-00002.bin has sha256 .* it is damaged"):
        verify(store.path)


def test_wrong_magic(store: TokenStore) -> None:
    path = store.path / "part-00000.idx"
    path.write_bytes(b"NOTINDEX\0" + path.read_bytes()[9:])
    with pytest.raises(DataError, match="does not begin with the magic"):
        TokenStore.open(store.path)


def test_missing_shard_file_and_missing_manifest(store: TokenStore) -> None:
    (store.path / "part-00000.docs.parquet").unlink()
    with pytest.raises(DataError, match=r"part-00000.docs.parquet is missing"):
        TokenStore.open(store.path)
    (store.path / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"has no manifest.json; the store is unfinished"):
        TokenStore.open(store.path)


@pytest.mark.parametrize("content", ["{", "{}", '{"shards": [], "of": "another kind"}'])
def test_unreadable_manifest(store: TokenStore, content: str) -> None:
    (store.path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="is not a manifest of format version 1"):
        TokenStore.open(store.path)


def test_edited_manifest(store: TokenStore) -> None:
    path = store.path / MANIFEST
    plain = json.loads(path.read_text())
    plain["eos_id"] = 1
    path.write_text(json.dumps(plain))
    with pytest.raises(DataError, match="was changed after it was written"):
        TokenStore.open(store.path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; .*llmtrain-data tokenize"):
        TokenStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.zst", "*.parquet"])
def test_raw_text_is_answered_with_the_command_that_helps(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        TokenStore.open(tmp_path / name)
    assert f"llmtrain-data tokenize input={tmp_path / name} text_field=text" in str(error.value)


def test_a_file_of_another_kind_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not a store")
    with pytest.raises(DataError, match=r"README.md is a file; expected the folder"):
        TokenStore.open(tmp_path / "README.md")


def test_folder_of_raw_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(DataError) as error:
        TokenStore.open(tmp_path)
    assert f"llmtrain-data tokenize input={tmp_path}/*.jsonl.gz" in str(error.value)


def test_a_pair_without_a_manifest_opens_by_prefix_and_by_folder(
    store: TokenStore, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for end in ("bin", "idx"):
        (store.path / f"part-00000.{end}").rename(foreign / f"text_document.{end}")
    opened = [TokenStore.open(foreign), TokenStore.open(foreign / "text_document")]
    opened.append(TokenStore.open(foreign / "text_document.bin"))
    assert {one.num_tokens for one in opened} == {int(store.shard_starts[1])}
    assert len({one.fingerprint for one in opened}) == 1
    assert verify(foreign).manifest is None
    path = foreign / "text_document.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert TokenStore.open(foreign).fingerprint != opened[0].fingerprint
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"text_document.bin holds .* bytes, its index says"):
        TokenStore.open(foreign)


def test_a_swapped_shard_of_the_same_size_is_found_before_it_is_read(tmp_path: Path) -> None:
    documents = [[7 + i, *range(10, 20)] for i in range(40)]
    store = write_store(tmp_path, documents, num_shards=2)
    assert store.shards[0].bin_file.size == store.shards[1].bin_file.size
    first, second = tmp_path / "part-00000.bin", tmp_path / "part-00001.bin"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    swapped = TokenStore.open(tmp_path)
    for read in (lambda: swapped.tokens(0, 3), lambda: swapped.document(39)):
        with pytest.raises(DataError, match=r"bin is not the file its manifest lists: its first"):
            read()
    with pytest.raises(DataError, match=r"part-00000.bin has sha256"):
        verify(tmp_path)


def test_a_damaged_index_is_found_before_it_is_read(store: TokenStore) -> None:
    path = store.path / "part-00001.idx"
    raw = bytearray(path.read_bytes())
    raw[40] ^= 1
    path.write_bytes(raw)
    opened = TokenStore.open(store.path)
    assert opened.document(0).tolist() == store.document(0).tolist()
    with pytest.raises(DataError, match=r"part-00001.idx is not the file its manifest lists"):
        opened.document(25)


def test_a_store_written_without_digests_of_its_ends_opens(
    store: TokenStore, documents: list[list[int]]
) -> None:
    path = store.path / MANIFEST
    plain = json.loads(path.read_text())
    for shard in plain["shards"]:
        del shard["ends"]
    hashed = {**plain, "hash": "", "notes": None}
    del hashed["notes"]
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    plain["hash"] = blake3.blake3(text.encode()).hexdigest()
    path.write_text(json.dumps(plain))
    opened = TokenStore.open(store.path)
    assert np.array_equal(opened.tokens(0, opened.num_tokens), flat(documents))


def test_a_file_that_shrinks_after_the_check_is_refused_not_mapped(store: TokenStore) -> None:
    opened = TokenStore.open(store.path)
    path = store.path / "part-00002.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"part-00002.bin"):
        opened.document(59)


def test_unchecked_opening_reads_the_manifest_alone(store: TokenStore) -> None:
    (store.path / "part-00001.bin").unlink()
    (store.path / "part-00002.idx").write_bytes(b"")
    opened = TokenStore.open(store.path, check=False)
    assert opened.fingerprint == store.fingerprint
    assert opened.document(3).tolist() == store.document(3).tolist()
    with pytest.raises(DataError, match=r"part-00001.bin cannot be read \(No such file"):
        opened.document(25)
    with pytest.raises(DataError, match=r"part-00002.idx"):
        opened.document(45)


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    store = write_store(tmp_path, random_documents(80, 8), num_shards=80)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 50, hard))
    try:
        total = sum(int(store.document(i)[-1]) for i in range(80))
        assert len(store.document_boundaries(0, store.num_tokens)) == 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert total == 80 * EOS_ID


def test_several_stores_are_read_as_one(tmp_path: Path, documents: list[list[int]]) -> None:
    one = write_store(tmp_path / "one", documents[:20], num_shards=2)
    two = write_store(tmp_path / "two", documents[20:40])
    three = write_store(tmp_path / "three", documents[40:])
    pair = tmp_path / "pair"
    pair.mkdir()
    for end in ("bin", "idx"):
        (three.path / f"part-00000.{end}").rename(pair / f"text_document.{end}")
    paths = [str(one.path), str(two.path), str(pair / "text_document")]
    store = open_source(paths)
    assert store.num_documents == len(documents)
    assert np.array_equal(store.tokens(0, store.num_tokens), flat(documents))
    edges = np.cumsum([len(document) + 1 for document in documents])
    starts = np.append(0, edges[:-1])
    assert np.array_equal(store.document_boundaries(0, store.num_tokens), starts)
    assert store.record(25).url == two.record(5).url
    with pytest.raises(DataError, match="stores of other programs have none"):
        store.record(50)
    assert store.manifest is not None
    assert store.manifest.eos_id == EOS_ID
    assert open_source(paths).fingerprint == store.fingerprint
    assert open_source(paths[::-1]).fingerprint != store.fingerprint
    assert open_source(paths[:1]).fingerprint == open_source(paths[0]).fingerprint


def test_stores_that_do_not_go_together(tmp_path: Path, documents: list[list[int]]) -> None:
    one = write_store(tmp_path / "one", documents)
    write_store(tmp_path / "copy", documents)
    write_store(tmp_path / "other", documents[5:], tokenizer_hash="f" * 64)
    with pytest.raises(DataError, match=r"copy holds the same tokens as .*one; list a store once"):
        open_source([str(one.path), str(tmp_path / "copy")])
    with pytest.raises(DataError, match=r"other was made with tokenizer ffffffffffffffff"):
        open_source([str(one.path), str(tmp_path / "other")])
    with pytest.raises(DataError, match="the list of stores is empty"):
        open_source([])


def test_other_tokenizer(store: TokenStore) -> None:
    store.check_tokenizer("0" * 64)
    with pytest.raises(DataError, match="the given tokenizer is ffffffffffffffff; set tokenizer"):
        store.check_tokenizer("f" * 64)


def test_positions_outside(store: TokenStore) -> None:
    with pytest.raises(DataError, match="is outside"):
        store.tokens(0, store.num_tokens + 1)
    with pytest.raises(DataError, match="60 documents; 60 is outside"):
        store.document(60)


def test_importing_the_store_reaches_no_torch_and_no_pyarrow() -> None:
    code = (
        "import sys, llmtrain.data.store, llmtrain.tokenizer.tokenizer\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pyarrow', 'sentencepiece')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
