"""Best-fit packing as the order of a source: windows of whole documents, and no order is kept.

``llmtrain-data pack`` counts the windows of every pack block ahead, 8 bytes a block; the packing of
a block is computed again when one of its windows is read. An epoch takes the blocks in a keyed
order, in groups, and the windows of each group in a keyed order: both directions need only the
counts. Every token of the store is an input once in an epoch.

    order = PackedOrder(TokenStore.open("stores/wiki"), "wiki", seed=1, window_tokens=4096)
    order.pieces(order.windows(epoch=0, positions=np.arange(8)))
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.data.indexed import Int64Array
from llmtrain.data.order import KEPT_EPOCHS, Pieces
from llmtrain.data.pack_blocks import VERSION, PackBlocks, read_packing
from llmtrain.data.permutation import NUM_ROUNDS, Permutation, derive_key
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError

GROUP_BLOCKS = 64
"""Blocks whose windows are shuffled together, about 270 M tokens."""
CACHE_BYTES = 64 << 20
"""Memory for packed blocks of one source; a group takes 6 MiB where documents have 500 tokens."""

Change = Callable[[Permutation, Int64Array], Int64Array]
"""Permutation.forward or Permutation.inverse."""


class _Block(NamedTuple):
    """A packed block in little memory; windows are numbered inside it."""

    base: int
    """First token of the block in the store."""
    first: npt.NDArray[np.integer]
    """First piece of every window, and the number of pieces."""
    start: npt.NDArray[np.integer]
    """First token of every piece, from ``base``."""
    length: npt.NDArray[np.integer]
    """Tokens of every piece."""
    ends_document: npt.NDArray[np.bool_]
    """Whether a piece holds the last token of its document."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(array.nbytes for array in self[1:])


class _Epoch(NamedTuple):
    """The order of blocks in one epoch."""

    blocks: Permutation
    """Place of a block <- -> block."""
    windows_before: Int64Array
    """Windows of the epoch before each place, and after the last."""


