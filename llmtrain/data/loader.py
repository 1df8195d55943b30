"""The batch plan: which windows every optimizer step sees, on any number of ranks.

A window is S+1 tokens at stride S over a source's shards in manifest order. Step t of a run is a
pure function of (stores, weights, seed, S, global batch size, t): its state is one integer. Ranks
take contiguous rows of the same global batch, so the batch does not depend on how many there are.

    plan = BatchPlan({"wiki": TokenStore.open("stores/wiki")}, None, seed=1, sequence_length=512,
                     global_batch_size=64)
    with Batches(plan, dp_rank=0, dp_size=2, micro_batch_size=8, prefetch=2) as batches:
        batches.at(0)
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import NamedTuple

import blake3
import numpy as np
import numpy.typing as npt

from llmtrain.data.assemble import assemble
from llmtrain.data.batch import StepBatch
from llmtrain.data.indexed import Int64Array
from llmtrain.data.mixture import SUPER_BLOCK, ConstantShares, Mixture, num_windows, source_shares
from llmtrain.data.permutation import NUM_ROUNDS, Permutation, derive_key
from llmtrain.data.store import TokenStore
from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)

SHUFFLE_BLOCK_WINDOWS = 1
"""Windows that stay together when a source is shuffled; part of the fingerprint."""


class StepWindows(NamedTuple):
    """The rows of one global batch, in order."""

    sources: npt.NDArray[np.int32]
    """Index of the source of each row (into ``BatchPlan.source_names``)."""
    windows: Int64Array
    """Window inside the source; it begins at token window * S."""
    epochs: Int64Array
    """How often the source had been read through before, 0-based."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What one source gives to a run."""

    name: str
    """Name of the source."""
    share: float
    """Its share of the tokens."""
    num_tokens: int
    """Tokens in its store."""
    num_windows: int
    """Windows of an epoch."""
    dropped_tokens: int
    """Tokens of the last, partial window that an epoch leaves out."""
    planned_tokens: int
    """Tokens it gives to the run."""
    epochs: float
    """How often the run reads it."""


class BatchPlan:
    """The order of windows over a whole run; cheap to make and to ask at any step."""

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        weights: Mapping[str, float] | None,
        *,
        seed: int,
        sequence_length: int,
        global_batch_size: int,
    ) -> None:
        """Mix ``stores`` by ``weights`` (null: in proportion to their windows).

        Sources are ordered by name, so the plan does not depend on the order of the configuration.

        Raises:
            DataError: a store holds less than one window, or stores are of different tokenizers.
            ConfigError: weights and stores do not name the same sources, or a weight is no share.
        """
        self.source_names = tuple(sorted(stores))
        self.stores = tuple(stores[name] for name in self.source_names)
        self.seed = seed
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.num_windows = tuple(num_windows(s, sequence_length) for s in self.stores)
        self.shares = source_shares(stores, weights, sequence_length)
        self.mixture = Mixture(ConstantShares(self.shares))
        self._permutation = lru_cache(maxsize=4 * len(stores))(self._make_permutation)
        self._epochs_logged = [0] * len(stores)

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of a global batch."""
        return self.global_batch_size * self.sequence_length

    @property
    def fingerprint(self) -> str:
        """blake3 hex of everything the order of tokens depends on."""
        parts: list[str | int] = [self.seed, self.sequence_length, self.global_batch_size]
        parts += [SUPER_BLOCK, SHUFFLE_BLOCK_WINDOWS, NUM_ROUNDS]
        for name, store, share in zip(self.source_names, self.stores, self.shares, strict=True):
            parts += [name, store.fingerprint, str(share)]
        return str(blake3.blake3(derive_key("batch plan", *parts)).hexdigest())

    def windows(self, step: int) -> StepWindows:
        """Return the rows of the global batch of 0-based step ``step``."""
        first = step * self.global_batch_size
        sources, ordinals = self.mixture.assign(first, first + self.global_batch_size)
        windows = np.empty_like(ordinals)
        epochs = np.empty_like(ordinals)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            epoch_of, position = np.divmod(ordinals[rows], self.num_windows[source])
            epochs[rows] = epoch_of
            for epoch in np.unique(epoch_of).tolist():
                chosen = epoch_of == epoch
                permutation = self._permutation(source, epoch)
                windows[rows[chosen]] = permutation.forward(position[chosen])
            self._log_epoch(source, int(epoch_of.max()))
        return StepWindows(sources, windows, epochs)

    def describe(self, num_tokens: int) -> tuple[SourcePlan, ...]:
        """Return what each source gives to a run of ``num_tokens`` input tokens."""
        targets = self.mixture.schedule.integral(-(-num_tokens // self.sequence_length))
        return tuple(self._describe(i, target) for i, target in enumerate(targets))

    def _describe(self, source: int, target: Fraction) -> SourcePlan:
        store, num_windows = self.stores[source], self.num_windows[source]
        return SourcePlan(
            name=self.source_names[source],
            share=float(self.shares[source]),
            num_tokens=store.num_tokens,
            num_windows=num_windows,
            dropped_tokens=store.num_tokens - 1 - num_windows * self.sequence_length,
            planned_tokens=int(target * self.sequence_length),
            epochs=float(target / num_windows),
        )

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        key = derive_key("windows", self.seed, self.source_names[source], epoch)
        return Permutation(self.num_windows[source], key)

    def _log_epoch(self, source: int, epoch: int) -> None:
        if epoch > self._epochs_logged[source]:
            self._epochs_logged[source] = epoch
            logger.info(
                "source %s begins epoch %d of its %d windows, in a new order",
                self.source_names[source], epoch + 1, self.num_windows[source],
            )  # fmt: skip


class Batches:
    """The rows of one data-parallel rank, read ahead in a background thread."""

    def __init__(
        self,
        plan: BatchPlan,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_batch_size: int,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """Serve rank ``dp_rank`` of ``dp_size``; ``prefetch`` global batches are read ahead.

        Raises:
            ConfigError: the global batch is no multiple of dp_size * micro_batch_size.
        """
        if plan.global_batch_size % (dp_size * micro_batch_size):
            raise ConfigError(
                f"the global batch of {plan.global_batch_size} sequences is no multiple of "
                f"{dp_size} data-parallel ranks * micro_batch_size={micro_batch_size}; change one"
            )
        self.plan = plan
        rows = plan.global_batch_size // dp_size
        self._rows = slice(dp_rank * rows, (dp_rank + 1) * rows)
        self._num_microbatches = rows // micro_batch_size
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._reader = ThreadPoolExecutor(1, "batches") if prefetch else None
        self._ahead: dict[int, Future[StepBatch]] = {}

    def at(self, step: int) -> StepBatch:
        """Return the rows of 0-based step ``step`` on the CPU; steps in a row are read ahead."""
        if self._reader is None:
            return self._read(step)
        wanted = range(step, step + 1 + self._prefetch)
        for stale in [s for s in self._ahead if s not in wanted]:
            self._ahead.pop(stale).cancel()
        for needed in wanted:
            if needed not in self._ahead:
                self._ahead[needed] = self._reader.submit(self._read, needed)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Stop reading ahead; safe to call twice."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _read(self, step: int) -> StepBatch:
        chosen = self.plan.windows(step)
        batch = assemble(
            self.plan.stores,
            chosen.sources[self._rows],
            chosen.windows[self._rows] * self.plan.sequence_length,
            self.plan.sequence_length,
            self._num_microbatches,
        )
        return batch.pinned() if self._pin_memory else batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
