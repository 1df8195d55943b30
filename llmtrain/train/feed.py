"""Batches on their way to the device: copied ahead, beside the step that runs.

On a GPU the thread that reads batches ahead also copies them, from pinned memory and on a stream of
its own; when the loop asks for one, the device waits for that copy where it is not done, the host
does not. On the CPU a batch stays where it is.

Invariant: the memory of a copied batch is not used again before the step that reads it is over on
the device.

    copies = Copies(world.device)
    batches = Feed(Batches(plan, ..., finish=copies.start), copies)
    batches.at(0)
    batches.waited_s      # seconds the loop waited for batches since the start
"""

import time

import torch

from llmtrain.data.batch import StepBatch
from llmtrain.hang.heartbeat import Heartbeat, Phase
from llmtrain.parallel.scopes import DATA, scope
from llmtrain.train.loop import BatchSource


class Copies:
    """Copies to one device, on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def on_gpu(self) -> bool:
        """Whether batches are copied to a GPU."""
        return self._side is not None

    def start(self, batch: StepBatch) -> StepBatch:
        """Begin the copy of a batch; in any thread. ``finish`` it before use."""
        if self._side is None:
            return batch
        with torch.cuda.stream(self._side):
            return batch.pinned().to(self._device)

    def finish(self, batch: StepBatch) -> StepBatch:
        """Have the computing stream wait for all copies begun so far; moves what is still here."""
        if self._side is None:
            return batch
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._side)
        for tensor in batch.tensors().values():
            if tensor.device == self._device:
                tensor.record_stream(computing)
        return batch.to(self._device)


class Feed:
    """A batch source on the device that counts the seconds the loop waited for it."""

    def __init__(self, source: BatchSource, copies: Copies, beat: Heartbeat | None = None) -> None:
        """Serve what ``source`` gives; its batches may have been started by ``copies``.

        ``beat`` is told of each step, and that the first of a shape may take long: it compiles.
        """
        self._source = source
        self._copies = copies
        self._beat = beat or Heartbeat()
        self._shapes: set[tuple[int, ...]] = set()
        self.waited_s = 0.0
        """Seconds waited so far."""
        self.asked_s = 0.0
        """When the last batch was asked for, on the clock of ``busy_s``."""

    def at(self, step: int) -> StepBatch:
        """The batch of ``step`` from the source, on the device."""
        self.asked_s = self.busy_s()
        self._beat.begin(step + 1, slow=not self._shapes)
        started = time.perf_counter()
        with scope(DATA):
            batch = self._copies.finish(self._source.at(step))
        self.waited_s += time.perf_counter() - started
        shape = (*batch.tokens.shape, batch.num_microbatches)
        self._beat.at(Phase.FORWARD, slow=shape not in self._shapes)
        self._shapes.add(shape)
        return batch

    def busy_s(self) -> float:
        """Read the clock that tells what this rank does itself.

        On the CPU that is processor time; a GPU keeps its host waiting, so there it is wall-clock.
        """
        return time.perf_counter() if self._copies.on_gpu else time.process_time()
