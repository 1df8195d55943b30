"""The batch of one optimizer step, the same type for pretraining, SFT and DPO.

Every rank of a pipeline holds the same rows; ranks of different data-parallel index hold different
rows of the same global batch. Row shapes change between the stages of a ramp alone, so that nothing
recompiles inside one and pipelines can exchange static shapes.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target value of a position whose next token is no target (another document, padding)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The rows one data-parallel rank gives to a step; R = num_microbatches * micro size."""

    tokens: Tensor
    """Input ids, int64 [R, S]."""
    targets: Tensor
    """Next-token ids, int64 [R, S]; IGNORE_INDEX where there is no target."""
    positions: Tensor
    """Position inside the document, int32 [R, S]; restarts at 0 with each document of a row."""
    document_ids: Tensor
    """Ordinal of the document inside the row, int32 [R, S]; never falls along a row."""
    loss_weight: Tensor
    """Weight of each target, float32 [R, S]; 0 where there is no target, 1 in pretraining."""
    source_ids: Tensor
    """Index of the source each row comes from, int32 [R]."""
    num_microbatches: int
    """How many equal slices of rows the engine runs one after the other."""
    row_ids: Tensor | None = None
    """Number of each row in the global batch, int32 [R], where the losses of its documents are
    asked for; None elsewhere."""
    reference: Tensor | None = None
    """Sums of the reference's log-probabilities of the answers of pairs, float64 [R, S]: each at
    the last target of its text, 0 elsewhere; None where no loss compares with a reference."""
    extent: tuple[int, int] | None = None
    """Most documents of a row and most tokens of a document; known of batches on a device, so that
    it need not be asked for them."""

    def to(self, device: torch.device) -> "StepBatch":
        """Copy every tensor to ``device`` (asynchronously from pinned memory)."""
        extent = self.extent
        if extent is None and device.type != "cpu" and self.tokens.device.type == "cpu":
            extent = int(self.document_ids.max()) + 1, int(self.positions.max()) + 1
        moved = {name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        return replace(self, extent=extent, **moved)

    def pinned(self) -> "StepBatch":
        """Copy every tensor to pinned memory, from where ``to`` copies asynchronously."""
        return replace(self, **{name: t.pin_memory() for name, t in self.tensors().items()})

    def microbatches(self) -> list["StepBatch"]:
        """Split the rows into ``num_microbatches`` equal batches of one micro-batch each."""
        parts = {name: t.chunk(self.num_microbatches) for name, t in self.tensors().items()}
        return [
            replace(self, num_microbatches=1, **{name: part[i] for name, part in parts.items()})
            for i in range(self.num_microbatches)
        ]

    def tensors(self) -> dict[str, Any]:
        """Name the tensors that are there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
