"""Token stores cut by a score: nothing lost, nothing twice, and the same whatever the order."""

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cli import main
from data_pipeline.tokens.buckets import assign
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.store import ShardWriter, TokenStore, verify, write_manifest
from tests.crawl import sentence
from tests.stores import EOS_ID, VOCAB_SIZE

Documents = list[tuple[str, list[int]]]


def documents(count: int, seed: int = 0) -> Documents:
    """Documents of a few lengths, many of the same."""
    rng = random.Random(seed)
    return [
        (f"{rng.getrandbits(128):032x}", [rng.randrange(3, 900)] * rng.choice([1, 5, 5, 5, 9, 30]))
        for _ in range(count)
    ]


def write(folder: Path, given: Documents, num_shards: int = 3) -> TokenStore:
    """Write documents whose records tell their numbers of tokens."""
    infos = []
    for number, part in enumerate(np.array_split(np.arange(len(given)), num_shards)):
        with ShardWriter(folder, number, vocab_size=VOCAB_SIZE, eos_id=EOS_ID) as writer:
            for i in part.tolist():
                name, tokens = given[i]
                edits = ((0, 2, len(tokens)),)
                record = DocumentRecord(id=name, url=f"https://a.org/{name}", edits=edits)
                writer.add(tokens, record)
        infos.append(writer.info)
    write_manifest(
        folder, infos, tokenizer_hash="5" * 64, vocab_size=VOCAB_SIZE, eos_id=EOS_ID,
        pipeline_hash="made", notes={"order": "as read", "text_bytes": {"part-00000": 7}},
    )  # fmt: skip
    return TokenStore.open(folder)


def buckets_of(out: Path, count: int) -> list[TokenStore]:
    return [verify(out / f"bucket-{number + 1}") for number in range(count)]


def ids_of(store: TokenStore) -> list[str]:
    return [record.id for record in store.records(range(store.num_documents)).values()]


def score_file(path: Path, ids: Sequence[str], scores: Sequence[float]) -> Path:
    pq.write_table(pa.table({"id": list(ids), "score": list(scores)}), path)
    return path


