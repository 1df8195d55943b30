"""A Bloom filter of 64-bit hashes that keeps the bits of a hash within one cache line.

Blocks of 512 bits (Putze, Sanders and Singler 2007, doi:10.1145/1498698.1594230) cost about a fifth
more room than a plain filter of the same error and a fraction of its time.

    bloom = Bloom(1_000_000, 1e-3)
    seen = bloom.add(hashes)   # which of them had been added before, in their order
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.text.hashing import mix

_BLOCK_BITS = 512
_BLOCKING = 1.25
"""Room a blocked filter takes, in that of a plain one of the same error."""
_SALT = np.uint64(0x9E3779B97F4A7C15)
_32, _9, _6, _511, _63 = (np.uint64(n) for n in (32, 9, 6, 511, 63))
_ONE = np.uint64(1)
_BITS_PER_DRAW = 7


def filter_bytes(keys: int, false_positive_rate: float) -> int:
    """Return the bytes of a filter for some keys, a whole number of blocks."""
    bits = max(1, keys) * math.log2(1 / false_positive_rate) / math.log(2) * _BLOCKING
    return -(-int(bits) // _BLOCK_BITS) * _BLOCK_BITS // 8


@compiled
def _add(words: Any, blocks: Any, bits: int, hashes: Any, seen: Any) -> None:
    """Add hashes one by one, noting for each whether all its bits were set already."""
    for i in range(hashes.shape[0]):
        draw = mix(hashes[i] ^ _SALT)
        block = ((draw >> _32) * blocks) >> _32
        draw = mix(draw)
        known = True
        for j in range(bits):
            if j % _BITS_PER_DRAW == 0:
                draw = mix(draw + _SALT)
            else:
                draw >>= _9
            bit = draw & _511
            place = np.int64(block * np.uint64(8) + (bit >> _6))
            flag = _ONE << (bit & _63)
            if words[place] & flag == 0:
                known = False
                words[place] |= flag
        seen[i] = known


class Bloom:
    """A set of hashes that never forgets one, and takes some for known that are not."""

    def __init__(self, keys: int, false_positive_rate: float) -> None:
        """Make room for ``keys`` different hashes."""
        size = filter_bytes(keys, false_positive_rate)
        self._words = np.zeros(size // 8, np.uint64)
        self._blocks = np.uint64(size * 8 // _BLOCK_BITS)
        self._bits = max(1, round(math.log2(1 / false_positive_rate)))

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Add hashes in their order; return which had been added before, [N]."""
        seen = np.empty(len(hashes), bool)
        _add(self._words, self._blocks, self._bits, hashes, seen)
        return seen
