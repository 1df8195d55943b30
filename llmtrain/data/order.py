"""How the windows of one source follow each other, epoch after epoch, and what each is made of.

In every epoch every window comes exactly once, in an order that a key decides; no list of it is
kept, and the way back from a window to its place is as cheap.

    order = ConcatOrder(TokenStore.open("stores/wiki"), "wiki", seed=1, window_tokens=4096)
    order.windows(epoch=0, positions=np.arange(8))
"""

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.indexed import Int64Array
from llmtrain.data.permutation import NUM_ROUNDS, Permutation, derive_key
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError

KEPT_EPOCHS = 4
"""Permutations kept in memory, a few hundred bytes each."""


class Pieces(NamedTuple):
    """Runs of tokens that make up windows: arrays of one length, sorted by row and offset."""

    row: Int64Array
    """Index of the window among those asked for."""
    offset: Int64Array
    """First input of the piece inside the window."""
    start: Int64Array
    """First token of the piece in the store."""
    length: Int64Array
    """Inputs in the piece; the last one's target is the next token of the store."""
    ends_document: npt.NDArray[np.bool_] | None = None
    """Where every piece lies in one document: whether it holds that document's last token."""


class SourceOrder(Protocol):
    """The windows of one source."""

    @property
    def store(self) -> TokenStore:
        """The tokens."""
        ...

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        ...

    @property
    def kind(self) -> str:
        """What the order depends on beside the store, the seed and the name; in fingerprints."""
        ...

    def windows(self, epoch: int, positions: Int64Array) -> Int64Array:
        """Return the windows at the given places of an epoch."""
        ...

    def positions(self, epoch: int, windows: Int64Array) -> Int64Array:
        """Return the places of the given windows; the inverse of ``windows``."""
        ...

    def pieces(self, windows: Int64Array) -> Pieces:
        """Return what the windows are made of."""
        ...

    def windows_of(self, start: int, end: int) -> Int64Array:
        """Return the windows that have any of the tokens [start, end) as input, in order."""
        ...


class ConcatOrder:
    """Windows of equal length at equal distances over the whole source, shuffled every epoch.

    Document boundaries do not matter to where a window begins; what is left behind the last whole
    window is in no epoch.
    """

    def __init__(self, store: TokenStore, name: str, *, seed: int, window_tokens: int) -> None:
        """Cut ``store`` into windows of ``window_tokens`` inputs and the last one's target.

        Raises:
            DataError: the store holds less than one window.
        """
        if store.num_tokens < window_tokens + 1:
            raise DataError(
                f"source {name} holds {store.num_tokens:,} tokens, a window needs "
                f"{window_tokens + 1:,}; lower training.sequence_length or leave the source out"
            )
        self.store = store
        self.window_tokens = window_tokens
        self.num_windows = (store.num_tokens - 1) // window_tokens
        self.kind = f"concat {NUM_ROUNDS}"
        self._name, self._seed = name, seed
        self._permutation = lru_cache(maxsize=KEPT_EPOCHS)(self._make_permutation)

    def windows(self, epoch: int, positions: Int64Array) -> Int64Array:
        """Return the windows at the given places of an epoch."""
        return self._permutation(epoch).forward(positions)

    def positions(self, epoch: int, windows: Int64Array) -> Int64Array:
        """Return the places of the given windows; the inverse of ``windows``."""
        return self._permutation(epoch).inverse(windows)

    def pieces(self, windows: Int64Array) -> Pieces:
        """Return one piece for each window."""
        count = len(windows)
        return Pieces(
            row=np.arange(count),
            offset=np.zeros(count, dtype=np.int64),
            start=windows * self.window_tokens,
            length=np.full(count, self.window_tokens),
        )

    def windows_of(self, start: int, end: int) -> Int64Array:
        """Return the windows that have any of the tokens [start, end) as input, in order."""
        last = min(-(-end // self.window_tokens), self.num_windows)
        return np.arange(start // self.window_tokens, last)

    def _make_permutation(self, epoch: int) -> Permutation:
        return Permutation(self.num_windows, derive_key("windows", self._seed, self._name, epoch))
