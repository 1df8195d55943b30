"""Text as an array of code points, and what Unicode says of each, for kernels that walk over text.

One table holds a set of bits per code point, made from Python's own Unicode data and ``str``
methods, so that a kernel and the Python it replaces cannot disagree about a character.

    points = code_points("Wort, 42")           # uint32 [8]
    properties()[points] & DIGIT               # non-zero for '4' and '2'
"""

import functools
import unicodedata

import numpy as np
import numpy.typing as npt

from data_pipeline.text.characters import LONE_RANGES

LETTER, MARK, SPACE, LONE, JOINER, COMMA, OTHER = range(7)
"""Word classes, in the low three bits of an entry; ``words.py`` says what they do."""
WORD_CLASS = 7
"""Mask of the word class."""
ALPHABETIC, ALPHANUMERIC, DIGIT, BLANK, LINE_BREAK, SYMBOL, END_MARK, COUNTED, BRACKET = (
    1 << k for k in range(3, 12)
)
"""``str.isalpha``, ``str.isalnum``, ``str.isdecimal``, ``str.isspace``, ends a line for
``str.splitlines``, is no word by itself for Gopher's rules, ends a sentence in some script, is one
of the characters that Gopher's rules count (# . and the ellipsis), is an opening bracket."""

Points = npt.NDArray[np.uint32]
"""Code points of a text, in order."""
Properties = npt.NDArray[np.uint16]
"""Bits per code point, [0x110000]."""

_POINTS = 0x110000
_DENSE = 0x32400  # above: a few tags and selectors, private use, nothing assigned
_SPARSE = (0xE0000, 0xE0200)
_JOINERS = "'\N{RIGHT SINGLE QUOTATION MARK}.\N{MIDDLE DOT}"
_LINE_BREAKS = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
_COUNTED = "#.\N{HORIZONTAL ELLIPSIS}"
_INVISIBLE_SPACES = "\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}"
_SYMBOLS = (
    (0x00, 0x08), (0x0B, 0x1F), (0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x9F),
    (0xAB, 0xAB), (0xB4, 0xB4), (0xBB, 0xBB), (0x2013, 0x2014), (0x2019, 0x2019),
    (0x201C, 0x201E), (0x2026, 0x2026), (0x2236, 0x2236), (0x2501, 0x2501), (0x25BA, 0x25BA),
    (0x3001, 0x3002), (0x3008, 0x300D), (0x3010, 0x3011), (0xFF01, 0xFF01), (0xFF05, 0xFF05),
    (0xFF08, 0xFF09), (0xFF0C, 0xFF0C), (0xFF0E, 0xFF0E), (0xFF11, 0xFF11), (0xFF1A, 0xFF1B),
    (0xFF1F, 0xFF1F), (0xFF5E, 0xFF5E),
)  # fmt: skip
"""Inclusive ranges: controls and the punctuation that CCNet and FineWeb take out of texts, the
fullwidth digit one (U+FF11) among it as in theirs; end marks count too."""
_END_MARKS = (
    (0x21, 0x21), (0x2E, 0x2E), (0x3F, 0x3F), (0x589, 0x589), (0x61D, 0x61F), (0x6D4, 0x6D4),
    (0x700, 0x702), (0x7F9, 0x7F9), (0x837, 0x837), (0x839, 0x839), (0x83D, 0x83E),
    (0x964, 0x965), (0x104A, 0x104B), (0x1362, 0x1362), (0x1367, 0x1368), (0x166E, 0x166E),
    (0x1735, 0x1736), (0x17D4, 0x17D6), (0x17D9, 0x17DA), (0x1803, 0x1803), (0x1809, 0x1809),
    (0x1944, 0x1945), (0x1AA8, 0x1AAB), (0x1B5A, 0x1B5B), (0x1B5E, 0x1B5F), (0x1B7D, 0x1B7E),
    (0x1C3B, 0x1C3C), (0x1C7E, 0x1C7F), (0x203C, 0x203D), (0x2047, 0x2049), (0x2E2E, 0x2E2E),
    (0x2E3C, 0x2E3C), (0x2E53, 0x2E54), (0x3002, 0x3002), (0xA4FF, 0xA4FF), (0xA60E, 0xA60F),
    (0xA6F3, 0xA6F3), (0xA6F7, 0xA6F7), (0xA876, 0xA877), (0xA8CE, 0xA8CF), (0xA92F, 0xA92F),
    (0xA9C8, 0xA9C9), (0xAA5D, 0xAA5F), (0xAAF0, 0xAAF1), (0xABEB, 0xABEB), (0xFE52, 0xFE52),
    (0xFE56, 0xFE57), (0xFF01, 0xFF01), (0xFF0E, 0xFF0E), (0xFF1F, 0xFF1F), (0xFF61, 0xFF61),
    (0x10A56, 0x10A57), (0x10F55, 0x10F59), (0x10F86, 0x10F89), (0x11047, 0x11048),
    (0x110BE, 0x110C1), (0x11141, 0x11143), (0x111C5, 0x111C6), (0x111CD, 0x111CD),
    (0x111DE, 0x111DF), (0x11238, 0x11239), (0x1123B, 0x1123C), (0x112A9, 0x112A9),
    (0x1144B, 0x1144C), (0x115C2, 0x115C3), (0x115C9, 0x115D7), (0x11641, 0x11642),
    (0x1173C, 0x1173E), (0x11944, 0x11944), (0x11946, 0x11946), (0x11A42, 0x11A43),
    (0x11A9B, 0x11A9C), (0x11C41, 0x11C42), (0x11EF7, 0x11EF8), (0x11F43, 0x11F44),
    (0x16A6E, 0x16A6F), (0x16AF5, 0x16AF5), (0x16B37, 0x16B38), (0x16B44, 0x16B44),
    (0x16E98, 0x16E98), (0x1BC9F, 0x1BC9F), (0x1DA88, 0x1DA88),
)  # fmt: skip
"""Inclusive ranges: Unicode 15's Sentence_Terminal characters, as FineWeb tests line ends."""


