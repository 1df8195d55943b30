"""Sentence counts against NLTK's own splitter with the same English model, where NLTK is present.

Marks that stand alone are left out: NLTK makes sentences of them that have no word.
"""

from collections import defaultdict
from typing import Any

import punkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.filters.c4 import C4Options, clean_lines
from data_pipeline.step import Dropped
from data_pipeline.text.sentences import punkt_sentences, rule_sentences

nltk_punkt = pytest.importorskip("nltk.tokenize.punkt", reason="the oracle is nltk; pip install it")

FRAGMENTS = st.sampled_from(
    [
        "Mr.", "Dr.", "U.S.", "e.g.", "p.m.", "J.", "Inc.", "No.", "3.50", "1.", "He", "the",
        "went", "Smith", "however", "The", "It", "wait...", "Why?", "Oh!", '"So', "it's", "(that",
        "Army", "a.b.org", "etc.", "end.", "end.)", 'end."', "\n", "said:", "A.", "i", "I", "am.",
    ]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, max_size=25).map(" ".join)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """NLTK's splitter with the parameters of its english model."""
    model = punkt.tokenizer_for("english").params
    parameters = nltk_punkt.PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context = defaultdict(int, model.ortho_context)
    splitter = nltk_punkt.PunktSentenceTokenizer()
    splitter._params = parameters
    return splitter


@settings(max_examples=300)
@given(TEXTS)
def test_punkt_counts_what_nltk_counts(oracle: Any, text: str) -> None:
    assert punkt_sentences(text, 1000) == len(oracle.tokenize(text))


@settings(max_examples=150)
@given(TEXTS, st.sampled_from([1, 2, 3, 5]))
def test_pages_have_enough_sentences_exactly_where_nltk_says_so(
    oracle: Any, text: str, minimum: int
) -> None:
    options = C4Options(min_sentences=minimum, min_words=1, end_marks="")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    enough = sum(len(oracle.tokenize(line)) for line in lines) >= minimum
    assert isinstance(clean_lines(text, options), Dropped) == (not enough)


@given(TEXTS)
def test_no_counter_finds_more_sentences_than_marks_allow(text: str) -> None:
    most = 1 + sum(text.count(mark, 0, len(text) - 1) for mark in ".?!")
    assert punkt_sentences(text, 1000) <= most
    assert rule_sentences(text, 1000) <= most
