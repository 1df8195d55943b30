"""Forward passes through a pipeline without a backward, for evaluation.

torch's schedules bind evaluation to a training schedule: V orders cannot run without a backward,
others refuse few micro-batches. Here any number runs.

Invariant: all ranks derive their steps from one sequence over the whole pipeline, in which a
message is sent and its receipt begun before what comes next; so between any two ranks messages are
sent and received in one order, and no rank waits for another in a circle.

    forward_only(modules, batch, group, "zbv", num_stages=8, hidden=torch.empty(2, 64, 128))
"""

from collections import deque
from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.parallel.stage import batch_fields
from llmtrain.planner.stages import rank_of_stage

Step = tuple[Literal["receive", "run"], int, int]
"""What to do, for which stage and which micro-batch."""

_SENDS_IN_FLIGHT = 2


def forward_steps(schedule: str, pp: int, num_stages: int, count: int) -> list[list[Step]]:
    """Plan each rank's steps for ``count`` micro-batches.

    At every tick each rank runs, of its stages whose input was there before, the one nearest to the
    loss: this keeps the fewest hidden states waiting and no rank idle that could run.

    Returns:
        The steps of each rank; after a ``run`` the output goes to the next stage.
    """
    steps: list[list[Step]] = [[] for _ in range(pp)]
    ready = {(0, number) for number in range(count)}
    while ready:
        chosen: dict[int, tuple[int, int]] = {}
        for stage, number in sorted(ready, key=lambda item: (-item[0], item[1])):
            chosen.setdefault(rank_of_stage(schedule, pp, stage), (stage, number))
        for rank, (stage, number) in sorted(chosen.items()):
            ready.remove((stage, number))
            steps[rank].append(("run", stage, number))
            if stage + 1 < num_stages:
                ready.add((stage + 1, number))
                after = rank_of_stage(schedule, pp, stage + 1)
                if after != rank:
                    steps[after].append(("receive", stage + 1, number))
    return steps


def forward_only(
    modules: Mapping[int, nn.Module],
    batch: StepBatch,
    group: dist.ProcessGroup | None,
    schedule: str,
    num_stages: int,
    hidden: Tensor,
) -> None:
    """Run every micro-batch through this rank's stages; the last stage keeps its own results.

    Args:
        modules: this rank's stages by number.
        batch: the same rows on every rank of ``group``.
        group: the ranks of the pipeline.
        schedule: which rank holds which stages.
        num_stages: stages of the whole pipeline.
        hidden: shape and dtype of what stages exchange, on the meta device.
    """
    pp = dist.get_world_size(group)
    parts = batch.microbatches()
    steps = forward_steps(schedule, pp, num_stages, len(parts))[dist.get_rank(group)]
    inputs = {(0, number): part.tokens for number, part in enumerate(parts)}
    arriving: dict[tuple[int, int], dist.Work] = {}
    sent: deque[tuple[dist.Work, Tensor]] = deque()
    for action, stage, number in steps:
        place = (stage, number)
        if action == "receive":
            inputs[place] = torch.empty_like(hidden, device=batch.tokens.device)
            source = rank_of_stage(schedule, pp, stage - 1)
            arriving[place] = _begun(dist.irecv(inputs[place], group=group, group_src=source))
            continue
        if place in arriving:
            arriving.pop(place).wait()
        output = modules[stage](inputs.pop(place), **batch_fields(parts[number]))
        if stage + 1 in modules:
            inputs[stage + 1, number] = output
        elif stage + 1 < num_stages:
            target = rank_of_stage(schedule, pp, stage + 1)
            output = output.contiguous()
            sent.append((_begun(dist.isend(output, group=group, group_dst=target)), output))
            if len(sent) > _SENDS_IN_FLIGHT:
                sent.popleft()[0].wait()
    for work, _ in sent:
        work.wait()


def _begun(work: dist.Work | None) -> dist.Work:
    if work is None:
        raise ValueError("this rank is not in the group of the pipeline")
    return work
