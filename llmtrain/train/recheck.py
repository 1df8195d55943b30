"""Silent corruption: bits that no checksum of a file and no parity of a memory has noticed.

At chosen steps, after the update, two things are done again that must give the same bits. Whatever
several ranks hold of the state (parameters, moments) has one checksum on all of them; and every
block, run twice on the same input, gives the same output. The rank is named whose bits differ from
those of most others, or whose block gave two outputs for one input; its neighbours, who were sent
wrong numbers, are not.

Invariant: no bit of a step depends on whether it was checked, and every rank comes to the same
finding.

    recheck = Recheck(world, engine, every_steps=500, compiled=False, sound_step=progress.step)
    recheck.found = guard.distrust              # told what is wrong, and the last sound step
    batches = recheck.watching(batches)
    hooks.append(recheck)                       # on every rank
"""

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import StepResult
from llmtrain.model.layers import Block
from llmtrain.parallel.mesh import World
from llmtrain.parallel.region import local_part
from llmtrain.train.loop import BatchSource
from llmtrain.train.progress import Progress
from llmtrain.train.tensor_files import own_rectangles

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Call = tuple[int, int, int]
"""A run of a block: its layer, the checksums of what went in and of what came out."""


class Checked(Protocol):
    """The part of an engine that is looked at."""

    def eval_step(self, batch: StepBatch) -> StepResult:
        """Forward only; every rank calls it."""
        ...

    def stages(self) -> Sequence[nn.Module]:
        """Parts of the model on this rank."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Model and optimizer by name, as far as this rank holds them."""
        ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one rank says of itself."""

    host: str
    """Its machine."""
    held: Mapping[tuple[str, tuple[int, ...]], int]
    """Checksum by name of a tensor and offset of the rectangle in it."""
    calls: tuple[Sequence[Call], Sequence[Call]]
    """The blocks of both runs, in order."""


class Recheck:
    """Hook on every rank, and what hands it the batches of chosen steps."""

    def __init__(
        self, world: World, engine: Checked, *, every_steps: int, compiled: bool, sound_step: int
    ) -> None:
        """Check every ``every_steps`` steps; what was loaded at ``sound_step`` is trusted.

        ``compiled`` blocks are run uncompiled.
        """
        self._world = world
        self._engine = engine
        self._every_steps = every_steps
        self._compiled = compiled
        self._sound_step = sound_step
        self._batch: StepBatch | None = None
        self.found: Callable[[str, int], None] = lambda why, sound_step: None
        """Told on every rank what is wrong, and the last step at which nothing was."""
        self.report: Callable[[Mapping[str, Any], float], None] | None = None
        """Takes the seconds, which are not step time; on rank 0."""

    def watching(self, source: BatchSource) -> BatchSource:
        """Give the batches of ``source`` and keep those of chosen steps."""
        return _Watching(self, source)

    def keep(self, step: int, batch: StepBatch) -> None:
        """Keep the batch of 0-based ``step`` where that is chosen."""
        self._batch = batch if (step + 1) % self._every_steps == 0 else None

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Check after a chosen step; every rank calls it."""
        if self._batch is None:
            return
        result.applied.item()  # the training steps before are not counted as time of this
        started = time.perf_counter()
        batch, self._batch = replace(self._batch, row_ids=None), None
        mine = Evidence(socket.gethostname(), self._held(), (self._run(batch), self._run(batch)))
        parts = self._world.collect(mine)
        why = self._world.share(judge(parts) if parts is not None else "", source=0)
        if why:
            self.found(f"step {progress.step}: {why}", self._sound_step)
        else:
            self._sound_step = progress.step
        if self.report is not None:
            self.report({}, time.perf_counter() - started)

    def _held(self) -> dict[tuple[str, tuple[int, ...]], int]:
        sums = {
            where: checksum(values) for where, values in own_rectangles(self._engine.state_dict())
        }
        return dict(zip(sums, _read(list(sums.values())), strict=True))

    def _run(self, batch: StepBatch) -> list[Call]:
        """Run the batch forward; what went into and came out of every block here."""
        blocks = [
            module
            for stage in self._engine.stages()
            for module in stage.modules()
            if isinstance(module, Block)
        ]
        calls: list[tuple[int, Tensor, Tensor]] = []
        with _recording(blocks, calls), ExitStack() as eager:
            if self._compiled:
                eager.enter_context(torch.compiler.set_stance("force_eager"))
            self._engine.eval_step(batch)
        layers, ins, outs = ([], [], []) if not calls else zip(*calls, strict=True)
        return list(zip(layers, _read(ins), _read(outs), strict=True))


class _Watching:
    def __init__(self, recheck: Recheck, source: BatchSource) -> None:
        self._recheck = recheck
        self._source = source

    def at(self, step: int) -> StepBatch:
        batch = self._source.at(step)
        self._recheck.keep(step, batch)
        return batch


def checksum(values: Tensor) -> Tensor:
    """Sum of the bits of ``values`` as whole numbers, int64 scalar on their device.

    One flipped bit always changes it, and so do several but by a rare chance.
    """
    plain = local_part(values.detach()).contiguous().flatten()
    return plain.view(_WORDS[plain.dtype.itemsize]).sum(dtype=torch.int64)


def judge(parts: Sequence[Evidence]) -> str:
    """What the ranks' evidence says, in one sentence; empty where all is sound."""
    return "; ".join([*_differing(parts), *_unsteady(parts)])


def _differing(parts: Sequence[Evidence]) -> Iterator[str]:
    """Ranks that hold other bits than their replicas do."""
    holders: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
    for rank, part in enumerate(parts):
        for where, total in part.held.items():
            holders.setdefault(where, {})[rank] = total
    wrong: dict[tuple[int, ...], list[str]] = {}
    for (name, _), totals in holders.items():
        (_, most), *others = Counter(totals.values()).most_common()
        if others:
            alike = {total for total, count in Counter(totals.values()).items() if count == most}
            odd = [r for r, total in totals.items() if len(alike) > 1 or total not in alike]
            wrong.setdefault(tuple(odd), []).append(name)
    for ranks, names in wrong.items():
        who = " and ".join(f"rank {rank} on {parts[rank].host}" for rank in ranks)
        held = "differ among themselves in" if len(ranks) > 1 else "differs from its replicas in"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{who} {held} the bits of {names[0]}{more}"


def _unsteady(parts: Sequence[Evidence]) -> Iterator[str]:
    """Ranks whose block gave two outputs for one input."""
    for rank, part in enumerate(parts):
        for (layer, given, first), (_, again, second) in zip(*part.calls, strict=True):
            if given == again and first != second:
                yield f"rank {rank} on {part.host} computed layer {layer} twice with other bits"
                break


def _read(sums: Sequence[Tensor]) -> list[int]:
    found: list[int] = torch.stack(list(sums)).tolist() if sums else []
    return found


@contextmanager
def _recording(blocks: Sequence[Block], calls: list[tuple[int, Tensor, Tensor]]) -> Iterator[None]:
    """Have ``blocks`` add each run to ``calls``."""

    def note(block: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        layer = cast(Block, block).self_attn.layer
        calls.append((layer, checksum(given[0]), checksum(output)))

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
