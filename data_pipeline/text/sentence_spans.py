r"""Where sentences begin and end, by rules that need no model of a language.

A sentence ends at a line break, after a full stop, question or exclamation mark (with closing
quotes and brackets) before white space, and after their full-width forms. Deduplication asks only
that equal text is cut equally, so abbreviations are not looked up.

    sentence_spans("One. Two!\nThree")  # [(0, 5), (5, 10), (10, 15)]
"""

import re

_BOUNDARY = re.compile(
    r"""(?<![.?!؟।])[.?!؟।]++["'’”»)\]}]*+\s+ | [。！？｡]+["'’”」』）】]*\s* | \n\s*""",
    re.VERBOSE,
)
"""A row of marks is looked at once, from its beginning, so that a long one takes linear time."""


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return [start, end) of every sentence, with the white space after it, in characters.

    The spans follow one another without a gap from the first character to the last; white space at
    the very start belongs to the first. A text of white space has none.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        if not text[start : match.start() + 1].isspace():
            spans.append((start, match.end()))
            start = match.end()
    if text[start:].strip():
        spans.append((start, len(text)))
    return spans
