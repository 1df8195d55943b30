"""The largest attention logit of every layer, at chosen steps: what grows before attention fails.

At a chosen step the batch that was trained on runs forward once more, after the update and without
gradients, while each attention also scores SAMPLED_QUERIES queries of every row, spread evenly,
against all the keys they see: q.k / sqrt(H), before the softmax and before a softcap. For those
queries the maximum is exact, over all heads, rows and ranks. Under tensor parallelism each rank has
its own heads, under context parallelism keys are gathered, compiled blocks run uncompiled.

Invariant: no bit of a step depends on whether it was chosen, and on steps that are not, nothing of
this runs.

    logits = AttentionLogits(world, engine, every_steps=100, compiled=False, report=add)
    batches = logits.watching(batches)      # what the loop pulls from
    hooks.insert(0, logits)                 # on every rank, before the metrics hook
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import StepResult
from llmtrain.model.layers import Attention
from llmtrain.ops.attention.spec import AttentionFunction, AttentionSpec
from llmtrain.parallel.collectives import gather_along
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress
from llmtrain.train.loop import BatchSource

SAMPLED_QUERIES = 128
"""Queries of a row that are scored; of a shorter row all."""


class Scored(Protocol):
    """The part of an engine that is asked."""

    def eval_step(self, batch: StepBatch) -> StepResult:
        """Forward only; every rank calls it."""
        ...

    def stages(self) -> Sequence[nn.Module]:
        """Parts of the model on this rank."""
        ...


class AttentionLogits:
    """Hook on every rank, and what hands it the batches of chosen steps."""

    def __init__(
        self,
        world: World,
        engine: Scored,
        *,
        every_steps: int,
        compiled: bool,
        report: Callable[[Mapping[str, Any], float], None] | None,
    ) -> None:
        """Score every ``every_steps`` steps; ``report`` takes the field and the seconds.

        ``compiled`` blocks are run uncompiled, as they are written.
        """
        self._world = world
        self._engine = engine
        self._every_steps = every_steps
        self._compiled = compiled
        self._report = report
        self._batch: StepBatch | None = None

    def watching(self, source: BatchSource) -> BatchSource:
        """Give the batches of ``source`` and keep those of chosen steps."""
        return _Watching(self, source)

    def keep(self, step: int, batch: StepBatch) -> None:
        """Keep the batch of 0-based ``step`` where that is chosen."""
        self._batch = batch if (step + 1) % self._every_steps == 0 else None

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Score the batch of a chosen step; every rank calls it."""
        if self._batch is None:
            return
        result.applied.item()  # the training steps before are not counted as time of this
        started = time.perf_counter()
        batch, self._batch = self._batch, None
        parts = self._world.collect(self._largest(batch))
        if parts is None or self._report is None:
            return
        found: dict[int, float] = {}
        for part in parts:
            for layer, value in part.items():
                found[layer] = max(found.get(layer, -math.inf), value)
        row = {str(layer): found[layer] if math.isfinite(found[layer]) else None
               for layer in sorted(found)}  # fmt: skip
        self._report({"attention_logit_max": row}, time.perf_counter() - started)

    def _largest(self, batch: StepBatch) -> dict[int, float]:
        """Largest logit of the layers on this rank."""
        attentions = [
            module
            for stage in self._engine.stages()
            for module in stage.modules()
            if isinstance(module, Attention)
        ]
        found: dict[int, Tensor] = {}
        with _recording(attentions, found, self._world), ExitStack() as eager:
            if self._compiled:
                eager.enter_context(torch.compiler.set_stance("force_eager"))
            self._engine.eval_step(replace(batch, row_ids=None))  # asks for no losses again
        return {layer: value.item() for layer, value in found.items()}


class _Watching:
    def __init__(self, logits: AttentionLogits, source: BatchSource) -> None:
        self._logits = logits
        self._source = source

    def at(self, step: int) -> StepBatch:
        batch = self._source.at(step)
        self._logits.keep(step, batch)
        return batch


@contextmanager
def _recording(
    attentions: Sequence[Attention], found: dict[int, Tensor], world: World
) -> Iterator[None]:
    """Have ``attentions`` put their largest logit into ``found``."""
    plain = [attention.attention for attention in attentions]
    for attention, function in zip(attentions, plain, strict=True):
        attention.attention = _scored(function, attention.layer, found, world)
    try:
        yield
    finally:
        for attention, function in zip(attentions, plain, strict=True):
            attention.attention = function


def _scored(
    function: AttentionFunction, layer: int, found: dict[int, Tensor], world: World
) -> AttentionFunction:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | None]:
        largest = largest_logit(q, k, spec, world)
        found[layer] = torch.maximum(found[layer], largest) if layer in found else largest
        return function(q, k, v, spec)

    return attend


@torch.no_grad()
def largest_logit(q: Tensor, k: Tensor, spec: AttentionSpec, world: World) -> Tensor:
    """Largest q.k / sqrt(H) of sampled queries over the keys they see, fp32 scalar.

    Args:
        q: queries of this rank, [B, S, N, H].
        k: keys of this rank, [B, S, G, H]; with context parallelism those of the others are
            fetched.
        spec: who sees whom.
        world: its axis ``cp`` holds the rest of the rows.
    """
    group = world.group("cp")
    positions, documents = spec.kv_positions, spec.kv_document_ids
    if group is not None:
        k, positions, documents = (gather_along(x, 1, group) for x in (k, positions, documents))
    length = q.shape[1]
    chosen = torch.linspace(0, length - 1, min(SAMPLED_QUERIES, length), device=q.device).long()
    seen_by = AttentionSpec(
        q_positions=spec.q_positions[:, chosen], q_document_ids=spec.q_document_ids[:, chosen],
        kv_positions=positions, kv_document_ids=documents, sliding_window=spec.sliding_window,
    )  # fmt: skip
    groups, width = k.shape[2], q.shape[-1]
    grouped = torch.unflatten(q[:, chosen], 2, (groups, -1)).float()
    scores = torch.einsum("bqgmh,btgh->bgmqt", grouped, k.float()) / math.sqrt(width)
    return scores.masked_fill_(~seen_by.mask[:, :, None], -math.inf).max()
