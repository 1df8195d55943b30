"""Parts of bounded size with every document once, whatever the batches, shards and budgets."""

import gzip
import json
import logging
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cli import main
from data_pipeline.config.extract import FieldsConfig
from data_pipeline.config.tokens import StoreConfig, TokenizerTrainingConfig
from data_pipeline.document import Document, Extractor, Run
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.manifest import ConservationError, Manifest, TaskResult
from data_pipeline.read.inputs import RawFile, document_id, file_inputs, find_raw_files, fingerprint
from data_pipeline.shards import SCHEMA, Shard, ShardFile, to_table
from data_pipeline.stages import Context, Stage
from data_pipeline.tokens.shuffle import FOLDER, shuffle_keys
from data_pipeline.tokens.stores import (
    StoreJob,
    sample_of_files,
    sample_of_shards,
    withdraw,
)
from data_pipeline.tokens.tokenize import (
    TokenizerSpec,
    gather_part,
    group_shards,
    open_encoder,
    to_records,
    tokenize_file,
    tokenize_shards,
)
from data_pipeline.tokens.tokenizer_training import (
    train_tokenizer,
    training_settings,
    within_memory,
)
from llmtrain.data.lineage import DocumentRecord, read_records
from llmtrain.data.store import TokenStore, verify
from llmtrain.errors import DataError
from llmtrain.tokenizer.tokenizer import load, train

NUMBER = 300
WORDS = ["area", "volume", "perimeter", "orange", "quickly", "bringing", "telephone", "window"]


def text_of(i: int) -> str:
    words = (f"{WORDS[i * k % len(WORDS)]}{i * k % 97}" for k in range(i % 30))
    return f"Document {i}: {' '.join(words)}\n"


