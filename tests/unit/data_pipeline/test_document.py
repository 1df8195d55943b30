"""Edit maps lead back to the first text however many edits came between."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.document import Document, Run, compose, identity


@st.composite
def edited(draw: st.DrawFn, text: str) -> tuple[str, list[Run]]:
    """Delete stretches of a text and insert others; return the result and its runs."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    result = ""
    runs: list[Run] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        choice = draw(st.sampled_from(["keep", "delete", "insert"]))
        if choice == "insert":
            result += "\n"
        if choice != "delete" and end > start:
            runs.append(Run(len(result), start, end - start))
            result += text[start:end]
    return result, runs


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[str], list[list[Run]]]:
    """Return texts, each an edit of the one before, and the runs of every edit."""
    texts = [draw(st.text(alphabet="abcdef", max_size=30))]
    maps = []
    for _ in range(draw(st.integers(1, 4))):
        text, runs = draw(edited(texts[-1]))
        texts.append(text)
        maps.append(runs)
    return texts, maps


def origins(runs: list[Run] | tuple[Run, ...], length: int) -> list[int | None]:
    """Return where each character came from, None for inserted ones."""
    result: list[int | None] = [None] * length
    for run in runs:
        for i in range(run.length):
            result[run.final_start + i] = run.extracted_start + i
    return result


@settings(max_examples=50)
@given(chains())
def test_composing_follows_every_character(chain: tuple[list[str], list[list[Run]]]) -> None:
    texts, maps = chain
    expected: list[int | None] = list(range(len(texts[0])))
    document = Document(id="0", source="s", text=texts[0], edits=identity(texts[0]))
    for text, runs in zip(texts[1:], maps, strict=True):
        document = document.edited(text, runs)
        expected = [None if i is None else expected[i] for i in origins(runs, len(text))]
        assert origins(document.edits, len(text)) == expected
        for run in document.edits:
            there = texts[0][run.extracted_start :][: run.length]
            assert text[run.final_start :][: run.length] == there


@settings(max_examples=50)
@given(chains())
def test_composing_is_associative_and_merges_what_touches(
    chain: tuple[list[str], list[list[Run]]],
) -> None:
    texts, maps = chain
    from_left = identity(texts[0])
    for runs in maps:
        from_left = compose(runs, from_left)
    from_right = identity(texts[-1])
    for runs in reversed(maps):
        from_right = compose(from_right, runs)
    assert from_left == from_right
    for run, following in itertools.pairwise(from_left):
        touch = (run.final_start + run.length, run.extracted_start + run.length)
        assert touch != following[:2]


def test_an_empty_text_has_no_runs() -> None:
    assert identity("") == ()
    assert identity("ab") == (Run(0, 0, 2),)
    assert compose([Run(0, 1, 1)], ()) == ()
