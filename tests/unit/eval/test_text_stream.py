"""Text while it is made: whole characters, stop strings over token borders, nothing lost."""

from collections.abc import Sequence

import pytest

from llmtrain.eval.text_stream import TextStream


def decode(ids: Sequence[int]) -> str:
    """One id a byte; like SentencePiece with a prefix, a space at the very beginning is dropped."""
    return bytes(ids).decode(errors="replace").removeprefix(" ")


def pieces(text: str, stop: Sequence[str] = (), before: str = "") -> tuple[list[str], TextStream]:
    stream = TextStream(decode, list(before.encode()), stop)
    shown = []
    for byte in text.encode():
        shown.append(stream.push(byte))
        if stream.stopped:
            break
    shown.append(stream.finish())
    assert "".join(shown) == stream.text
    return shown, stream


@pytest.mark.parametrize("text", ["plain", "a \u00e9\u20ac\U0001f600 b", "", "  spaces  "])
def test_characters_come_whole_and_all_of_them(text: str) -> None:
    shown, stream = pieces(text, before="x")
    assert stream.text == text
    assert all("\ufffd" not in piece for piece in shown)


def test_a_first_space_is_kept_after_a_prompt() -> None:
    assert pieces(" world", before="hello")[1].text == " world"


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    stream = TextStream(decode)
    assert [stream.push(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_stop_string_cuts_wherever_tokens_end() -> None:
    shown, stream = pieces("one\n\ntwo", stop=["\n\n", "zzz"])
    assert (stream.text, stream.stopped) == ("one", True)
    assert "".join(shown) == "one"


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    shown, stream = pieces("ab<en<end>cd", stop=["<end>"])
    assert shown == ["a", "b", "", "", "", "<en", "", "", "", "", ""]
    assert (stream.text, stream.stopped) == ("ab<en", True)
    assert pieces("ab<en", stop=["<end>"])[1].text == "ab<en"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert pieces("a.b!c", stop=["!", "."])[1].text == "a"
    assert pieces("a\u20acb", stop=["\u20ac"])[1].text == "a"
