"""Keyed deduplication against the rule in a few lines of Python."""

import hashlib
import random
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.dedup import ExactConfig, SpanConfig, UrlDedupConfig
from data_pipeline.config.rules import C4Config
from data_pipeline.dedup.keyed import settle
from data_pipeline.dedup.keys import RECORD, page_order, span_keys
from data_pipeline.dedup.losers import line_ranges
from data_pipeline.dedup.url import normalize_c4
from data_pipeline.document import Document
from data_pipeline.text.sentence_spans import sentence_spans
from data_pipeline.text.sentences import rule_sentences
from llmtrain.errors import DataError
from tests.dedup_corpus import document, run_stage

TINY = 20_000 / 2**30
"""A budget that makes every stage cut its records into runs and its buckets into ranges."""


def random_documents(number: int) -> list[Document]:
    rng = random.Random(5)
    return [
        document(
            int(hashlib.md5(str(i).encode()).hexdigest(), 16),
            f"text {rng.randrange(number // 2)}",
            url=f"https://www.x.org/{rng.randrange(number // 2)}" if rng.random() < 0.9 else "",
            timestamp=f"2026-01-{rng.randint(1, 9):02d}T00:00:00Z" if rng.random() < 0.9 else "",
        )
        for i in range(number)
    ]


@pytest.mark.parametrize(("rows", "memory_gib"), [(7, 4.0), (100, TINY), (400, TINY)])
def test_newest_page_per_address_stays(rows: int, memory_gib: float, tmp_path: Path) -> None:
    documents = random_documents(400)
    best: dict[str, Document] = {}
    for page in documents:
        key = normalize_c4(page.url) if page.url else page.id
        if key not in best or page.timestamp > best[key].timestamp:
            best[key] = page
    outcome = run_stage(tmp_path, "url", documents, rows, memory_gib=memory_gib)
    assert {d.id for d in outcome.kept} == {d.id for d in best.values()}
    assert outcome.manifest.counts.dropped == {"url.duplicate": 400 - len(best)}
    assert outcome.manifest.details["buckets"] == (1 if memory_gib == 4.0 else 4)


def test_documents_that_stay_keep_their_order_and_every_field(tmp_path: Path) -> None:
    documents = random_documents(40)
    outcome = run_stage(tmp_path, "exact", documents, 9)
    by_id = {d.id: d for d in documents}
    assert outcome.kept == [by_id[d.id] for d in outcome.kept]
    positions = [documents.index(d) for d in outcome.kept]
    assert positions == sorted(positions)


def test_times_without_a_zone_are_utc_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        documents = [
            document(i, "x", url="https://x.org", timestamp=moment)
            for i, moment in enumerate(("2026-01-01T12:00:00", "2026-01-01T13:00:00Z", "no time"))
        ]
        outcome = run_stage(tmp_path, "url", documents, 2)
        assert [d.timestamp for d in outcome.kept] == ["2026-01-01T13:00:00Z"]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("memory_gib", [4.0, TINY])
def test_smallest_id_per_text_stays(memory_gib: float, tmp_path: Path) -> None:
    documents = random_documents(300)
    best = {
        text: min(d.id for d in documents if d.text == text) for text in {d.text for d in documents}
    }
    outcome = run_stage(tmp_path, "exact", documents, 110, memory_gib=memory_gib)
    assert sorted(d.id for d in outcome.kept) == sorted(best.values())


def test_a_hot_key_costs_one_record_per_shard(tmp_path: Path) -> None:
    records = np.zeros(1000, RECORD)
    records["row"] = np.arange(1000)
    winners, losers = settle(records)
    assert winners["row"].tolist() == [0]
    assert losers["row"].tolist() == list(range(1, 1000))
    documents = [document(i, "the same") for i in range(900)]
    outcome = run_stage(tmp_path, "exact", documents, 300, memory_gib=TINY)
    assert outcome.ids == [0]


def test_settle_looks_at_both_halves_of_a_key() -> None:
    records = np.zeros(4, RECORD)
    records["key_hi"], records["key_lo"] = 9, [2, 1, 2, 1]
    records["order_hi"], records["row"] = [5, 4, 3, 4], range(4)
    winners, losers = settle(records)
    assert winners["row"].tolist() == [1, 2]
    assert losers["row"].tolist() == [0, 3]


def test_pages_and_texts_of_an_earlier_run_go(tmp_path: Path) -> None:
    earlier, later = random_documents(60)[:30], random_documents(60)[30:]
    for name, config, key in (
        ("url", UrlDedupConfig, lambda d: d.url and normalize_c4(d.url)),
        ("exact", ExactConfig, lambda d: d.text),
    ):
        old, new = tmp_path / name / "old", tmp_path / name / "new"
        run_stage(old, name, earlier, **{name: config(keep_keys=True)})
        alone = run_stage(tmp_path / name / "alone", name, later)
        outcome = run_stage(new, name, later, memory_gib=TINY, **{name: config(against=str(old))})
        known = {key(d) for d in earlier} - {""}
        assert outcome.ids == [
            int(d.id, 16) for d in sorted(alone.kept, key=lambda d: d.id) if key(d) not in known
        ]
        assert set(outcome.reasons.values()) == {f"{name}.duplicate", f"{name}.known"}


