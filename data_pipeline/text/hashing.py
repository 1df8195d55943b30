"""The one scrambling of 64 bits that every hash of words, lines and shingles here ends with.

Kernels inline it; what it returns is part of the bytes of stages, so it never changes.

    mix(np.uint64(1))   # 0x5692161D100B05E5
"""

from typing import Any

import numpy as np

from data_pipeline.compiled import compiled

MIX1 = np.uint64(0xBF58476D1CE4E5B9)
"""First multiplier of SplitMix64."""
_MIX2 = np.uint64(0x94D049BB133111EB)
_U27, _U30, _U31 = np.uint64(27), np.uint64(30), np.uint64(31)


@compiled
def mix(x: Any) -> Any:
    """Scramble 64 bits: SplitMix64's output function (doi:10.1145/2660193.2660195)."""
    x = (x ^ (x >> _U30)) * MIX1
    x = (x ^ (x >> _U27)) * _MIX2
    return x ^ (x >> _U31)
