"""Decontamination: every shared n-gram is found, none that is not there, and cuts are exact."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config.content import DecontaminationConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document, identity
from data_pipeline.filters.block_lists import list_files
from data_pipeline.filters.decontaminate import DECONTAMINATE, NOTE, Decontaminate
from data_pipeline.filters.evaluation_sets import EvaluationIndex, Example, read_examples
from data_pipeline.manifest import Counts
from data_pipeline.step import Dropped, Kept
from data_pipeline.text.normal_words import ngram_keys, normal_words
from data_pipeline.transform import StepCounts, count_edit, judge
from llmtrain.errors import ConfigError, DataError

QUESTION = "What is the capital of the country that has the most lakes in the world?"
NUMBERS = " ".join(f"n{i}" for i in range(400))


def document(text: str) -> Document:
    return Document(id="0", source="s", text=text, edits=identity(text))


def step(tmp_path: Path, *examples: str, **settings: object) -> Decontaminate:
    rows = [json.dumps({"id": 7, "question": text}) for text in examples]
    (tmp_path / "toy.jsonl").write_text("\n".join(rows) + "\n")
    section = DecontaminationConfig(benchmarks={"toy": str(tmp_path / "toy.jsonl")}, **settings)  # type: ignore[arg-type]
    options = DECONTAMINATE.options(PipelineConfig(stages=(), decontaminate=section))
    assert options is not None
    assert hash(tuple(options.items()))
    built = DECONTAMINATE.build(**options)
    assert isinstance(built, Decontaminate)
    return built


def text_of(words: str) -> list[str]:
    split = normal_words(words)
    return [split.phrase(i, 1) for i in range(len(split.hashes))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("Don't, panic -- it's 3,000.5%!", ["dont", "panic", "its", "30005"]),
        ("ÄÖ\u00a0straße\u3000x\u00ady", ["äö", "straße", "xy"]),
        ("日本語 text", ["日", "本", "語", "text"]),
        ("a日b", ["a", "日", "b"]),
        ("İx ΑΣ", ["ix", "ασ"]),
        ("snake_case ...", ["snakecase"]),
    ],
)
def test_words_are_compared_without_case_and_punctuation(text: str, words: list[str]) -> None:
    assert text_of(text) == words
    split = normal_words(text)
    stretches = [text[s:e] for s, e in zip(split.starts, split.ends, strict=True)]
    assert ["".join(text_of(stretch)) for stretch in stretches] == words


def test_an_overlap_is_found_whatever_its_case_punctuation_and_white_space(tmp_path: Path) -> None:
    rule = step(tmp_path, "Another question that nobody asks here at all, " * 2, QUESTION)
    inside = "Quiz:\n\n" + QUESTION.upper().replace(" ", " -- ") + "\nAnswer: Canada"
    note = (
        "toy example 1, 100.0% of its n-grams: what is the capital of the country that has the "
        "most lakes in"
    )
    assert rule(document(inside)) == Dropped("decontaminate.toy", ((NOTE, note),))
    finding = rule.findings(document(inside))[0]
    assert (finding.value, finding.passed) == (note, False)
    short = document(" ".join(QUESTION.split()[:12]) + " else")
    assert rule(short) == Kept(short)
    assert rule.findings(short)[0].passed


def test_words_as_utf8_stand_where_their_bounds_say() -> None:
    words = normal_words("Ab é ＡＢ 日本 \U0001d400 x\ud800")
    letters, bounds = words.utf8()
    parts = [letters[a:b].tobytes() for a, b in pairwise(bounds.tolist())]
    expected = [words.phrase(i, 1).encode("utf-8", "surrogatepass") for i in range(len(parts))]
    assert parts == expected
    assert b"".join(parts) == letters.tobytes()


def test_what_was_found_stands_in_the_dropped_documents_metadata(tmp_path: Path) -> None:
    rule = step(tmp_path, QUESTION)
    judged = judge([document(f"x {QUESTION}")], {rule.name: rule}, {rule.name: StepCounts()})[0]
    assert judged.reason == "decontaminate.toy"
    assert judged.original.text == f"x {QUESTION}"
    assert judged.original.metadata[NOTE].startswith("toy example 0, 100.0% of its n-grams: what")


def test_equal_hashes_of_other_words_are_no_hit(tmp_path: Path) -> None:
    index = EvaluationIndex.build([Example("toy", 0, QUESTION)], 13)
    other = normal_words(QUESTION.replace("lakes", "hills"))
    assert not len(index.find(other).words)
    forged = EvaluationIndex(
        ngram=13, keys=np.sort(ngram_keys(other, 13)), places=index.places, letters=index.letters,
        bounds=index.bounds, firsts=index.firsts, examples=index.examples,
        sieve=np.full_like(index.sieve, 255), shift=index.shift,
    )  # fmt: skip
    assert not len(forged.find(other).words)  # the keys say yes, the words say no


WORD = st.sampled_from(["a", "b", "c", "é", "日"])


@settings(max_examples=150)
@given(
    examples=st.lists(st.lists(WORD, max_size=8).map(" ".join), max_size=4),
    text=st.lists(WORD, max_size=14).map(" ".join),
    ngram=st.integers(1, 4),
)
def test_hits_are_all_shared_ngrams_and_no_others(
    examples: list[str], text: str, ngram: int
) -> None:
    index = EvaluationIndex.build([Example("t", i, e) for i, e in enumerate(examples)], ngram)
    hits = index.find(normal_words(text))
    flat = [(i, word) for i, each in enumerate(examples) for word in text_of(each)]
    own = text_of(text)
    expected = [
        (i, place)
        for i in range(len(own) - ngram + 1)
        for place in range(len(flat) - ngram + 1)
        if [word for _, word in flat[place : place + ngram]] == own[i : i + ngram]
        and flat[place][0] == flat[place + ngram - 1][0]
    ]
    assert sorted(zip(hits.words.tolist(), hits.places.tolist(), strict=True)) == expected
    numbers = [max(0, len(text_of(each)) - ngram + 1) for each in examples]
    assert index.ngrams.tolist() == numbers


def test_a_share_of_an_examples_ngrams_may_be_asked_for(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(27)]  # twenty 8-grams
    rule = step(tmp_path, " ".join(words), ngram=8, min_share=0.5)
    assert isinstance(rule(document(" ".join(words[:16]))), Kept)  # nine
    assert isinstance(rule(document(" ".join(words[:17]))), Dropped)  # ten
    apart = " ".join(words[:12]) + " x " + " ".join(words[15:])
    assert isinstance(rule(document(apart)), Dropped)  # five and five
    again = " ".join([" ".join(words[:12])] * 3)
    assert isinstance(rule(document(again)), Kept)  # the same five three times


def cut(rule: Decontaminate, text: str) -> str:
    verdict = rule(document(text))
    assert isinstance(verdict, Kept)
    counts = Counts()
    after = verdict.document
    count_edit(counts, "decontaminate", text, after.text, after.edits, verdict.deleted)
    assert counts.inserted == verdict.inserted
    assert set(verdict.deleted) == {"decontaminate.toy"}
    assert after.metadata[NOTE].startswith("toy example 0")
    return after.text


def test_the_overlap_may_be_cut_out_with_what_stands_around_it(tmp_path: Path) -> None:
    rule = step(tmp_path, QUESTION, action="cut")
    before, after = "b" * 450, "a" * 450
    assert cut(rule, f"{before} {QUESTION} {after}") == "b" * 251 + "\n\n" + "a" * 252
    assert cut(rule, f"{QUESTION} {after}") == "a" * 252
    assert cut(rule, f"{before} {QUESTION} short") == "b" * 251
    assert cut(rule, f"{'b' * 398} {QUESTION} {after}") == "a" * 252  # a piece of 199
    assert isinstance(rule(document(f"x {QUESTION} y")), Dropped)  # nothing is left
    near = step(tmp_path, QUESTION, action="cut", window=0, min_piece_characters=0)
    assert cut(near, f"x {QUESTION} y {QUESTION}") == "x \n\n? y \n\n?"


def test_documents_cut_into_many_pieces_go(tmp_path: Path) -> None:
    rule = step(tmp_path, QUESTION, action="cut", window=0, min_piece_characters=1)
    pieces = [f"{QUESTION} {'x' * 50}"]
    assert isinstance(rule(document(" ".join(pieces * 10))), Kept)
    assert isinstance(rule(document(" ".join(pieces * 11))), Dropped)


def test_examples_come_from_lines_of_json_and_from_paragraphs(tmp_path: Path) -> None:
    row = {"question": "Q?", "choices": {"text": ["one", "two"], "label": [1, 2]}, "answer": "A"}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n\n"))
    (tmp_path / "b.txt").write_text("first\nline\n\n\nsecond\n")
    files = list_files([str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.txt")], "examples")
    texts = [(e.number, e.text) for e in read_examples("toy", files, ())]
    assert texts == [(0, "Q?\none\ntwo\nA"), (1, "first\nline\n"), (2, "second\n")]
    fields = [e.text for e in read_examples("toy", files[:1], ("answer", "choices"))]
    assert fields == ["A\none\ntwo"]


def test_evaluation_sets_are_refused_in_one_sentence(tmp_path: Path) -> None:
    absent = DecontaminationConfig(benchmarks={"toy": str(tmp_path / "absent")})
    with pytest.raises(DataError, match=r"benchmarks\.toy=.* matches no file"):
        DECONTAMINATE.options(PipelineConfig(stages=(), decontaminate=absent))
    path = tmp_path / "a.jsonl"
    for content, message in [
        ("", "has no example"), ("{]", "example 0 of toy cannot be read"),
        ("[1]", "line 1 is no JSON object"), ('{"q": "x"}', "has no field 'question'"),
    ]:  # fmt: skip
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            list(read_examples("toy", list_files([str(path)], "examples"), ("question",)))
    with pytest.raises(ConfigError, match="min_share=2"):
        DecontaminationConfig(min_share=2.0)


def test_the_manifest_names_sets_and_examples_that_are_too_short(tmp_path: Path) -> None:
    step(tmp_path, QUESTION, "Too short.")
    section = DecontaminationConfig(benchmarks={"toy": str(tmp_path / "toy.jsonl")})
    facts = DECONTAMINATE.settings(PipelineConfig(stages=(), decontaminate=section))
    assert facts["benchmarks"]["toy"]["examples"] == 2
    assert facts["benchmarks"]["toy"]["too_short"] == 1
    nothing = PipelineConfig(stages=())
    assert DECONTAMINATE.options(nothing) is None
    assert "no page was tested" in DECONTAMINATE.settings(nothing)["benchmarks"]
