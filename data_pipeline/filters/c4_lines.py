r"""C4's tests of lines as one compiled walk over a text: which lines stay, and why the others go.

The kernel returns runs (final_start, extracted_start, length) of characters that stay, in order;
between two of them stands either nothing or the newline that joins two kept lines.

    lines = walk("Five words are enough here.\nMenu", rules)    # lines.kept == 1
"""

from collections.abc import Sequence
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.document import Run
from data_pipeline.text.code_points import (
    BLANK,
    BRACKET,
    DIGIT,
    LINE_BREAK,
    Points,
    code_points,
    properties,
)

LONG_WORD, NO_END_MARK, FEW_WORDS, JAVASCRIPT, POLICY, CITATION, WHITESPACE = range(7)
LOREM_IPSUM, CURLY_BRACKET = 7, 8
"""Rules by number: characters deleted by the first seven, pages dropped by the last two."""
RULES = (
    "long_word", "no_end_mark", "few_words", "javascript", "policy", "citation", "whitespace",
    "lorem_ipsum", "curly_bracket",
)  # fmt: skip
"""Their names."""
_INSERTED, _KEPT = len(RULES), len(RULES) + 1
_PHRASES = (
    ("lorem ipsum", LOREM_IPSUM),
    ("javascript", JAVASCRIPT),
    ("{", CURLY_BRACKET),
    ("terms of use", POLICY),
    ("privacy policy", POLICY),
    ("cookie policy", POLICY),
    ("uses cookies", POLICY),
    ("use of cookies", POLICY),
    ("use cookies", POLICY),
)
_SYMBOLS = " abcdefghijklmnopqrstuvwxyz{"
"""Characters of the phrases; any other is symbol 0."""
_NEWLINE, _RETURN, _STOP, _OPEN, _CLOSE = map(ord, "\n\r.[]")


