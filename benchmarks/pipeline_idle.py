"""Idle fraction of every pipeline schedule, measured on ranks that sleep, against its theory.

Four ranks run torch's schedules through the project's own ``Pipeline``. Instead of computing, a
stage sleeps a fixed time in its forward, as long for the gradient of its input and as long for
those of its weights, so two cores are enough. A rank's stages share ``--unit`` seconds, so every
schedule has the same work. Idle = 1 - time asleep / (ranks x time from first to last operation).

Theory: the schedule's own table of operations, each rank's in its order, at no cost but the sleeps.
What the operating system delays only adds to idleness: the best of ``--repeat`` steps counts, and
``--realtime`` (root) wakes ranks before what else runs on the machine.

    torchrun --nproc-per-node 4 benchmarks/pipeline_idle.py --plot docs/images/pipeline_idle.svg
"""

import argparse
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import SEVERAL_STAGES, ParallelConfig, Schedule
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.parallel.mesh import World
from llmtrain.parallel.pipeline import SCHEDULES, Pipeline
from llmtrain.parallel.stage import StageModule
from llmtrain.planner.activations import bubble
from llmtrain.planner.stages import stages_of_rank

FORMULAS: dict[Schedule, str] = {
    "gpipe": "(p-1)/(m+p-1)",
    "1f1b": "(p-1)/(m+p-1)",
    "interleaved_1f1b": "(p-1)/(vm+p-1)",
    "interleaved_zero_bubble": "(p-1)/(3vm+p-1)",
    "zbv": "(p-1)/(6m+p-1)",
    "dualpipev": "(p-1)/(3m+p-1)",
}
"""Idle fraction where a forward and both parts of a backward take equal times.

The last follows from (p-1)(F&B + B - 3W) with F&B = F + B: torch runs such a pair one after the
other and sends both results at its end.
"""
COLORS = {"F": "#4c78a8", "I": "#f58518", "W": "#54a24b"}


class Operation(NamedTuple):
    kind: str  # F: forward, I: gradient of the input, W: gradients of the weights, B: I and W
    stage: int
    microbatch: int


Action = tuple[Operation, ...]
"""What a rank does before it sends anything: one operation, or a pair in DualPipeV."""


class Slept(NamedTuple):
    kind: str
    stage: int
    start: float
    end: float


def operations(schedule: str, p: int, m: int, v: int) -> list[list[Action]]:
    """Give each rank's actions in order, from the table that torch's runtime executes."""
    if schedule == "1f1b":  # torch's table is a drawing: its runtime holds the order in a loop
        return [_one_forward_one_backward(rank, p, m) for rank in range(p)]
    stages: list[Any] = [
        SimpleNamespace(group_size=p, group_rank=0, num_stages=p * v, submod=None) for _ in range(v)
    ]
    made = SCHEDULES[schedule](
        stages if schedule in SEVERAL_STAGES else stages[0], n_microbatches=m, loss_fn=torch.sum
    )
    return [
        [
            tuple(
                Operation(part.computation_type.value, part.stage_index, part.microbatch_index)
                for part in action.sub_actions or (action,)
            )
            for action in made.pipeline_order[rank]
            if action is not None and action.computation_type.value != "REDUCE_GRAD"
        ]
        for rank in range(p)
    ]


def _one_forward_one_backward(rank: int, p: int, m: int) -> list[Action]:
    ahead = min(m, p - rank)
    order = [Operation("F", rank, number) for number in range(ahead)]
    for number in range(m):
        order.append(Operation("B", rank, number))
        if ahead + number < m:
            order.append(Operation("F", rank, ahead + number))
    return [(op,) for op in order]


def parts_of(operation: Operation) -> str:
    """Which sleeps an operation has; torch runs the first stage's whole backward as its W."""
    if operation.kind in "IW" and operation.stage == 0:
        return "" if operation.kind == "I" else "IW"
    return "IW" if operation.kind == "B" else operation.kind


def table_idle(order: Sequence[Sequence[Action]]) -> float:
    """Run every rank's actions in order, each operation as soon as its input is there."""
    last = max(op.stage for actions in order for action in actions for op in action)
    ended: dict[Operation, int] = {}  # B stands as I: the gradient of the input is there
    clock, done = [0] * len(order), [0] * len(order)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(order):
            while done[rank] < len(actions):
                action = actions[done[rank]]
                results = [op._replace(kind="I") if op.kind == "B" else op for op in action]
                needed = [set(_needed(op, last)) - set(results) for op in action]
                if not all(one in ended for some in needed for one in some):
                    break
                for op, inputs in zip(action, needed, strict=True):
                    start = max([clock[rank], *(ended[one] for one in inputs)])
                    clock[rank] = start + len(parts_of(op))
                ended.update(dict.fromkeys(results, clock[rank]))
                done[rank] += 1
                moved = True
    if done != [len(actions) for actions in order]:
        raise ValueError("the table waits for itself")
    busy = sum(len(parts_of(op)) for actions in order for action in actions for op in action)
    return 1 - busy / (len(order) * max(clock))


def _needed(op: Operation, last: int) -> list[Operation]:
    """What must have ended before ``op``."""
    if op.kind == "F":
        return [op._replace(stage=op.stage - 1)] if op.stage else []
    if op.kind == "W":
        return [op._replace(kind="I")]
    later = [op._replace(kind="I", stage=op.stage + 1)] if op.stage < last else []
    return [op._replace(kind="F"), *later]


