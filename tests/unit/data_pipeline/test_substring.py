"""Repeats by suffix array against a dictionary of windows."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config.dedup import SubstringConfig
from data_pipeline.dedup.substring import blocks_of, byte_ranges, default_block_bytes, token_ranges
from data_pipeline.document import Document
from llmtrain.errors import ConfigError
from tests.dedup_corpus import document, make_shards, run_stage


def plain_ranges(texts: list[str], length: int) -> list[set[int]]:
    """Characters that go, per text, found window by window."""
    first: dict[bytes, tuple[int, int]] = {}
    gone: list[set[int]] = []
    for number, text in enumerate(texts):
        content = text.encode()
        covered: set[int] = set()
        for start in range(len(content) - length + 1):
            if content[start] & 0xC0 == 0x80:
                continue
            window = content[start : start + length]
            place = first.setdefault(window, (number, start))
            if place != (number, start):
                begin = max(start, place[1] + length) if place[0] == number else start
                covered |= set(range(begin, start + length))
        position, characters = 0, set()
        for i, character in enumerate(text):
            size = len(character.encode())
            if covered.issuperset(range(position, position + size)):
                characters.add(i)
            position += size
        gone.append(characters)
    return gone


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(alphabet="abcé漢 ", max_size=40), min_size=1, max_size=5),
    length=st.integers(2, 9),
)
def test_bytes_go_as_by_the_plain_rule(texts: list[str], length: int) -> None:
    found = byte_ranges(texts, length)
    assert [{i for a, b in ranges for i in range(a, b)} for ranges in found] == plain_ranges(
        texts, length
    )
    for ranges in found:
        assert ranges == sorted(ranges)


def test_the_first_of_a_repeating_text_stays_whole() -> None:
    assert byte_ranges(["a" * 50], 10) == [[(10, 50)]]
    assert byte_ranges(["x" * 9, "x" * 9], 10) == [[], []]


def test_tokens_are_words_marks_and_single_characters() -> None:
    texts = ["One, two three.", "zero one, ONE, two three!", "猫である漢字 猫である漢字"]
    assert token_ranges(texts, 3) == [[], [(13, 24)], [(7, 13)]]
    assert token_ranges([texts[0], "So One, two  three, four"], 4) == [[], [(3, 18)]]


def corpus() -> list[Document]:
    rng = random.Random(2)
    phrases = ["".join(rng.choices("abcdefgh ", k=rng.randint(30, 90))) for _ in range(6)]
    texts = [
        " ".join(rng.choice(phrases) if rng.random() < 0.4 else str(rng.random()) for _ in range(8))
        for _ in range(30)
    ]
    return [document(i, text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("block_bytes", [1 << 16, 2000])
def test_blocks_decide_and_shards_do_not(block_bytes: int, tmp_path: Path) -> None:
    documents = corpus()
    config = SubstringConfig(min_length=25, block_bytes=block_bytes)
    outcomes = [
        run_stage(tmp_path / str(rows), "substring", documents, rows, substring=config)
        for rows in (4, 30)
    ]
    assert outcomes[0].kept == outcomes[1].kept
    before, expected = 0, {}
    blocks: dict[int, list[int]] = {}
    for number, page in enumerate(documents):
        blocks.setdefault(before // block_bytes, []).append(number)
        before += len(page.text)
    for members in blocks.values():
        gone = plain_ranges([documents[n].text for n in members], 25)
        for number, characters in zip(members, gone, strict=True):
            text = documents[number].text
            left = "".join(c for i, c in enumerate(text) if i not in characters)
            expected[number] = left.rstrip() if len(text) - 1 in characters else left
    assert outcomes[0].texts == {n: text for n, text in expected.items() if text.strip()}
    assert outcomes[0].manifest.details == {"blocks": len(blocks)}
    assert outcomes[0].manifest.counts.deleted["substring.duplicate"] > 500
    for page in outcomes[0].kept:
        origin = documents[int(page.id, 16)].text
        assert "".join(origin[r.extracted_start :][: r.length] for r in page.edits) == page.text


def test_blocks_name_the_shards_that_reach_into_them(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [document(i, "x" * 10) for i in range(10)], 4)
    blocks = blocks_of(shards, 50)
    assert [[(i, before) for i, before, _ in block] for block in blocks] == [
        [(0, 0), (1, 40)], [(1, 40), (2, 80)],
    ]  # fmt: skip
    assert default_block_bytes(2**30) == 2**24


def test_whole_copies_and_tokens(tmp_path: Path) -> None:
    text = "The words of this page stand on another page as well, word by word. " * 2
    documents = [document(1, text + "Here."), document(2, text), document(3, "Then " + text)]
    config = SubstringConfig(unit="tokens", min_length=10)
    outcome = run_stage(tmp_path, "substring", documents, 2, substring=config)
    assert outcome.texts[3] == "Then"
    assert outcome.reasons == {documents[1].id: "substring.empty"}
    assert np.char.count(outcome.texts[1], "another") == 1


def test_lengths_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_length=0; use a number above 0"):
        SubstringConfig(min_length=0)