class PackedOrder:
    """Windows of documents packed by best fit, shuffled every epoch."""

    def __init__(
        self,
        store: TokenStore,
        name: str,
        *,
        seed: int,
        window_tokens: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Read the windows of every block from beside ``store``.

        Raises:
            DataError: the store is not packed for windows of ``window_tokens``.
        """
        self.store = store
        self.window_tokens = window_tokens
        packings = [read_packing(member, name, window_tokens) for member in store.members]
        self._blocks = PackBlocks(store, window_tokens)
        self.kind = f"best_fit {VERSION} {self._blocks.block_tokens} {GROUP_BLOCKS} {NUM_ROUNDS}"
        self._windows: Int64Array = np.concatenate(
            [np.array(packing.windows, dtype=np.int64) for packing in packings]
        )
        self._first_window: Int64Array = np.cumsum(np.append(0, self._windows))
        self.num_windows = int(self._first_window[-1])
        self._name, self._seed = name, seed
        self._cache: OrderedDict[int, _Block] = OrderedDict()
        self._cache_bytes, self._bytes_kept = cache_bytes, 0
        self._epoch = lru_cache(maxsize=KEPT_EPOCHS)(self._make_epoch)

    def windows(self, epoch: int, positions: Int64Array) -> Int64Array:
        """Return the windows at the given places of an epoch."""
        order = self._epoch(epoch)
        inside = self._within_groups(epoch, positions, Permutation.forward)
        place = np.searchsorted(order.windows_before, inside, side="right") - 1
        return self._first_window[order.blocks.forward(place)] + (
            inside - order.windows_before[place]
        )

    def positions(self, epoch: int, windows: Int64Array) -> Int64Array:
        """Return the places of the given windows; the inverse of ``windows``."""
        order = self._epoch(epoch)
        block = self._block_of(windows)
        inside = order.windows_before[order.blocks.inverse(block)] + (
            windows - self._first_window[block]
        )
        return self._within_groups(epoch, inside, Permutation.inverse)

    def pieces(self, windows: Int64Array) -> Pieces:
        """Return the pieces of documents in each window; none crosses a document's end."""
        block_of = self._block_of(windows)
        parts = []
        for number in np.unique(block_of).tolist():
            rows = np.flatnonzero(block_of == number)
            block = self._block(number)
            first = block.first[windows[rows] - self._first_window[number]].astype(np.int64)
            counts = np.diff(block.first)[windows[rows] - self._first_window[number]]
            chosen = np.arange(counts.sum()) + np.repeat(first - _before(counts), counts)
            start = block.base + block.start[chosen].astype(np.int64)
            ends_document = block.ends_document[chosen]
            parts.append((np.repeat(rows, counts), start, block.length[chosen], ends_document))
        row, start, length, ends_document = (np.concatenate(p) for p in zip(*parts, strict=True))
        order = np.argsort(row, kind="stable")
        length = length[order].astype(np.int64)
        counts = np.bincount(row, minlength=len(windows))
        offset = _before(length) - np.repeat(_before(length)[_before(counts)], counts)
        return Pieces(row[order], offset, start[order], length, ends_document[order])

    def windows_of(self, start: int, end: int) -> Int64Array:
        """Return the windows that have any of the tokens [start, end) as input, in order."""
        found = []
        for number in range(self._blocks.block_of(start), self._blocks.block_of(end - 1) + 1):
            block = self._block(number)
            low = block.base + block.start.astype(np.int64)
            touched = np.flatnonzero((low < end) & (low + block.length > start))
            rows = np.searchsorted(block.first, touched, side="right") - 1
            found.append(self._first_window[number] + np.unique(rows))
        return np.concatenate(found)

    def _block_of(self, windows: Int64Array) -> Int64Array:
        found: Int64Array = np.searchsorted(self._first_window, windows, side="right") - 1
        return found

    def _within_groups(self, epoch: int, positions: Int64Array, change: Change) -> Int64Array:
        """Permute places of an epoch inside the group of blocks that each is in."""
        ends = self._epoch(epoch).windows_before
        edges = np.append(ends[:-1:GROUP_BLOCKS], ends[-1])
        group_of = np.searchsorted(edges, positions, side="right") - 1
        changed = np.empty_like(positions)
        for group in np.unique(group_of).tolist():
            chosen = group_of == group
            first, after = edges[group : group + 2].tolist()
            key = derive_key("packed windows", self._seed, self._name, epoch, group)
            permutation = Permutation(after - first, key)
            changed[chosen] = first + change(permutation, positions[chosen] - first)
        return changed

    def _make_epoch(self, epoch: int) -> _Epoch:
        key = derive_key("pack blocks", self._seed, self._name, epoch)
        blocks = Permutation(self._blocks.num_blocks, key)
        counts = self._windows[blocks.forward(np.arange(self._blocks.num_blocks))]
        return _Epoch(blocks, np.cumsum(np.concatenate([[0], counts])))

    def _block(self, number: int) -> _Block:
        """Return a packed block, from memory where it was used lately."""
        block = self._cache.pop(number, None)
        if block is None:
            block = self._pack(number)
            self._bytes_kept += block.num_bytes
        self._cache[number] = block
        while self._bytes_kept > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._bytes_kept -= oldest.num_bytes
        return block

    def _pack(self, number: int) -> _Block:
        base, packed = self._blocks.pack(number)
        if packed.num_rows != self._windows[number]:
            raise DataError(
                f"source {self._name}: block {number} of {self.store.name} packs into "
                f"{packed.num_rows} windows, its packing says {self._windows[number]}; the index "
                "was changed since: restore it, or write the store again and pack it"
            )
        small = np.int32 if packed.length.sum() < 1 << 31 else np.int64
        return _Block(
            base=base,
            first=np.searchsorted(packed.row, np.arange(packed.num_rows + 1)).astype(small),
            start=packed.start.astype(small),
            length=packed.length.astype(small),
            ends_document=packed.ends_document,
        )


def _before(counts: Int64Array) -> Int64Array:
    """Return the sum of the counts before each."""
    sums: Int64Array = np.cumsum(counts) - counts
    return sums