class _Part(torch.autograd.Function):
    """Passes its input on; sleeps in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "Sleeper", kinds: str) -> Tensor:
        ctx.stage, ctx.kinds = stage, kinds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for kind in ctx.kinds:
            ctx.stage.sleep(kind)
        return grad, None, None


class Sleeper(nn.Module):
    """A stage's transformer that only takes time."""

    def __init__(self, number: int, width: int, log: list[Slept]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.head = nn.Identity()
        self.number, self.width, self.log = number, width, log
        self.seconds = 0.0

    def sleep(self, kind: str) -> None:
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.log.append(Slept(kind, self.number, start, time.perf_counter()))

    def forward(self, x: Tensor, *_: Tensor, **__: object) -> Tensor:
        self.sleep("F")
        if self.number == 0:
            hidden = torch.zeros(*x.shape, self.width)
            return hidden + _Part.apply(self.weight, self, "IW")
        return _Part.apply(x, self, "I") + _Part.apply(self.weight, self, "W")


def _loss(hidden: Tensor, head: nn.Module, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return head(hidden).sum(), {}


def measure(
    world: World, schedule: str, m: int, v: int, unit: float, repeat: int
) -> list[list[Slept]]:
    """Run steps; give the sleeps of every rank in the one that idled least."""
    log: list[Slept] = []
    p, width = world.axes.pp, 4
    numbers = stages_of_rank(schedule, p, world.pp_rank, v)
    sleepers = [Sleeper(number, width, log) for number in numbers]
    modules: list[Any] = [
        StageModule(sleeper, _loss if number == p * v - 1 else None)  # type: ignore[arg-type]
        for number, sleeper in zip(numbers, sleepers, strict=True)
    ]
    pipeline = Pipeline(modules, numbers, p * v, world, schedule, width, torch.float32)
    shape = BatchShape(rows=m, sequence_length=8, vocab_size=11)
    batch = rank_rows(synthetic_batch(shape, seed=0, step=0), 0, 1, micro_batch_size=1)
    runs = []
    for seconds in (0.0, *[unit / v] * repeat):  # the first only connects the ranks
        for sleeper in sleepers:
            sleeper.seconds = seconds
        log.clear()
        world.barrier()
        pipeline.run(batch, training=True)
        runs.append([world.share(list(log), rank) for rank in range(p)])
    return min(runs[1:], key=idle_fraction)


def idle_fraction(logs: Sequence[Sequence[Slept]]) -> float:
    start = min(one.start for log in logs for one in log)
    end = max(one.end for log in logs for one in log)
    busy = sum(one.end - one.start for log in logs for one in log)
    return 1 - busy / (len(logs) * (end - start))


def drawing(rows: Sequence[tuple[str, str, list[list[Slept]]]]) -> str:
    """Draw the measured operations of each schedule, rank under rank, on one scale of time."""
    spans = [max(one.end for log in logs for one in log) -
             min(one.start for log in logs for one in log) for _, _, logs in rows]  # fmt: skip
    left, top, lane, gap, width = 20, 34, 13, 34, 900
    scale = width / max(spans)
    height = top + sum(len(logs) * lane + gap for _, _, logs in rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 2 * left}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    words = {"F": "forward", "I": "backward of inputs", "W": "backward of weights"}
    for position, (kind, word) in enumerate(words.items()):
        x = left + 170 * position
        out.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{COLORS[kind]}"/>')
        out.append(f'<text x="{x + 18}" y="18" fill="#222222">{word}</text>')
    y = top
    for name, note, logs in rows:
        out.append(f'<text x="{left}" y="{y + 12}" fill="#222222">{name}: {note}</text>')
        begin = min(one.start for log in logs for one in log)
        for rank, log in enumerate(logs):
            for one in log:
                x, size = left + (one.start - begin) * scale, (one.end - one.start) * scale
                out.append(
                    f'<rect x="{x:.1f}" y="{y + 17 + rank * lane}" width="{size - 0.5:.1f}" '
                    f'height="{lane - 2}" fill="{COLORS[one.kind]}"/>'
                )
        y += len(logs) * lane + gap
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--microbatches", type=int, default=8, metavar="M")
    parser.add_argument("--unit", type=float, default=1.0, help="seconds of a rank's forward")
    parser.add_argument("--repeat", type=int, default=3, help="steps of each schedule")
    parser.add_argument("--realtime", action="store_true", help="run under SCHED_FIFO")
    parser.add_argument("--plot", type=Path, help="where to write the drawing, SVG")
    options = parser.parse_args()
    if options.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    logging.getLogger("torch").setLevel(logging.ERROR)
    m, rows = options.microbatches, []
    with World(ParallelConfig(pp=4, dp_shard=1), EngineConfig(device="cpu")) as world:
        p = world.axes.pp
        if world.rank == 0:
            print(f"p = {p} ranks, m = {m} micro-batches, v stages per rank\n")
            print("| schedule | v | formula | closed form | table | measured | off |")
            print("|---|---|---|---|---|---|---|")
        for schedule, formula in FORMULAS.items():
            layout = ParallelConfig(pp=p, schedule=schedule)
            v = layout.num_stages_per_rank
            theory = table_idle(operations(schedule, p, m, v))
            logs = measure(world, schedule, m, v, options.unit, options.repeat)
            idle = idle_fraction(logs)
            rows.append((schedule, f"idle {idle:.1%}, in theory {theory:.1%}", logs))
            if world.rank == 0:
                print(
                    f"| `{schedule}` | {v} | {formula} | {bubble(layout, m):.4f} "
                    f"| {theory:.4f} | {idle:.4f} | {idle / theory - 1:+.1%} |",
                    flush=True,
                )
        if world.rank == 0 and options.plot is not None:
            options.plot.write_text(drawing(rows))


if __name__ == "__main__":
    main()
