"""Whatever the text, the tokenizer gives it back; whatever the edits, the map leads back."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.lineage import DocumentRecord, decode_edits, encode_edit_lists, encode_edits
from llmtrain.tokenizer.encoders import Encoder, make_encoder
from llmtrain.tokenizer.tokenizer import Tokenizer, load, train
from tests.ranks import write_ranks

CHARACTERS = st.one_of(
    st.characters(codec="utf-8"),
    st.sampled_from(
        " \n\t\r\0\u2581\u2585\u00a0\u3000\u200d\ufeff日本語中文한글ไทย\U0001f600.,abc019"
    ),
)


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte_bpe", "ranks"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "ranks":
        write_ranks(folder)
        return load(folder)
    texts = [f"line {i}\n  日本語 text, with  spaces {i * 7}." for i in range(300)]
    return train(
        texts, folder, kind=request.param, vocab_size=270 if request.param == "byte_bpe" else 287
    )


@settings(max_examples=300)
@given(text=st.text(CHARACTERS))
def test_decode_of_encode_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Encoder, Encoder]]:
    folder = tmp_path_factory.mktemp("pairs")
    write_ranks(folder)
    texts = [f"Line {i}'s 日本語 text,\n\n with  spaces {i * 7}!!" for i in range(300)]
    trained = train(texts, folder / "bpe", kind="byte_bpe", vocab_size=275)
    return [
        (make_encoder(tokenizer, fast=True), make_encoder(tokenizer, fast=False))
        for tokenizer in (load(folder), trained)
    ]


@settings(max_examples=300)
@given(texts=st.lists(st.text(CHARACTERS), max_size=5))
def test_fast_encoders_give_the_ids_of_the_reference(
    pairs: list[tuple[Encoder, Encoder]], texts: list[str]
) -> None:
    for fast, reference in pairs:
        ours, theirs = fast.encode(texts), reference.encode(texts)
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.offsets.tolist() == theirs.offsets.tolist()


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


@given(texts=st.lists(edited_texts(), max_size=6), skipped=st.integers(0, 6))
def test_edit_maps_of_a_table_are_those_of_its_documents(
    texts: list[tuple[str, str, tuple[tuple[int, int, int], ...]]], skipped: int
) -> None:
    edits = [runs for _, _, runs in texts]
    flat = [[number for run in runs for number in run] for runs in edits]
    table = pa.array(flat, pa.list_(pa.int32())).slice(skipped)
    assert encode_edit_lists(table).to_pylist() == [encode_edits(runs) for runs in edits[skipped:]]
