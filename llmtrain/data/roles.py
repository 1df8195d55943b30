"""What each token of a store is there for: one byte a token, in ``part-NNNNN.roles``.

Bit ``ANSWER``: the token is answered for, so it is the target of a loss. Bit ``SECOND``: it belongs
to the second text of a pair, which follows the first in the same document and begins a document of
its own for attention, positions and targets. A store has roles in all its shards or in none;
without them every token is answered for.

    roles = np.array([0, 0, ANSWER, SECOND, SECOND, SECOND | ANSWER], dtype=np.uint8)
    texts(roles)          # [slice(0, 3), slice(3, 6)]: chosen, rejected
    second_starts(roles)  # [3]
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError

ANSWER = 1
"""The token is the target of a loss."""
SECOND = 2
"""The token belongs to the second, rejected text of a pair."""
ENDING = "roles"
"""Ending of the file, beside ``bin`` and ``idx``."""

RoleArray = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


def second_starts(roles: RoleArray) -> Int64Array:
    """Return the places in a run of tokens where a second text begins behind a first one."""
    second = roles & SECOND
    return np.flatnonzero(second[1:] > second[:-1]) + 1


def texts(roles: RoleArray) -> list[slice]:
    """Return where the texts of one document stand: one text, or the two of a pair."""
    edges = [0, *second_starts(roles).tolist(), len(roles)]
    return [slice(low, high) for low, high in pairwise(edges)]


def check_roles(roles: RoleArray, lengths: Int64Array, name: str) -> None:
    """Check the roles of documents of ``lengths`` tokens that follow each other.

    Raises:
        DataError: there are more or fewer than tokens, a byte is no role, or a document begins
            with its second text or goes back to its first.
    """
    if len(roles) != lengths.sum():
        raise DataError(
            f"{name} has {len(roles):,} roles for {int(lengths.sum()):,} tokens, EOS included; "
            "give one a token"
        )
    if len(roles) and roles.max() > ANSWER | SECOND:
        raise DataError(
            f"{name} has role {int(roles.max())}; use ANSWER ({ANSWER}), SECOND ({SECOND}), "
            "both or 0"
        )
    second, inside = roles & SECOND, np.ones(len(roles), dtype=bool)
    starts = np.cumsum(lengths) - lengths
    inside[starts] = False
    falls = np.flatnonzero((second[1:] < second[:-1]) & inside[1:])
    if second[starts].any() or len(falls):
        raise DataError(
            f"{name} has a document that does not read first text, then second; its tokens with "
            "SECOND have to follow those without"
        )