def code_points(text: str) -> Points:
    """Return the code points of a text, uint32 [characters], read-only."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _bits(character: str) -> int:
    """Return the entry of one character, less what comes from ranges."""
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z":
        return SPACE | BLANK * character.isspace()
    kind = LETTER if category[0] in "LN" or category == "Pc" else OTHER
    if category[0] == "M" or category == "Cf":
        kind = MARK
    return (
        kind
        | ALPHABETIC * character.isalpha()
        | ALPHANUMERIC * character.isalnum()
        | DIGIT * character.isdecimal()
    )


@functools.cache
def properties() -> Properties:
    """Return the table, uint16 [0x110000], made once per process in about a tenth of a second."""
    table = np.full(_POINTS, OTHER, dtype=np.uint16)
    for start, end in ((0, _DENSE), _SPARSE):
        table[start:end] = [_bits(chr(point)) for point in range(start, end)]
    for low, high in LONE_RANGES:
        table[low:high][table[low:high] & WORD_CLASS == LETTER] += LONE - LETTER
    for characters, kind in ((_JOINERS, JOINER), (",", COMMA), (_INVISIBLE_SPACES, SPACE)):
        for point in map(ord, characters):
            table[point] = table[point] >> 3 << 3 | kind
    table[[ord(character) for character in _LINE_BREAKS]] |= LINE_BREAK
    table[[ord(character) for character in _COUNTED]] |= COUNTED
    table[ord("[")] |= BRACKET
    for low, high in _SYMBOLS:
        table[low : high + 1] |= SYMBOL
    for low, high in _END_MARKS:
        table[low : high + 1] |= END_MARK | SYMBOL
    table.setflags(write=False)
    return table
