"""What each character becomes before documents are compared: tables made from Unicode's data.

Per character: lower case, canonical decomposition, then marks and format characters go, decimal
digits of any script become 0, and punctuation, symbols, separators and controls become a space. A
table holds the result for every code point and fills in blocks of 256 as texts need them.

    table.learn(points); table.kind[ord("é")], chr(table.mapped[ord("é")])  # WORD, 'e'
"""

import unicodedata

import numpy as np
import numpy.typing as npt

DROP, SPACE, WORD, LONE, EXPAND, UNKNOWN = 0, 1, 2, 3, 4, 5
"""Nothing; a space; part of a word; a word by itself; several characters; not looked up yet."""
_POINTS = 0x110000
_BLOCK = 256
LONE_RANGES = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x1000, 0x10A0),  # Myanmar
    (0x1780, 0x1800),  # Khmer
    (0x1950, 0x19E0),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AB0),  # Tai Tham
    (0x3005, 0x3008),  # ideographic marks
    (0x3040, 0x3100),  # Hiragana, Katakana
    (0x31F0, 0x3200),  # Katakana extensions
    (0x3400, 0x4DC0),  # Han
    (0x4E00, 0xA000),  # Han
    (0xA9E0, 0xAA00),  # Myanmar extended
    (0xAA60, 0xAA80),  # Myanmar extended
    (0xF900, 0xFB00),  # Han compatibility
    (0xFF66, 0xFFA0),  # halfwidth Katakana
    (0x1AFF0, 0x1B170),  # kana supplements
    (0x20000, 0x323B0),  # Han extensions
)
"""Scripts that set no spaces between words: every character counts as one."""


def normalized_characters(character: str) -> list[tuple[int, int]]:
    """Return (kind, code point) of what one character becomes; empty if it disappears."""
    result = []
    for part in unicodedata.normalize("NFD", character.lower().replace("ς", "σ")):
        category = unicodedata.category(part)
        point = ord(part)
        if category in ("Mn", "Me", "Cf"):
            continue
        if category == "Nd":
            result.append((WORD, ord("0")))
        elif category[0] in "PSZC":
            result.append((SPACE, ord(" ")))
        elif any(low <= point < high for low, high in LONE_RANGES):
            result.append((LONE, point))
        else:
            result.append((WORD, point))
    return result


class CharacterTable:
    """The normalised form of every code point seen so far."""

    def __init__(self) -> None:
        self.kind: npt.NDArray[np.uint8] = np.full(_POINTS, UNKNOWN, dtype=np.uint8)
        self.mapped: npt.NDArray[np.uint32] = np.zeros(_POINTS, dtype=np.uint32)
        self.expansions: npt.NDArray[np.uint32] = np.zeros((1, 5), dtype=np.uint32)
        self._rows: list[list[int]] = []

    def learn(self, points: npt.NDArray[np.uint32]) -> None:
        """Look up every block that holds one of the code points."""
        for block in np.unique(points >> 8).tolist():
            self._learn_block(block)
        width = max((len(row) for row in self._rows), default=1)
        table = np.zeros((max(1, len(self._rows)), width), dtype=np.uint32)
        for i, row in enumerate(self._rows):
            table[i, : len(row)] = row
        self.expansions = table

    def _learn_block(self, block: int) -> None:
        """Fill in 256 code points, and the blocks their decompositions lead to."""
        start = block * _BLOCK
        if self.kind[start] != UNKNOWN:
            return
        led_to: set[int] = set()
        for point in range(start, start + _BLOCK):
            parts = normalized_characters(chr(point))
            if not parts:
                self.kind[point] = DROP
            elif len(parts) == 1:
                self.kind[point], self.mapped[point] = parts[0]
            else:
                self.kind[point], self.mapped[point] = EXPAND, len(self._rows)
                self._rows.append([len(parts), *(part for _, part in parts)])
                led_to.update(part >> 8 for _, part in parts)
        for other in led_to:
            self._learn_block(other)
