"""Activation offload: what blocks keep for their backward waits in host memory.

When a block has run, a side stream copies what autograd saved of it to pinned host memory; when the
backward of the block after it begins, the copies start on their way back. Parameters stay, what all
blocks share stays (angles, masks), and so does the last block, whose backward follows at once.

Invariant: gradients are bit by bit those of a run that keeps everything, whatever else replaced a
block's forward (recomputation, compilation). At most ``_IN_FLIGHT`` blocks wait for their copies to
end: where the host link is slower than the blocks, the device waits for it and memory does not
grow. On the CPU the copies are plain and in order.

    offload_blocks(transformer, torch.device("cuda"))    # after recomputation and compilation
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from llmtrain.model.layers import Block
from llmtrain.model.transformer import Transformer

logger = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Smaller tensors stay on the device: a copy costs more than they hold."""

_IN_FLIGHT = 2


def offload_blocks(
    transformer: Transformer, device: torch.device, min_bytes: int | None = None
) -> None:
    """Replace the ``forward`` of every block by one that offloads what it saves.

    Args:
        transformer: one stage; its blocks' forwards are final.
        device: where the blocks run.
        min_bytes: size from which a saved tensor is offloaded; MIN_BYTES by default.
    """
    blocks = [block for block in transformer.model.layers.values() if isinstance(block, Block)]
    offload = _Offload(device, MIN_BYTES if min_bytes is None else min_bytes)
    for block in blocks:
        at_loss = block is blocks[-1] and transformer.model.norm is not None
        block.forward = functools.partial(  # type: ignore[method-assign]
            offload.run, block, block.forward, moves=not at_loss, first=block is blocks[0]
        )
    logger.info("what %d blocks keep for the backward waits in host memory", len(blocks))


class _Saved:
    """A tensor that autograd saved: on the device, on the host, or both for a while."""

    __slots__ = ("__weakref__", "device", "host", "visit")

    def __init__(self, visit: "_Visit", tensor: Tensor) -> None:
        self.visit = visit
        self.device: Tensor | None = tensor
        self.host: Tensor | None = None


@dataclass(eq=False, slots=True)
class _Visit:
    """One forward of one block, and the one of the block before it over the same rows."""

    before: "_Visit | None"
    saved: WeakValueDictionary[tuple[Any, ...], _Saved] = field(default_factory=WeakValueDictionary)
    """What it saved, once for each geometry of a storage; the graph alone keeps it alive."""
    left: torch.cuda.Event | None = None
    """After the copies to the host."""
    back: torch.cuda.Event | None = None
    """After the copies from the host."""
    begun: bool = False
    """Whether its backward has begun."""


class _Offload:
    """The copies of one stage's blocks."""

    def __init__(self, device: torch.device, min_bytes: int) -> None:
        self._device = device
        self._min_bytes = min_bytes
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._leaving: deque[tuple[_Visit, list[_Saved]]] = deque()
        self._last: _Visit | None = None
        self._backward: _Visit | None = None

    def run(
        self,
        block: nn.Module,
        forward: Callable[..., Tensor],
        x: Tensor,
        context: Any,
        *,
        moves: bool,
        first: bool,
    ) -> Tensor:
        """Run ``forward``; where ``moves``, send away what it saved."""
        if not torch.is_grad_enabled():
            return forward(x, context)
        self._last = visit = _Visit(None if first else self._last)
        pack = functools.partial(_pack, visit)
        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            out = forward(x, context)
        if moves:
            stays = {t.untyped_storage()._cdata for t in (*block.parameters(), *_tensors(context))}
            self._send(visit, [s for s in visit.saved.values() if self._goes(s, stays)])
        return out

    def _goes(self, saved: _Saved, stays: set[int]) -> bool:
        """Tell whether a saved tensor is worth a copy, and a copy would have its strides."""
        tensor = saved.device
        return (
            type(tensor) is Tensor
            and tensor.device.type == self._device.type
            and tensor.nbytes >= self._min_bytes
            and tensor.untyped_storage()._cdata not in stays
            and bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))
        )

    def _send(self, visit: _Visit, going: list[_Saved]) -> None:
        """Start the copies to the host; free the device of those that have had their time."""
        with self._beside():
            for saved in going:
                if saved.device is not None:
                    saved.host = self._new(saved.device, on_host=True)
                    saved.host.copy_(saved.device, non_blocking=True)
        visit.left = self._mark()
        self._leaving.append((visit, going))
        while len(self._leaving) > (_IN_FLIGHT if self._side else 0):
            visit, gone = self._leaving.popleft()
            self._wait_for(visit.left)
            _free(gone)

    def _unpack(self, saved: _Saved) -> Tensor:
        visit = saved.visit
        if not visit.begun:
            self._begin(visit)
        if saved.device is None:  # a second backward through one graph
            self._bring(visit)
        self._wait_for(visit.back)
        visit.back = None
        if saved.device is None:
            raise RuntimeError("a saved activation is neither on the device nor on the host")
        return saved.device

    def _begin(self, visit: _Visit) -> None:
        """Enter the backward of a block: have its tensors here and the next ones on the way."""
        visit.begun = True
        if self._backward is not None:
            _free(list(self._backward.saved.values()))
        self._backward = visit
        self._leaving = deque(pair for pair in self._leaving if pair[0] is not visit)
        self._wait_for(visit.left)  # what is freed from now on has been copied
        self._bring(visit)
        if visit.before is not None:
            self._bring(visit.before)

    def _bring(self, visit: _Visit) -> None:
        """Start the copies from the host of what is not on the device."""
        pairs = [
            (saved, saved.host)
            for saved in visit.saved.values()
            if saved.device is None and saved.host is not None
        ]
        if not pairs:
            return
        for saved, host in pairs:  # by the stream that uses and frees them
            saved.device = self._new(host, on_host=False)
        with self._beside():
            for saved, host in pairs:
                if saved.device is not None:
                    saved.device.copy_(host, non_blocking=True)
        visit.back = self._mark()

    def _new(self, like: Tensor, on_host: bool) -> Tensor:
        """Allocate a tensor of the same geometry; pinned on the host of a GPU."""
        if on_host:
            return torch.empty_like(like, device="cpu", pin_memory=self._side is not None)
        return torch.empty_like(like, device=self._device)

    def _beside(self) -> AbstractContextManager[Any]:
        """Issue copies on the side stream, after all that was issued before."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._side)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._side is None else self._side.record_event()

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        """Have the device, not the host, wait."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def _pack(visit: _Visit, tensor: Tensor) -> _Saved:
    """Note what a block saves; what several operations save is kept once."""
    storage = tensor.untyped_storage()._cdata
    key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    saved = visit.saved.get(key)
    if saved is None:
        saved = visit.saved[key] = _Saved(visit, tensor.data)  # a detached one holds its graph
    return saved


def _free(gone: list[_Saved]) -> None:
    """Drop the device's copy of what is on the host."""
    for saved in gone:
        if saved.host is not None:
            saved.device = None


def _tensors(value: Any) -> Iterator[Tensor]:
    """List the tensors inside the context that all blocks of a forward share."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
        yield from _tensors(getattr(value, "__dict__", None))  # what it has cached
