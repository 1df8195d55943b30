"""Whatever the text, the tokenizer gives it back; whatever the edits, the map leads back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.lineage import DocumentRecord, decode_edits, encode_edits
from llmtrain.tokenizer.tokenizer import Tokenizer, train_sentencepiece

CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from(
        " \n\t\r\0\u2581\u2585\u00a0\u3000\u200d\ufeff日本語中文한글ไทย\U0001f600.,abc019"
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"line {i}\n  日本語 text, with  spaces {i * 7}." for i in range(300)]
    return train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@settings(max_examples=500)
@given(text=st.text(CHARACTERS))
def test_decode_of_encode_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@st.composite
def edited_texts(draw: st.DrawFn) -> tuple[str, str, tuple[tuple[int, int, int], ...]]:
    """An extracted text, a final text made by deleting and inserting, and the map between them."""
    extracted = final = ""
    runs = []
    pieces = st.tuples(st.text("ab"), st.text("cd"), st.text("ef", min_size=1))
    for deleted, inserted, kept in draw(st.lists(pieces)):
        extracted += deleted
        final += inserted
        runs.append((len(final), len(extracted), len(kept)))
        extracted += kept
        final += kept
    return extracted, final, tuple(runs)


@given(texts=edited_texts(), data=st.data())
def test_edit_map_leads_back(
    texts: tuple[str, str, tuple[tuple[int, int, int], ...]], data: st.DataObject
) -> None:
    extracted, final, runs = texts
    assert decode_edits(encode_edits(runs)) == runs
    start = data.draw(st.integers(0, len(final)))
    end = data.draw(st.integers(start, len(final)))
    spans = DocumentRecord(id="", edits=runs).resolve(start, end)
    kept = "".join(c for c in final[start:end] if c in "ef")
    assert "".join(extracted[low:high] for low, high in spans) == kept
