"""Host memory that holds the state of one save while training goes on.

It is taken once, pinned where the state is on a GPU, and reused by every save.

    staging = Staging(plan.pieces, device)
    staging.copy(state)                 # returns when the values are here
    write(path, plan.pieces, staging.values)
"""

import logging
from collections.abc import Mapping, Sequence
from threading import Thread

import torch
from torch import Tensor

from llmtrain.checkpoint.tensor_files import Piece

_ALIGNMENT = 64

logger = logging.getLogger(__name__)


class Staging:
    """A copy of what this rank writes."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        """Take the memory; its pages are made in the background.

        Raises:
            RuntimeError: there is not so much.
        """
        starts, self.num_bytes = list[int](), 0
        for piece in pieces:
            starts.append(self.num_bytes)
            self.num_bytes += -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.empty(self.num_bytes, dtype=torch.uint8)
        self._pieces = tuple(pieces)
        self.values = [
            self._memory[start : start + piece.num_bytes].view(piece.dtype).view(piece.shape)
            for piece, start in zip(pieces, starts, strict=True)
        ]
        """The values of the pieces, in their order."""
        self._device = device
        self._pinned = False
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._pin()
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._touching = Thread(target=self._memory.zero_, name="staging", daemon=True)
        self._touching.start()

    def ready(self) -> "torch.cuda.Event | None":
        """Mark the point in the work of the GPU at which the state is that of this moment."""
        return (
            None if self._side is None else torch.cuda.current_stream(self._device).record_event()
        )

    def copy(self, state: Mapping[str, Tensor], after: "torch.cuda.Event | None" = None) -> None:
        """Copy the values of ``state`` here; any thread may.

        ``after`` is what ``ready`` gave; the copy does not hold up later work of the GPU.
        """
        self._touching.join()
        sources = (piece.source(state) for piece in self._pieces)  # packed ones expand one by one
        if self._side is None or after is None:
            for value, source in zip(self.values, sources, strict=True):
                value.copy_(source)
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(after)
            for value, source in zip(self.values, sources, strict=True):
                value.copy_(source, non_blocking=True)
        self._side.synchronize()

    def close(self) -> None:
        """Give the pinned memory back."""
        self._touching.join()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False

    def _pin(self) -> None:
        """Have the GPU copy into the memory without the host's help."""
        if not self.num_bytes:
            return
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cudart.cudaHostRegister(self._memory.data_ptr(), self.num_bytes, 0)
        self._pinned = int(status) == 0
        if not self._pinned:
            logger.warning(
                "%d bytes of host memory for checkpoints cannot be pinned (CUDA error %d): copying "
                "to them takes longer; raise the limit of locked memory (ulimit -l)",
                self.num_bytes, int(status),
            )  # fmt: skip
