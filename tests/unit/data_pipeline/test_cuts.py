"""Cutting stretches out of texts, with edit maps that hold."""

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dedup.cuts import cut, empty, without_ranges
from data_pipeline.step import Dropped, Kept
from tests.dedup_corpus import document

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=6)


@given(text=st.text(alphabet="ab \n漢", max_size=35), drawn=RANGES)
def test_what_stays_is_what_no_range_covers(text: str, drawn: list[tuple[int, int]]) -> None:
    ranges = sorted((a, min(len(text), a + n)) for a, n in drawn if a < len(text))
    result, runs = without_ranges(text, ranges)
    covered = {i for a, b in ranges for i in range(a, b)}
    left = "".join(c for i, c in enumerate(text) if i not in covered)
    assert result == (left.rstrip() if len(text) - 1 in covered else left)
    position = 0
    for run in runs:
        assert run.length > 0
        assert run.final_start == position
        assert result[position:][: run.length] == text[run.extracted_start :][: run.length]
        position += run.length
    assert position == len(result)


def test_deletions_are_counted_and_what_is_left_is_judged() -> None:
    page = document(1, "one two three")
    verdict = cut(page, [(4, 8)], "span_dedup", empty)
    assert isinstance(verdict, Kept)
    assert (verdict.document.text, verdict.deleted) == ("one three", {"span_dedup.duplicate": 4})
    assert cut(page, [(0, 13)], "substring", empty) == Dropped("substring.empty")
