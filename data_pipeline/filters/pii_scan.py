"""One pass over a text that says which kinds of personal data it could hold.

Most texts hold none: the pass looks for what every match must contain, and only for what it has
seen are patterns tried. It may say yes too often, never no where a pattern would match.

    scan("call me at 10:15")  # Traces(digits=0, literals=0)
"""

from typing import Any, NamedTuple

import numpy as np

from data_pipeline.compiled import compiled
from data_pipeline.filters.secret_tokens import FORMATS

AT, DOTTED, CODE, LONG, PHONE = 1, 2, 4, 8, 16
"""An @ sign; four numbers joined by dots; two capitals and two digits; 13 digits in groups; a plus
sign or a bracket at a digit, or numbers of three and four digits joined."""
_SLOTS = 4096
_TRIGGERS = {
    "-----BEGIN ": "-BE", "github_pat_": "b_p", "hooks.slack.com/services/": ".sl",
    "npm_": "pm_", "pypi-AgE": "AgE", "AccountKey=": "ey=", "shpat_": "hpa", "dop_v1_": "v1_",
}  # fmt: skip
"""Three characters to look for in the literals whose first three are common."""
_U1, _U0 = np.uint64(1), np.uint64(0)


class Traces(NamedTuple):
    """What a text could hold."""

    marks: int
    """Sum of the marks above."""
    literals: int
    """Bit i: the i-th literal of ``FORMATS`` could stand there."""


def _trigger_table() -> tuple[Any, Any]:
    """Return keys and bit masks of a hash table of three characters."""
    keys = np.zeros(_SLOTS, dtype=np.uint32)
    masks = np.zeros(_SLOTS, dtype=np.uint64)
    for i, literal in enumerate(FORMATS):
        trigger = _TRIGGERS.get(literal, literal[:3]).encode()
        key = int.from_bytes(trigger, "big")
        slot = _slot_of(key)
        while keys[slot] not in (0, key):
            slot = (slot + 1) % _SLOTS
        keys[slot] = key
        masks[slot] |= _U1 << np.uint64(i)
    return keys, masks


def _slot_of(key: int) -> int:
    return (key * 0x9E3779B1 & 0xFFFFFFFF) >> 20


@compiled
def _scan(text: Any, keys: Any, masks: Any) -> Any:
    """Return (marks, literals) of UTF-8 bytes."""
    marks = np.int64(0)
    literals = np.uint64(0)
    key = np.uint32(0)
    digits = 0  # in the number being read
    total = 0  # in numbers joined by one blank or dash each
    numbers = 0  # joined by dots so far
    capitals = 0
    last = np.uint8(32)
    for i in range(text.shape[0]):
        c = text[i]
        key = np.uint32((key << np.uint32(8)) | np.uint32(c)) & np.uint32(0xFFFFFF)
        slot = np.uint32(key * np.uint32(0x9E3779B1)) >> np.uint32(20)
        while keys[slot] != 0:
            if keys[slot] == key:
                literals |= masks[slot]
                break
            slot = (slot + np.uint32(1)) & np.uint32(4095)
        if 48 <= c <= 57:
            if digits == 0 and (last == 43 or last == 40):
                marks |= 16
            digits += 1
            total += 1
            if total == 13:
                marks |= 8
            if digits == 1:
                numbers += 1
                if numbers == 4:
                    marks |= 2
            elif digits == 2 and capitals >= 2:
                marks |= 4
            if digits == 4 and total >= 10:
                marks |= 16
        else:
            if c == 64:
                marks |= 1
            if digits == 0 or c != 46:
                numbers = 0
            if not (digits > 0 and (c == 32 or c == 45 or c == 46)):
                total = 0
            digits = 0
            if 65 <= c <= 90:
                capitals += 1
            else:
                capitals = 0
        last = c
    return marks, literals


_KEYS, _MASKS = _trigger_table()


def scan(text: str) -> Traces:
    """Return what a text could hold."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    marks, literals = _scan(data, _KEYS, _MASKS)
    return Traces(int(marks), int(literals))