def test_earlier_runs_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    documents = random_documents(10)
    with pytest.raises(DataError, match="has 0 finished stages named exact, expected one"):
        run_stage(tmp_path / "a", "exact", documents, exact=ExactConfig(against=str(tmp_path)))
    run_stage(tmp_path / "old", "exact", documents)
    against = ExactConfig(against=(str(tmp_path / "old"),))
    with pytest.raises(DataError, match=r"kept no keys; run it again with .*keep_keys=true"):
        run_stage(tmp_path / "b", "exact", documents, exact=against)
    run_stage(tmp_path / "old2", "exact", documents, exact=ExactConfig(keep_keys=True))
    (file,) = (tmp_path / "old2/stages/01-exact/keys").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    against = ExactConfig(against=str(tmp_path / "old2"))
    with pytest.raises(DataError, match="is damaged"):
        run_stage(tmp_path / "c", "exact", documents, exact=against)


def test_a_line_stays_in_the_page_with_the_smallest_md5(tmp_path: Path) -> None:
    lines = ["One sentence stands here.", "Another one. And a third.", "A fourth, quite alone."]
    pages = [
        document(
            i, "\n".join([*lines, f"Page {i} has a line. And {i} more."]), url=f"https://x/{i}"
        )
        for i in range(5)
    ]
    first = min(range(5), key=lambda i: page_order(f"https://x/{i}", ""))
    last = max(range(5, 50), key=lambda i: page_order(f"https://x/{i}", ""))
    pages.append(document(9, lines[0].upper() + " ", url=f"https://x/{last}"))
    outcome = run_stage(tmp_path, "line_dedup", pages, 2)
    assert outcome.texts == {first: pages[first].text}
    assert set(outcome.reasons.values()) == {"line_dedup.few_sentences", "line_dedup.empty"}


def test_pages_without_full_stops_stay_under_the_rule_of_mc4(tmp_path: Path) -> None:
    chinese = [document(i, f"第{i}页" + "这是一个很长的句子。" * 3) for i in range(3)]
    strict = run_stage(tmp_path / "c4", "line_dedup", chinese, 1)
    assert set(strict.reasons.values()) == {"line_dedup.few_sentences"}
    outcome = run_stage(tmp_path / "mc4", "line_dedup", chinese, 1, c4=C4Config(variant="mc4"))
    assert outcome.texts == {i: page.text for i, page in enumerate(chinese)}


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ({0}, [(0, 2)]), ({1}, [(2, 5)]), ({2}, [(5, 8)]), ({0, 2}, [(0, 2), (5, 8)]), (set(), []),
    ],
)  # fmt: skip
def test_lines_go_with_their_newline(gone: set[int], expected: list[tuple[int, int]]) -> None:
    assert line_ranges("a\nbb\nccc", sorted(gone)) == expected


def test_page_order_is_md5_of_the_normalised_address() -> None:
    assert page_order("https://www.x.org/a/", "id") == hashlib.md5(b"x.org/a").digest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!\nThree", ["One. ", "Two!\n", "Three"]),
        ("  It costs 3.50 (or so.) Really?", ["  It costs 3.50 (or so.) ", "Really?"]),
        ("第一句。第二句！第三", ["第一句。", "第二句！", "第三"]),
        ("a\n\n\n b. ", ["a\n\n\n ", "b. "]),
        ("... \n", ["... \n"]),
        (" \n", []),
    ],
)
def test_sentences_follow_one_another_without_a_gap(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentence_spans(text)] == expected


@pytest.mark.parametrize(
    "text", ["." * 200_000 + "x", "a" + "?!" * 100_000, ('."' * 100_000) + "x"]
)
def test_a_long_row_of_marks_takes_no_longer_than_any_other_text(text: str) -> None:
    start = time.process_time()
    assert len(sentence_spans(text)) == rule_sentences(text, 3) == 1
    assert time.process_time() - start < 1.0


def test_three_sentences_that_stand_elsewhere_go(tmp_path: Path) -> None:
    shared = "It is shared. It really is. All three."
    pages = [
        document(1, f"Alpha one. Alpha two. Alpha three. {shared} Alpha four.", url="https://x/1"),
        document(2, f"Beta one.\n{shared.upper()}\nBeta two. Beta three.", url="https://x/2"),
        document(3, f"{shared} Gamma.", url="https://x/3"),
        document(4, "It is shared. It really is. Only two of them.", url="https://x/4"),
    ]
    first = min((1, 2, 3), key=lambda i: page_order(f"https://x/{i}", ""))
    cut = {
        1: "Alpha one. Alpha two. Alpha three. Alpha four.",
        2: "Beta one.\nBeta two. Beta three.",
    }
    outcome = run_stage(tmp_path, "span_dedup", pages, 2)
    expected = {d: cut.get(d, "") for d in (1, 2, 3) if d != first} | {
        first: pages[first - 1].text, 4: pages[3].text,
    }  # fmt: skip
    assert outcome.texts == {d: text for d, text in expected.items() if text}
    for page in outcome.kept:
        before = next(d.text for d in pages if d.id == page.id)
        assert "".join(before[r.extracted_start :][: r.length] for r in page.edits) == page.text


def test_repeats_inside_a_document_leave_the_first_span_whole(tmp_path: Path) -> None:
    assert [n for n, _ in span_keys("A b. " * 7, 3)] == [0, 3]
    outcome = run_stage(
        tmp_path, "span_dedup", [document(1, "A b. " * 7)], span_dedup=SpanConfig(min_sentences=1)
    )
    assert outcome.texts == {1: "A b. A b. A b. A b. "}
    assert outcome.manifest.counts.deleted == {"span_dedup.duplicate": 15}
