"""How deep the elements of a page are nested, told from its source without parsing it.

exceeds_depth("<div>" * 2000, 1000)   # True
"""

from typing import Any

import numpy as np

from data_pipeline.compiled import compiled

_FLAT = (
    "area base br col embed hr img input link meta param source track wbr "
    "p li dt dd option optgroup tr td th thead tbody tfoot colgroup caption rt rp"
)
"""Elements without content, and those that the next of their kind closes."""
_NAME_BYTES = 8
"""Longest of these names."""


def _code(name: str) -> int:
    return int.from_bytes(name.encode(), "big")


_FLAT_CODES = np.array(sorted(_code(name) for name in _FLAT.split()), dtype=np.uint64)


def exceeds_depth(html: str, limit: int) -> bool:
    """Whether more than ``limit`` elements are open at once somewhere.

    A tag is ``<`` or ``</`` and a name of letters and digits; elements that are never deep do not
    count, and what is closed without having been opened counts for nothing.
    """
    data = np.frombuffer(html.encode("utf-8", "replace"), dtype=np.uint8)
    return bool(_exceeds(data, _FLAT_CODES, limit))


@compiled
def _exceeds(data: Any, flat: Any, limit: int) -> Any:
    depth = 0
    i, end = 0, len(data)
    while i < end:
        if data[i] != 60:  # <
            i += 1
            continue
        i += 1
        closing = i < end and data[i] == 47  # /
        if closing:
            i += 1
        code, length = np.uint64(0), 0
        while i < end:
            lower = data[i] | 32
            letter = lower >= 97 and lower <= 122
            digit = data[i] >= 48 and data[i] <= 57
            if not letter and not (digit and length):
                break
            code = (code << np.uint64(8)) | np.uint64(lower if letter else data[i])
            length += 1
            i += 1
        if length == 0:
            continue
        if length <= _NAME_BYTES:
            low, high = 0, len(flat)
            while low < high:
                middle = (low + high) // 2
                if flat[middle] < code:
                    low = middle + 1
                else:
                    high = middle
            if low < len(flat) and flat[low] == code:
                continue
        depth = max(0, depth - 1) if closing else depth + 1
        if depth > limit:
            return True
    return False