def _automaton(phrases: Sequence[tuple[str, int]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return an Aho-Corasick automaton (doi:10.1145/360825.360855).

    Returns:
        Next state by state and symbol, uint8 [states, 32]; rules whose phrase ends in a state, as
        bits, uint16 [states].
    """
    prefixes = sorted({phrase[:k] for phrase, _ in phrases for k in range(len(phrase) + 1)})
    number = {prefix: state for state, prefix in enumerate(prefixes)}  # "" comes first: state 0
    step = np.zeros((len(prefixes), 32), dtype=np.uint8)
    found = np.zeros(len(prefixes), dtype=np.uint16)
    for prefix, state in number.items():
        for symbol, character in enumerate(_SYMBOLS, 1):
            text = prefix + character
            longest = next(text[k:] for k in range(len(text) + 1) if text[k:] in number)
            step[state, symbol] = number[longest]
        found[state] = sum(
            1 << rule for rule in {r for phrase, r in phrases if prefix.endswith(phrase)}
        )
    return step, found


def _symbols() -> npt.NDArray[Any]:
    """Return the symbol of every code point below 128 in lower case, uint8 [128]."""
    table = np.zeros(128, dtype=np.uint8)
    for symbol, character in enumerate(_SYMBOLS, 1):
        table[ord(character)] = table[ord(character.upper())] = symbol
    return table


_STEP, _FOUND = _automaton(_PHRASES)
_SYMBOL = _symbols()
_KELVIN, _K = ord("\N{KELVIN SIGN}"), _SYMBOLS.index("k") + 1  # the one other way to write one
_EDIT = np.array([ord(character) for character in "edit]"], dtype=np.uint32)
_NEEDED = np.array([ord(character) for character in "citation needed]"], dtype=np.uint32)


class LineRules(NamedTuple):
    """What the kernel needs to know; ``C4Options`` says what the fields mean."""

    max_word_characters: int
    """Longest word a line may hold, in characters."""
    min_words: int
    """Fewest words in a line."""
    end_marks: Points
    """What a line must end with one of; empty accepts any end."""
    cited_words: bool
    """Whether words are counted before citations are deleted."""


class Lines(NamedTuple):
    """What is left of a text."""

    runs: list[Run]
    """Characters that stay."""
    deleted: list[int]
    """Characters deleted, by rule number [7]."""
    inserted: int
    """Newlines that stand for another separator."""
    kept: int
    """Lines that stay."""
    killers: tuple[int, int]
    """Lines with lorem ipsum and with a curly bracket; the first ends the walk unless all are
    asked for."""


@compiled
def _matches(points: Any, start: int, end: int, tail: Any) -> Any:
    """Whether points[start:end] begins with ``tail``."""
    if end - start < tail.shape[0]:
        return False
    same = True
    for k in range(tail.shape[0]):
        same &= points[start + k] == tail[k]
    return same


@compiled
def _citation_end(points: Any, start: int, end: int, table: Any) -> Any:
    """Return where the citation that begins at the bracket ``start`` ends; ``start`` for none."""
    after = start + 1
    while after < end and table[points[after]] & DIGIT:
        after += 1
    if after < end and points[after] == _CLOSE:
        return after + 1
    if _matches(points, start + 1, end, _EDIT):
        return start + 1 + _EDIT.shape[0]
    if _matches(points, start + 1, end, _NEEDED):
        return start + 1 + _NEEDED.shape[0]
    return start


@compiled
def _cut_citations(points: Any, start: int, end: int, table: Any, line: Any, spans: Any) -> Any:
    """Copy points[start:end] without citations; return (characters, stretches copied)."""
    length = count = 0
    begin = i = start
    while i <= end:
        after = i
        if i < end and points[i] == _OPEN:
            after = _citation_end(points, i, end, table)
        if i == end or after > i:
            if i > begin:
                spans[count, 0] = begin
                spans[count, 1] = i
                count += 1
                for k in range(begin, i):
                    line[length] = points[k]
                    length += 1
            begin = after
        i = max(after, i + 1)
    return length, count


@compiled
def _has_long_word(points: Any, start: int, end: int, table: Any, limit: int) -> Any:
    """Whether a run of characters without white space is longer than ``limit``."""
    begin = start
    for i in range(start, end):
        if table[points[i]] & BLANK:
            begin = i + 1
        elif i - begin >= limit:
            return True
    return False


@compiled
def _count_words(line: Any, start: int, end: int, table: Any) -> int:
    """Count words set apart by white space."""
    count = 0
    before = True
    for i in range(start, end):
        blank = (table[line[i]] & BLANK) != 0
        count += before & (not blank)
        before = blank
    return count


@compiled
def _good_end(line: Any, start: int, end: int, marks: Any) -> Any:
    """Whether a line ends with a mark and not with three full stops; any end without marks."""
    if marks.shape[0] == 0:
        return True
    good = False
    if end > start:
        for k in range(marks.shape[0]):
            good |= line[end - 1] == marks[k]
    if good and end - start >= 3 and line[end - 1] == _STOP:
        good = line[end - 2] != _STOP or line[end - 3] != _STOP
    return good


@compiled
def _rule(
    line: Any, start: int, end: int, words: int, table: Any, min_words: int, marks: Any
) -> int:
    """Return the rule that a line breaks, in C4's order; -1 for none, words < 0 to count them."""
    if not _good_end(line, start, end, marks):
        return NO_END_MARK
    state = np.uint8(0)
    bits = np.uint16(0)
    count = 0
    before = True
    for i in range(start, end):
        point = line[i]
        each: Any = np.uint8(0)
        if point < 128:
            each = _SYMBOL[point]
        elif point == _KELVIN:
            each = _K
        state = _STEP[state, each]
        bits |= _FOUND[state]
        blank = (table[point] & BLANK) != 0
        count += before & (not blank)
        before = blank
    if (count if words < 0 else words) < min_words:
        return FEW_WORDS
    if bits:
        for rule in (LOREM_IPSUM, JAVASCRIPT, CURLY_BRACKET, POLICY):
            if bits & (1 << rule):
                return rule
    return -1


@compiled
def _bounds(points: Any, begin: int, table: Any) -> Any:
    """Return (start, end, next line, has a bracket) of the line at ``begin``, stripped."""
    size = points.shape[0]
    end = begin
    some = np.uint16(0)
    while end < size:
        bits = table[points[end]]
        if bits & LINE_BREAK:
            break
        some |= bits
        end += 1
    after = min(end + 1, size)
    if after < size and points[end] == _RETURN and points[after] == _NEWLINE:
        after += 1
    start = begin
    while start < end and table[points[start]] & BLANK:
        start += 1
    while end > start and table[points[end - 1]] & BLANK:
        end -= 1
    return start, end, after, (some & BRACKET) != 0


@compiled
def _add(runs: Any, count: int, final: int, start: int, length: int) -> int:
    """Add a run, or lengthen the last where it goes on; return the number of runs."""
    k = count - 1
    if k >= 0 and runs[k, 0] + runs[k, 2] == final and runs[k, 1] + runs[k, 2] == start:
        runs[k, 2] += length
        return count
    runs[count, 0] = final
    runs[count, 1] = start
    runs[count, 2] = length
    return count + 1


@compiled
def _walk(points: Any, table: Any, limit: int, min_words: int, marks: Any, cited_words: bool,
          every: bool, brackets: bool) -> Any:  # fmt: skip
    """Return (runs, counts by rule and then of inserted newlines and kept lines)."""
    size = points.shape[0]
    scratch = size + 1 if brackets else 1
    runs = np.empty((size // 2 + 1, 3), dtype=np.int64)
    spans = np.empty((scratch, 2), dtype=np.int64)
    buffer = np.empty(scratch, dtype=np.uint32)
    counts = np.zeros(len(RULES) + 2, dtype=np.int64)
    number = position = begin = 0
    newline = -1  # where the newline after the last kept line stands
    while begin < size:
        here = begin
        start, end, begin, bracket = _bounds(points, here, table)
        copied = 1
        spans[0, 0], spans[0, 1] = start, end
        left = end - start
        if left > limit and _has_long_word(points, start, end, table, limit):
            rule = LONG_WORD
        elif not bracket:
            rule = _rule(points, start, end, -1, table, min_words, marks)
        else:
            words = _count_words(points, start, end, table) if cited_words else -1
            left, copied = _cut_citations(points, start, end, table, buffer, spans)
            rule = _rule(buffer, 0, left, words, table, min_words, marks)
        if rule in (LOREM_IPSUM, CURLY_BRACKET):
            counts[rule] += 1
            if every:
                continue
            break
        if rule >= 0:
            counts[rule] += begin - here
            continue
        if counts[_KEPT] > 0:
            if newline < 0:
                counts[_INSERTED] += 1
            else:
                counts[WHITESPACE] -= 1
                number = _add(runs, number, position, newline, 1)
            position += 1
        for k in range(copied):
            number = _add(runs, number, position, spans[k, 0], spans[k, 1] - spans[k, 0])
            position += spans[k, 1] - spans[k, 0]
        counts[CITATION] += end - start - left
        counts[WHITESPACE] += begin - here - (end - start)
        counts[_KEPT] += 1
        newline = begin - 1 if points[begin - 1] == _NEWLINE else -1
    return runs[:number], counts


def walk(text: str, rules: LineRules, every: bool = False) -> Lines:
    """Test the lines of a text in C4's order.

    Args:
        text: The page.
        rules: Limits.
        every: Go on after a line that drops the page, as if only the line went.
    """
    runs, counts = _walk(
        code_points(text), properties(), rules.max_word_characters, rules.min_words,
        rules.end_marks, rules.cited_words, every, "[" in text,
    )  # fmt: skip
    numbers = counts.tolist()
    return Lines(
        runs=list(starmap(Run, runs.tolist())),
        deleted=numbers[: WHITESPACE + 1],
        inserted=numbers[_INSERTED],
        kept=numbers[_KEPT],
        killers=(numbers[LOREM_IPSUM], numbers[CURLY_BRACKET]),
    )
