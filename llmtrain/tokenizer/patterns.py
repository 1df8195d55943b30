r"""The regular expressions that cut text into words before byte-level BPE merges inside them.

No merge crosses a word, so the pattern decides what a token can be: whether digits stand alone,
whether a space belongs to the word after it, how runs of newlines are kept. Every pattern matches
every character, so that nothing is lost between words.

    pattern("gpt4_digits")
"""

from typing import Literal, get_args

from llmtrain.errors import DataError

PatternName = Literal["gpt2", "gpt4", "gpt4_digits", "gpt4o", "gpt4o_digits"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _gpt4(digits: str) -> str:
    return rf"{_CONTRACTIONS}|{_HEAD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"


def _gpt4o(digits: str) -> str:
    words = rf"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


PATTERNS: dict[PatternName, str] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": _gpt4(r"\p{N}{1,3}"),
    "gpt4_digits": _gpt4(r"\p{N}"),
    "gpt4o": _gpt4o(r"\p{N}{1,3}"),
    "gpt4o_digits": _gpt4o(r"\p{N}"),
}
"""Named patterns. gpt4 is that of cl100k_base and Llama 3 (digits in groups of three), gpt4_digits
the same with every digit alone (Qwen2); gpt4o is that of o200k_base, which keeps combining marks
with their letters and starts a word at an upper-case letter."""


def pattern(name: str) -> str:
    """Return a named pattern.

    Raises:
        DataError: there is none of that name.
    """
    found = dict[str, str](PATTERNS.items())
    if name not in found:
        raise DataError(f"no pattern is named {name!r}; use one of {', '.join(PATTERNS)}")
    return found[name]


NAMES: tuple[PatternName, ...] = get_args(PatternName)
"""The names, in the order they are listed to a user."""
