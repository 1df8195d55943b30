"""Lower case by table, for kernels that walk over code points.

Every code point becomes one: what ``str.lower`` makes of it alone, and the two small sigmas are
one letter. Of all characters only U+0130 has two in lower case; it becomes an i.

    chr(lower_case()[ord("Ä")])  # 'ä'
"""

import functools

import numpy as np
import numpy.typing as npt

_POINTS = 0x110000
_DENSE = 0x1EA00  # nothing above has case
_SIGMA, _FINAL_SIGMA = 0x3C3, 0x3C2


@functools.cache
def lower_case() -> npt.NDArray[np.uint32]:
    """Return the table, uint32 [0x110000], made once per process."""
    table = np.arange(_POINTS, dtype=np.uint32)
    table[:_DENSE] = [ord(chr(point).lower()[0]) for point in range(_DENSE)]
    table[_FINAL_SIGMA] = _SIGMA
    table.setflags(write=False)
    return table