def document(i: int) -> Document:
    text = text_of(i)
    return Document(
        id=document_id("web", str(i)), source="web", text=text, url=f"https://example.org/{i}",
        source_file_id="ab" * 32, member_offset=i, member_length=7, payload_sha256="cd" * 32,
        extractor=Extractor(name="resiliparse", version="2", options="{}"), language="en",
        edits=(Run(0, 4, 3), Run(3, 9, len(text) - 3)), cluster=f"{i:032x}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(map(text_of, range(NUMBER)), folder, kind="byte_bpe", vocab_size=300)
    return folder


def write_shards(out: Path, cuts: list[int]) -> list[Shard]:
    """Write the documents over shards that end at ``cuts``."""
    shards = []
    for number, (low, high) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
        path = f"stages/split/train-{number:05d}.parquet"
        file = ShardFile(out / path, SCHEMA)
        file.add(to_table([document(i) for i in range(low, high)]))
        digest, size = file.close()
        shards.append(Shard(
            path=path, source="web", rows=file.rows, text_bytes=file.text_bytes,
            text_characters=file.text_characters, digest=digest, size=size,
        ))  # fmt: skip
    return shards


def make_stores(
    out: Path, tokenizer: Path, cuts: list[int], memory: int = 1 << 32, **store: Any
) -> tuple[TokenStore, Manifest]:
    """Run the stage over the documents and return the store of the training documents."""
    config = StoreConfig(**store)
    shards = write_shards(out, cuts)
    job = StoreJob(
        tokenizer_path=str(tokenizer), tokenizer=load(tokenizer), config=config,
        memory_bytes=memory, pipeline_hash="ee",
    )  # fmt: skip
    stage = Stage(
        Context(out=out, executor=InlineExecutor()), "09-tokenize", job.settings(),
        [shard.as_dict() for shard in shards], out / "stores",
    )  # fmt: skip
    jobs = [
        (
            {"out": str(out), "store": "train/web", "index": i, "shards": group},
            sum(shard.text_bytes for shard in group),
        )
        for i, group in enumerate(group_shards(shards, config.part_bytes))
    ]
    withdraw(stage, {"train/web"})
    manifest = job.run(stage, tokenize_shards, jobs, sample_of_shards(out, shards))
    return verify(out / "stores" / "train" / "web"), manifest


def ids_of(store: TokenStore) -> list[str]:
    assert store.manifest is not None
    names = [f"{shard.name}.docs.parquet" for shard in store.manifest.shards]
    return [record.id for name in names for record in read_records(store.path / name)]


def test_records_are_those_of_the_documents() -> None:
    table = to_table([document(i) for i in range(4)])
    found = to_records(table.slice(1)).to_pylist()
    for row, i in zip(found, range(1, 4), strict=True):
        expected = document(i)
        assert row["extractor"] == {"name": "resiliparse", "version": "2", "options": "{}"}
        assert row["edits"] == [0, 4, 3, 0, 2, len(text_of(i)) - 3]
        assert row["text_bytes"] == len(expected.text.encode())
        kept = ("id", "url", "source_file_id", "member_offset", "payload_sha256", "cluster")
        assert [row[name] for name in kept] == [getattr(expected, name) for name in kept]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_document_stands_once_with_its_tokens_and_origin(
    tmp_path: Path, tokenizer: Path, shuffle: bool
) -> None:
    store, manifest = make_stores(
        tmp_path, tokenizer, [110, 120, NUMBER], part_bytes=9_000, shuffle=shuffle
    )
    opened = load(tokenizer)
    ids = ids_of(store)
    expected = {document(i).id: i for i in range(NUMBER)}
    assert sorted(ids) == sorted(expected)
    for position in range(0, NUMBER, 17):
        record = store.record(position)
        i = expected[record.id]
        tokens = store.document(position).tolist()
        assert opened.decode(tokens[:-1]) == text_of(i)
        assert tokens[-1] == opened.eos_id
        assert record == DocumentRecord(
            id=record.id, url=f"https://example.org/{i}", source_file_id="ab" * 32,
            member_offset=i, member_length=7, payload_sha256="cd" * 32,
            extractor_name="resiliparse", extractor_version="2", extractor_options="{}",
            text_bytes=len(text_of(i)), num_tokens=len(tokens), cluster=f"{i:032x}",
            language="en", edits=((0, 4, 3), (3, 9, len(text_of(i)) - 3)),
        )  # fmt: skip
    in_order = [document(i).id for i in range(NUMBER)]
    keys = dict(zip(in_order, shuffle_keys(in_order, 0).tolist(), strict=True))
    assert ids == (sorted(in_order, key=keys.__getitem__) if shuffle else in_order)
    assert manifest.counts.documents_out == NUMBER
    assert manifest.counts.tokens == store.num_tokens
    assert not (tmp_path / "stores" / FOLDER).exists()


@pytest.mark.parametrize("shuffle", [False, True])
def test_parts_are_bounded_and_told_in_the_manifest(
    tmp_path: Path, tokenizer: Path, shuffle: bool
) -> None:
    store, manifest = make_stores(tmp_path, tokenizer, [NUMBER], part_bytes=5_000, shuffle=shuffle)
    assert store.manifest is not None
    notes = store.manifest.notes
    sizes = notes["text_bytes"]
    total = sum(len(text_of(i)) for i in range(NUMBER))
    assert sum(sizes.values()) == total
    assert max(sizes.values()) <= 5_000
    assert list(sizes) == sorted(shard.name for shard in store.manifest.shards)
    assert -(-total // 5_000) <= len(sizes) <= 2 * total // 5_000
    assert notes["encoder"].startswith("fastokens ")
    assert notes["source"] == "web"
    assert notes["order"] == ("shuffled, seed 0" if shuffle else "as read")
    assert manifest.details == {
        "encoder": notes["encoder"],
        "stores": {
            "train/web": {
                "parts": len(sizes), "documents": NUMBER, "tokens": store.num_tokens,
                "text_bytes": total,
            }
        },
    }  # fmt: skip


def test_a_document_larger_than_a_part_has_its_own(tmp_path: Path, tokenizer: Path) -> None:
    store, _ = make_stores(tmp_path, tokenizer, [30], part_bytes=180, shuffle=False)
    assert store.manifest is not None
    sizes = store.manifest.notes["text_bytes"]
    for shard in store.manifest.shards:
        assert sizes[shard.name] <= 180 or shard.num_documents == 1
    assert max(sizes.values()) > 180
    assert max(shard.num_documents for shard in store.manifest.shards) > 1
    assert ids_of(store) == [document(i).id for i in range(30)]


def test_shuffled_bytes_depend_on_documents_and_seed_alone(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.tokens.stores._MIN_CHUNK", 20_000)
    one, _ = make_stores(tmp_path / "a", tokenizer, [NUMBER], part_bytes=20_000)
    many, manifest = make_stores(
        tmp_path / "b", tokenizer, [7, 120, 121, 260, NUMBER], memory=1 << 15, part_bytes=20_000
    )
    assert one.fingerprint == many.fingerprint
    assert manifest.details["encoder"].startswith("tokenizers ")  # and another encoder
    whole, _ = make_stores(tmp_path / "c", tokenizer, [NUMBER])
    assert ids_of(whole) == ids_of(one)
    assert len(whole.shards) == 1 < len(one.shards)
    other, _ = make_stores(tmp_path / "d", tokenizer, [NUMBER], shuffle_seed=1)
    assert ids_of(other) != ids_of(whole)
    assert sorted(ids_of(other)) == sorted(ids_of(whole))


def test_chunks_grow_with_the_text_within_the_memory(tokenizer: Path) -> None:
    job = StoreJob(
        tokenizer_path=str(tokenizer), tokenizer=load(tokenizer), config=StoreConfig(),
        memory_bytes=1 << 30, pipeline_hash="",
    )  # fmt: skip
    assert job.chunk_bytes(1) == 4 << 20
    assert job.chunk_bytes(1 << 31) == 16 << 20
    assert job.chunk_bytes(10**14) == 64 << 20  # a 16th of the memory
    assert replace(job, memory_bytes=1 << 40).chunk_bytes(10**14) == 256 << 20


def test_keys_are_spread_for_every_seed() -> None:
    ids = [f"{i:032x}" for i in range(20_000)]  # no hashes at all
    for seed in (0, 1, 2**64 - 1):
        keys = shuffle_keys(ids, seed)
        assert len(np.unique(keys)) == len(ids)
        counts = np.bincount((keys >> np.uint64(58)).astype(int), minlength=64)
        assert counts.min() > 200
        assert counts.max() < 430
        order = np.argsort(keys)
        assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.03


def test_a_lost_scatter_file_is_no_smaller_store(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(**arguments: Any) -> TaskResult:
        return gather_part(**{**arguments, "files": arguments["files"][1:]})

    monkeypatch.setattr("data_pipeline.tokens.stores.gather_part", forgetful)
    with pytest.raises(ConservationError, match=r"300 documents scattered, 180 gathered"):
        make_stores(tmp_path, tokenizer, [120, NUMBER], part_bytes=9_000)
    with pytest.raises(DataError, match="no manifest"):
        TokenStore.open(tmp_path / "stores" / "train" / "web")


def test_fallback_is_told_once(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        store, _ = make_stores(tmp_path, tokenizer, [NUMBER], memory=1 << 20)
    told = [r.getMessage() for r in caplog.records if "encodes:" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("tokenizers ")
    assert "fastokens takes about" in told[0]
    assert store.num_documents == NUMBER


@pytest.fixture
def raw(tmp_path: Path) -> list[RawFile]:
    rows = [json.dumps({"text": text_of(i)}) for i in range(NUMBER)]
    rows[5:5] = ["not json", json.dumps({"text": ""})]
    for name, low, high in (("a", 0, 200), ("b", 200, None)):
        content = "\n".join(rows[low:high]) + "\n"
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    return [fingerprint(file) for file in find_raw_files({"mine": str(tmp_path)})]


def store_files(
    out: Path, tokenizer: Path, files: list[RawFile], share: float = 0.0, **store: Any
) -> Manifest:
    """Make a store of raw files in this process."""
    job = StoreJob(
        tokenizer_path=str(tokenizer), tokenizer=load(tokenizer), memory_bytes=1 << 30,
        config=StoreConfig(**store), pipeline_hash="",
    )  # fmt: skip
    context = Context(out=out / ".pipeline", executor=InlineExecutor())
    stage = Stage(context, "tokenize", job.settings(), file_inputs(files), out)
    common = {"fields": FieldsConfig(), "share": share}
    jobs = [({**common, "index": i, "file": file}, 1) for i, file in enumerate(files)]
    return job.run(stage, tokenize_file, jobs, sample_of_files(files, FieldsConfig()))


@pytest.mark.parametrize("shuffle", [False, True])
def test_raw_files(tmp_path: Path, tokenizer: Path, raw: list[RawFile], shuffle: bool) -> None:
    out = tmp_path / "mine"
    manifest = store_files(out, tokenizer, raw, 0.1, part_bytes=6_000, shuffle=shuffle)
    train_store, held_out = verify(out), verify(out / "validation")
    assert train_store.num_documents + held_out.num_documents == NUMBER
    assert 10 < held_out.num_documents < 60
    for store in (train_store, held_out):
        assert store.manifest is not None
        assert store.manifest.notes["source"] == "mine"
    counts = manifest.counts
    assert (counts.documents_in, counts.documents_out) == (NUMBER + 2, NUMBER)
    assert counts.dropped == {"no_text": 1}
    assert sum(counts.quarantined.values()) == 1
    assert counts.tokens == train_store.num_tokens + held_out.num_tokens
    opened = load(tokenizer)
    texts = {
        opened.decode(store.document(i)[:-1].tolist())
        for store in (train_store, held_out)
        for i in range(store.num_documents)
    }
    assert texts == set(map(text_of, range(NUMBER)))


def test_every_row_of_a_lost_row_group_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.Table.from_pylist([{"text": text_of(i) * 9} for i in range(30)])
    pq.write_table(rows, path, row_group_size=10, compression="zstd")
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    files = [fingerprint(file) for file in find_raw_files({"s": str(path)})]
    counts = store_files(tmp_path / "out", tokenizer, files).counts
    assert counts.documents_in == 30
    assert counts.quarantined == {"unreadable": 10}


def test_another_tokenizer_in_a_worker_is_refused(tokenizer: Path) -> None:
    spec = TokenizerSpec(str(tokenizer), load(tokenizer).hash, True)
    assert open_encoder(spec) is open_encoder(spec)
    with pytest.raises(DataError, match=r"the stage began with 00; put the tokenizer back"):
        open_encoder(spec._replace(hash="00"))


@pytest.mark.parametrize(("kind", "file"), [("byte_bpe", "tokenizer.json"), ("bpe", ".model")])
def test_training_does_not_depend_on_shards(tmp_path: Path, kind: Any, file: str) -> None:
    settings = TokenizerTrainingConfig(kind=kind, vocab_size=310, sample_bytes=12_000)
    results = []
    for name, cuts in (("a", [NUMBER]), ("b", [3, 150, NUMBER])):
        folder = tmp_path / name / "tokenizer"
        folder.mkdir(parents=True)
        shards = write_shards(tmp_path / name, cuts)
        results.append(train_tokenizer(folder, str(tmp_path / name), shards, settings))
    assert results[0].files == results[1].files
    assert any(name.endswith(file) for name in results[0].files)
    meta = json.loads((tmp_path / "a" / "tokenizer" / "llmtrain_tokenizer.json").read_text())
    assert 12_000 <= meta["sample"]["bytes"] < 12_300


def test_training_keeps_to_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    settings = TokenizerTrainingConfig(kind="unigram", vocab_size=300, sample_bytes=1_000_000)
    assert within_memory(settings, 24_000_000, 10**9) == settings
    assert within_memory(settings, 12_000_000, 400_000).sample_bytes == 500_000
    assert caplog.records == []
    assert within_memory(settings, 12_000_000, 10**9).sample_bytes == 500_000
    assert "trained on 500,000 bytes of text, not on sample_bytes=1,000,000" in caplog.text


def test_a_missing_trainer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TokenizerTrainingConfig(kind="byte_bpe")
    assert training_settings(settings)["trainer"].startswith("tokenizers 0.")

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("data_pipeline.tokens.tokenizer_training.version", missing)
    with pytest.raises(DataError, match=r"byte_bpe needs the package tokenizers, .*pip install"):
        training_settings(settings)


def write_text(folder: Path) -> str:
    """Write two files of text in two alphabets; return the input."""
    folder.mkdir()
    greek = str.maketrans("abcdefghiklmnopqrstuvwxyz", "αβψδεφγηικλμνοπqρστθωςχυζ")
    for name, table in (("a", {}), ("b", greek)):
        rows = [json.dumps({"text": text_of(i).translate(table)}) for i in range(NUMBER)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return f"input={folder}"


def test_commands_train_on_all_files_and_shuffle_them(tmp_path: Path) -> None:
    given, tokenizer = write_text(tmp_path / "text"), tmp_path / "tokenizer"
    words = ["kind=byte_bpe", "vocab_size=320", "sample_bytes=9000", f"out={tokenizer}"]
    assert main(["tokenizer", given, *words]) == 0
    opened = load(tokenizer)
    assert opened.vocab_size == 320
    assert len(opened.encode(" area")) < 5  # the sample holds both files
    assert len(opened.encode(" αρεα")) < 8
    words = [given, f"tokenizer={tokenizer}", f"out={tmp_path / 'mine'}", "num_workers=2"]
    assert main(["tokenize", *words, "shuffle=true", "part_bytes=30000"]) == 0
    files = [fingerprint(f) for f in find_raw_files({"mine": str(tmp_path / "text")})]
    store_files(tmp_path / "b" / "mine", tokenizer, files, part_bytes=30_000)
    store, inline = verify(tmp_path / "mine"), verify(tmp_path / "b" / "mine")
    assert store.manifest is not None
    assert inline.manifest is not None
    assert store.manifest.shards == inline.manifest.shards
    assert len(store.shards) > 1
    origins = [store.record(i).source_file_id for i in range(40)]
    assert 8 < origins.count(origins[0]) < 32  # both files from the beginning


@pytest.mark.parametrize("field", ["part_bytes=0", "shuffle_seed=-1", "memory_gib=0.0"])
def test_wrong_settings_of_the_command(
    tmp_path: Path, tokenizer: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [write_text(tmp_path / "text"), f"tokenizer={tokenizer}", f"out={tmp_path / 'o'}"]
    assert main(["tokenize", *words, field]) == 2
    assert f"{field}; use a number" in capsys.readouterr().err
