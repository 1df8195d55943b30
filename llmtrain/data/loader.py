"""The batches of one rank: rows of the global batch, read ahead of the step.

Ranks take contiguous units of the same global batch, so the batch does not depend on how many there
are; what the batch of a step is made of is the plan's to say. Where the units do not make the same
whole micro-batches for every rank, the last ranks are filled up with rows that have no targets.

    with Batches(plan, dp_rank=0, dp_size=2, micro_batch_size=8, prefetch=2) as batches:
        batches.at(0)
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from llmtrain.config.parallel import ParallelConfig, microbatches_per_rank
from llmtrain.data.assemble import assemble_windows
from llmtrain.data.batch import StepBatch
from llmtrain.data.order import Pieces
from llmtrain.data.pairs import PairStore, mark_pairs
from llmtrain.data.plan import BatchPlan, StepWindows

ONE_STAGE = ParallelConfig()

logger = logging.getLogger(__name__)


class Batches:
    """The rows of one data-parallel rank, read ahead in a background thread."""

    def __init__(
        self,
        plan: BatchPlan,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_batch_size: int,
        parallel: ParallelConfig = ONE_STAGE,
        prefetch: int = 2,
        finish: Callable[[StepBatch], StepBatch] = lambda batch: batch,
        pairs: Sequence[PairStore] | None = None,
    ) -> None:
        """Serve rank ``dp_rank`` of ``dp_size``; ``prefetch`` global batches are read ahead.

        ``micro_batch_size`` counts units: rows of the longest sequence length. ``parallel`` says
        how many micro-batches a pipeline needs. ``finish`` is called with each batch where it is
        read, ahead of the step (train/feed.py copies it to a device). ``pairs`` are the sources of
        a preference run, in the order of the plan.
        """
        self.plan = plan
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._micro_batch_size = micro_batch_size
        self._parallel = parallel
        self._prefetch = prefetch
        self._finish = finish
        self._pairs = pairs
        self._reader = ThreadPoolExecutor(1, "batches") if prefetch else None
        self._ahead: dict[int, Future[StepBatch]] = {}
        self._epochs_begun = [0] * len(plan.orders)

    def at(self, step: int) -> StepBatch:
        """Return the rows of 0-based step ``step`` on the CPU; steps in a row are read ahead."""
        if self._reader is None:
            return self._read(step)
        wanted = range(step, step + 1 + self._prefetch)
        for stale in [s for s in self._ahead if s not in wanted]:
            self._ahead.pop(stale).cancel()
        for needed in wanted:
            if needed not in self._ahead and (needed == step or self.plan.knows(needed)):
                self._ahead[needed] = self._reader.submit(self._read, needed)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Stop reading ahead; safe to call twice."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def _read(self, step: int) -> StepBatch:
        chosen = self.plan.windows(step)
        self._log_epochs(chosen)
        size = self._micro_batch_size
        count = microbatches_per_rank(self._parallel, len(chosen.sources), self._dp_size, size)
        units = count * size
        own = slice(self._dp_rank * units, (self._dp_rank + 1) * units)
        batch = assemble_windows(
            self.plan.orders,
            chosen.sources[own],
            chosen.windows[own],
            unit_tokens=self.plan.steps.unit_tokens,
            sequence_length=chosen.sequence_length,
            num_microbatches=count,
            num_units=units,
            epochs=chosen.epochs[own],
            fim=self.plan.fim,
        )
        if self._pairs is not None:
            batch = mark_pairs(batch, self._placed(chosen, own, self._pairs))
        return self._finish(batch)

    def _placed(
        self, chosen: StepWindows, own: slice, pairs: Sequence[PairStore]
    ) -> list[tuple[PairStore, Pieces]]:
        """Name the pairs of some units of a batch, each a row, store by store."""
        sources, windows, found = chosen.sources[own], chosen.windows[own], []
        for source in np.unique(sources).tolist():
            (rows,) = np.nonzero(sources == source)
            pieces = self.plan.orders[source].pieces(windows[rows])
            found.append((pairs[source], pieces._replace(row=rows[pieces.row])))
        return found

    def _log_epochs(self, chosen: StepWindows) -> None:
        """Say of each source once when it begins another epoch."""
        for source in np.unique(chosen.sources[chosen.epochs > 0]).tolist():
            epoch = int(chosen.epochs[chosen.sources == source].max())
            if epoch > self._epochs_begun[source]:
                self._epochs_begun[source] = epoch
                logger.info(
                    "source %s begins epoch %d of its %d windows, in a new order",
                    self.plan.source_names[source], epoch + 1,
                    self.plan.orders[source].num_windows,
                )  # fmt: skip

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
