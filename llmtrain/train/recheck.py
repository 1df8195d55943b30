"""Silent corruption: bits that no checksum of a file and no parity of a memory has noticed.

At chosen steps, after the update, two things are done again that must give the same bits. Whatever
several ranks hold of the state (parameters, moments) has one checksum on all of them; and one
micro-batch's gradients, computed twice from the same parameters, block by block, are the same
(train/twice.py). The rank is named whose bits differ from those of most others, or whose block gave
two results for one input; its neighbours, who were sent wrong numbers, are not.

Invariant: no bit of a step depends on whether it was checked, and every rank comes to the same
finding.

    recheck = Recheck(world, engine, every_steps=500, exact=True, compiled=False, sound_step=step)
    recheck.found = guard.distrust              # told what is wrong, and the last sound step
    batches = recheck.watching(batches)
    hooks.append(recheck)                       # on every rank
"""

import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtrain.checkpoint.tensor_files import own_rectangles
from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import StepResult
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress
from llmtrain.train.loop import BatchSource
from llmtrain.train.twice import Found, Twice, bits


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
    found: Sequence[Found]
    """What it computed twice with two results."""
    joined: Hashable = None
    """Alike on ranks that compute one block together (tp, cp); None of a rank alone."""


class Recheck:
    """Hook on every rank, and what hands it the batches of chosen steps."""

    def __init__(
        self,
        world: World,
        engine: Checked,
        *,
        every_steps: int,
        exact: bool,
        compiled: bool,
        sound_step: int,
    ) -> None:
        """Check every ``every_steps`` steps; what was loaded at ``sound_step`` is trusted.

        Args:
            world: the ranks.
            engine: what is checked.
            every_steps: steps from one check to the next.
            exact: a backward repeats bit by bit; else up to the order of its sums.
            compiled: blocks are compiled; here they run uncompiled.
            sound_step: the last step at which nothing is wrong.
        """
        self._world = world
        self._engine = engine
        self._every_steps = every_steps
        self._exact = exact
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
        batch, self._batch = replace(self._batch, row_ids=None).microbatches()[0], None
        joined = (self._world.pp_rank, self._world.dp_rank)
        mine = Evidence(socket.gethostname(), self._held(), self._found(batch), joined)
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

    def _found(self, batch: StepBatch) -> list[Found]:
        """Run one micro-batch; what its blocks computed twice with two results."""
        twice = Twice(self._world, self._engine.stages(), exact=self._exact)
        with twice.watching(), ExitStack() as eager:
            if self._compiled:
                eager.enter_context(torch.compiler.set_stance("force_eager"))
            self._engine.eval_step(batch)
        return twice.found()


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
    return bits(values).sum(dtype=torch.int64)


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
    """Ranks that computed something twice with two results.

    A block that ranks compute together spreads a wrong number among them: those are named with
    whom it began.
    """
    together: dict[Hashable, list[int]] = {}
    for rank, part in enumerate(parts):
        if part.found:
            together.setdefault(rank if part.joined is None else part.joined, []).append(rank)
    for ranks in together.values():
        number, what = min(parts[rank].found[0] for rank in ranks)
        first = [rank for rank in ranks if parts[rank].found[0][0] == number]
        who = " or ".join(f"rank {rank} on {parts[rank].host}" for rank in first)
        yield f"{who} computed {what} twice with other bits"


def _read(sums: Sequence[Tensor]) -> list[int]:
    found: list[int] = torch.stack(list(sums)).tolist() if sums else []
    return found
