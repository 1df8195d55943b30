"""Pairs of a chosen and a rejected text: found in a store, and told to the loss of a batch.

A pair is one document of a store with roles (``llmtrain.data.roles``). In the rows of a batch its
two texts are two documents, the rejected one behind the chosen one. ``mark_pairs`` says so to
``train/preference_loss.py``: weight 1 at the last target of every chosen text and 0 elsewhere, and
what the reference gives the answers.

    pairs = PairStore(TokenStore.open("stores/preferences"), window_tokens=1024)
    pairs.reference = np.zeros((pairs.num_pairs, 2), dtype=np.float64)
    batch = mark_pairs(batch, [(pairs, pieces)])
    held_out = PairBatches({"preferences": pairs}, sequence_length=1024, micro_batch_size=8)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from llmtrain.data.batch import StepBatch
from llmtrain.data.best_fit import pack_documents
from llmtrain.data.held_out import EvaluationBatches
from llmtrain.data.indexed import Int64Array
from llmtrain.data.order import Pieces
from llmtrain.data.roles import ANSWER, SECOND, RoleArray
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError

FloatArray = npt.NDArray[np.float64]
_BLOCK_TOKENS = 1 << 22
"""Tokens whose roles are looked at together, or those of one pair where it has more."""


class PairStore:
    """A store whose documents are pairs that each fit in a window."""

    def __init__(self, store: TokenStore, window_tokens: int) -> None:
        """Look at the roles of every token of ``store``.

        Raises:
            DataError: documents are no pairs, or longer than a window.
        """
        self.store = store
        self.starts: Int64Array = store.document_boundaries(0, store.num_tokens)
        """First token of every pair."""
        self.lengths: Int64Array = np.diff(self.starts, append=store.num_tokens)
        """Tokens of every pair, both texts and their EOS."""
        self.reference: FloatArray | None = None
        """Log-probabilities the reference gives the chosen and the rejected answer, [P, 2]."""
        self._check_pairs()
        if len(longer := np.flatnonzero(self.lengths > window_tokens)):
            raise DataError(
                f"{store.name} has {len(longer):,} of {self.num_pairs:,} pairs that are longer "
                f"than training.sequence_length={window_tokens}, the longest of "
                f"{self.lengths.max():,} tokens; use a sequence_length of that, or make the store "
                "without them (llmtrain-data chat)"
            )

    @property
    def num_pairs(self) -> int:
        """Pairs in the store."""
        return len(self.starts)

    def _check_pairs(self) -> None:
        """Compare the roles with those of pairs: one second text, and answers in both."""
        ends, low, bad = self.starts + self.lengths, 0, 0
        while low < self.num_pairs:
            limit = self.starts[low] + _BLOCK_TOKENS
            high = max(low + 1, int(np.searchsorted(ends, limit, side="right")))
            roles = self.store.roles(int(self.starts[low]), int(ends[high - 1]))
            bad += _count_unpaired(roles, self.starts[low:high] - self.starts[low])
            low = high
        if bad:
            raise DataError(
                f"{self.store.name} has {bad:,} of {self.num_pairs:,} documents that are no pair "
                "of answers, and training.objective=dpo takes nothing else; make the store with "
                "llmtrain-data chat kind=preferences, or use objective=next_token"
            )


def _count_unpaired(roles: RoleArray, starts: Int64Array) -> int:
    """Count the documents, which begin at ``starts``, that are no pair of answers."""
    second = (roles & SECOND) > 0
    rises = np.flatnonzero(second[1:] & ~second[:-1]) + 1
    pair_of = np.searchsorted(starts, rises, side="right") - 1
    paired = np.bincount(pair_of, minlength=len(starts)) == 1
    first = rises[np.searchsorted(pair_of, np.flatnonzero(paired))]
    answered = (roles & ANSWER) > 0
    answered[starts] = answered[first] = False  # the first token of a text is never a target
    edges = np.sort(np.concatenate([starts, first]))
    found = np.logical_or.reduceat(answered, edges)
    own = np.searchsorted(edges, starts[paired])
    return len(starts) - int((found[own] & found[own + 1]).sum())


class PairPlaces(NamedTuple):
    """Where the pairs of one store stand in a batch."""

    documents: Int64Array
    """Numbers of the pairs in the store."""
    row: Int64Array
    """Row of each in the batch."""
    number: Int64Array
    """Number of its chosen text in the row; the rejected one has the next."""


def places_of(batch: StepBatch, store: PairStore, pieces: Pieces) -> PairPlaces:
    """Find the pairs of a store that ``pieces`` put into the rows of ``batch``, a piece each."""
    number = batch.document_ids.numpy()[pieces.row, pieces.offset].astype(np.int64)
    return PairPlaces(np.searchsorted(store.starts, pieces.start), pieces.row, number)


def mark_pairs(batch: StepBatch, parts: Sequence[tuple[PairStore, Pieces]]) -> StepBatch:
    """Give a batch on the CPU the weights of its pairs and what the reference says of them.

    A store without a reference leaves 0.
    """
    shape = tuple(batch.targets.shape)
    weight, reference = np.zeros(shape, dtype=np.float32), np.zeros(shape)
    row, column = np.nonzero(batch.targets.numpy() >= 0)
    text = row * (shape[1] + 1) + batch.document_ids.numpy()[row, column]
    last = np.append(text[1:] != text[:-1], True)[: len(text)]
    text, column = text[last], column[last]
    for store, pieces in parts:
        places = places_of(batch, store, pieces)
        for second in range(2):
            wanted = places.row * (shape[1] + 1) + places.number + second
            at = column[np.searchsorted(text, wanted)]
            weight[places.row, at] = 1 - second
            if store.reference is not None:
                reference[places.row, at] = store.reference[places.documents, second]
    return replace(
        batch, loss_weight=torch.from_numpy(weight), reference=torch.from_numpy(reference)
    )


class PairBatches(EvaluationBatches):
    """Held-out pairs: every pair once, whole, packed into rows; the same on any number of ranks."""

    def __init__(
        self,
        stores: Mapping[str, PairStore],
        *,
        sequence_length: int,
        micro_batch_size: int,
        num_microbatches: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_windows: int | None = None,
    ) -> None:
        """Read all pairs, or at most ``max_windows`` rows of each store, spread evenly."""
        self.pairs = tuple(stores[name] for name in sorted(stores))
        self._packed = [pack_documents(one.lengths, sequence_length) for one in self.pairs]
        super().__init__(
            {name: one.store for name, one in stores.items()},
            sequence_length=sequence_length, micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches, dp_rank=dp_rank, dp_size=dp_size,
            max_windows=max_windows,
        )  # fmt: skip

    def windows_in(self, source: int) -> int:
        """Count the rows that the pairs of a source fill."""
        return self._packed[source].num_rows

    def pieces(self, source: int, rows: Int64Array, windows: Int64Array) -> Pieces:
        """Return the pairs of some windows of a source, placed in ``rows``."""
        packed = self._packed[source]
        low, high = (np.searchsorted(packed.row, windows, side=side) for side in ("left", "right"))
        counts = high - low
        skipped = np.repeat(np.cumsum(counts) - counts - low, counts)
        chosen = np.arange(counts.sum()) - skipped
        return Pieces(
            np.repeat(rows, counts), packed.offset[chosen], packed.start[chosen],
            packed.length[chosen], packed.ends_document[chosen],
        )  # fmt: skip

    def at(self, index: int) -> StepBatch:
        """Return this rank's rows of batch ``index``, padded to the full shape, pairs marked."""
        return mark_pairs(super().at(index), self.parts(index))

    def parts(self, index: int) -> list[tuple[PairStore, Pieces]]:
        """Name the pairs of this rank's rows of batch ``index``, store by store."""
        return [(self.pairs[source], pieces) for source, pieces in self.placed(index)]