def test_every_document_is_in_one_bucket_with_its_tokens_and_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = documents(2_200)
    store = write(tmp_path / "a", given, num_shards=2)
    records = store.records(range(len(given)))
    words = [f"store={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "by=length", "buckets=3"]
    assert main(["buckets", *words]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    parts = buckets_of(tmp_path / "out", 3)
    where = {name: d for d, (name, _) in enumerate(given)}
    seen: list[int] = []
    for part, line in zip(parts, told, strict=True):
        numbers = [where[name] for name in ids_of(part)]
        assert numbers == sorted(numbers)
        copies = part.records(range(part.num_documents))
        assert list(copies.values()) == [records[number] for number in numbers]
        for d, number in enumerate(numbers):
            assert part.document(d).tolist() == [*given[number][1], EOS_ID]
        lengths = [len(given[number][1]) + 1 for number in numbers]
        assert [line["lowest"], line["highest"]] == [min(lengths), max(lengths)]
        assert (line["documents"], line["tokens"]) == (len(numbers), sum(lengths))
        seen += numbers
    assert sorted(seen) == list(range(len(given)))
    assert all(a["highest"] <= b["lowest"] for a, b in pairwise(told))
    assert max(abs(part.num_tokens - store.num_tokens / 3) for part in parts) <= 31
    first = parts[0].manifest
    assert first is not None
    assert store.manifest is not None
    assert (first.tokenizer_hash, first.pipeline_hash) == ("5" * 64, "made")
    assert first.notes["cut_from"] == store.manifest.hash
    assert first.notes["order"] == "as read"
    assert first.notes["source"] == "a"  # ids are made of it, and `trace verify=true` asks
    assert "text_bytes" not in first.notes


def test_buckets_do_not_depend_on_order_parts_or_workers(tmp_path: Path) -> None:
    given = documents(600, seed=1)
    found = []
    for name, num_shards, workers in (("a", 1, 1), ("b", 4, 2)):
        write(tmp_path / name, given, num_shards)
        words = [f"store={tmp_path / name}", f"out={tmp_path / name}-out", "by=length"]
        assert main(["buckets", *words, "buckets=4", f"num_workers={workers}"]) == 0
        found.append([set(ids_of(b)) for b in buckets_of(tmp_path / f"{name}-out", 4)])
        random.Random(2).shuffle(given)
    assert found[0] == found[1]


def test_ties_at_an_edge_go_by_id_and_no_other_ids_are_asked_for() -> None:
    scores = np.array([1.0, 5.0, 5.0, 5.0, 5.0, 9.0])
    lengths = np.array([4, 2, 2, 2, 2, 4])
    names = ["z", "d", "a", "c", "b", "y"]
    asked: list[list[int]] = []

    def ids(rows: np.ndarray) -> list[str]:
        asked.append(rows.tolist())
        return [names[row] for row in rows]

    assert assign(scores, lengths, 2, ids).tolist() == [0, 1, 0, 1, 0, 1]
    assert asked == [[1, 2, 3, 4]]


def test_scores_of_a_file_are_found_by_id(tmp_path: Path) -> None:
    given = documents(300, seed=3)
    write(tmp_path / "a", given)
    rng = np.random.default_rng(0)
    scores = dict(zip([name for name, _ in given], rng.normal(size=300).tolist(), strict=True))
    file = score_file(tmp_path / "s.parquet", sorted(scores), [scores[n] for n in sorted(scores)])
    words = [f"store={tmp_path / 'a'}", f"out={tmp_path / 'out'}", f"by={file}", "buckets=2"]
    assert main(["buckets", *words]) == 0
    low, high = ([scores[i] for i in ids_of(b)] for b in buckets_of(tmp_path / "out", 2))
    assert max(low) <= min(high)
    assert len(low) + len(high) == 300


def test_scores_that_the_pipeline_noted_are_found(tmp_path: Path) -> None:
    rng = random.Random(4)
    rows = [
        {"text": "\n".join(sentence(rng) for _ in range(6)), "id": f"d{i}", "quality": i / 80}
        for i in range(80)
    ]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        f"input.web={tmp_path / 'web.jsonl'}", f"out={tmp_path / 'corpus'}", "pipeline=custom",
        "pipeline.stages=[exact]", "pipeline.fields.metadata=[quality]", "pipeline.fields.id=id",
        "pipeline.tokenizer.vocab_size=400", "pipeline.split.validation_share=0.1",
    ]  # fmt: skip
    assert main(["run", *given]) == 0
    stores, out = tmp_path / "corpus" / "stores", tmp_path / "out"
    words = [f"store={stores / 'train' / 'web'}", f"out={out}", "buckets=2"]
    assert main(["buckets", *words, "by=quality"]) == 0
    notes = [b.manifest.notes["scores"] for b in buckets_of(out, 2) if b.manifest]
    whole = TokenStore.open(stores / "train" / "web")
    assert sum(b.num_documents for b in buckets_of(out, 2)) == whole.num_documents
    assert 0 <= notes[0][0] < notes[0][1] < notes[1][0] < notes[1][1] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["by=length", "buckets=1"], "buckets=1; use a number from 2 to 256"),
        (["by=length", "buckets=9"], "would be empty"),
        (["by=quality"], "is no folder of one"),
        (["by={root}/absent.parquet"], "does not exist; give a Parquet file"),
        (["by={root}/short.parquet"], "has no score for document"),
        (["by={root}/twice.parquet"], "1 ids twice"),
        (["by={root}/nan.parquet"], "is nan; give every document a finite number"),
        (["by={root}/named.parquet"], "has no column score, it has id, value"),
    ],
)
def test_what_cannot_be_cut_is_one_message_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = documents(5)
    write(tmp_path / "a", given, 1)
    ids = [name for name, _ in given]
    score_file(tmp_path / "short.parquet", ids[1:], [1.0] * 4)
    score_file(tmp_path / "twice.parquet", [*ids, ids[0]], [1.0] * 6)
    score_file(tmp_path / "nan.parquet", ids, [1.0, 2.0, float("nan"), 3.0, 4.0])
    pq.write_table(pa.table({"id": ids, "value": [1.0] * 5}), tmp_path / "named.parquet")
    given_words = [f"store={tmp_path / 'a'}", f"out={tmp_path / 'out'}"]
    assert main(["buckets", *given_words, *(w.format(root=tmp_path) for w in words)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_finished_buckets_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", documents(50))
    words = [f"store={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "by=length", "buckets=2"]
    assert main(["buckets", *words]) == 0
    assert main(["buckets", *words]) == 2
    assert "bucket-1 is a finished store; use another out=" in capsys.readouterr().err
