"""Speed of the native engine beside loops written by hand and beside DeepSpeed's ZeRO.

All train the same model on the same batches with the same number of threads. One process: plain
PyTorch, ZeRO 0 and 1. Several: plain FSDP2 and ZeRO 3. The native engine is paired with each in
turn: a pair is some steps of one and as many of the other, the order alternating, so that a busy
machine slows both alike; what counts is the median of the pairs' ratios.

Time is CPU time of all ranks unless ``--wall``: on a shared machine the clock on the wall measures
the neighbours.

    python benchmarks/engines.py --json benchmarks/results/engines_1.json
    torchrun --nproc-per-node 2 benchmarks/engines.py --json benchmarks/results/engines_2.json
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251
import torch.nn.functional as F
from reporting import commit, host
from torch.distributed.fsdp import fully_shard  # noqa: TID251

from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.load import load
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.run import RunConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import World
from llmtrain.train.loss import pretraining_loss

Step = Callable[[StepBatch], object]

BARS = {"plain": 0.97, "zero": 1.0}
"""Least median ratio of speeds, native over the other."""


def plain(config: RunConfig, world: World) -> Step:
    """The loop one would write by hand: accumulation, a loss over all targets, clipping, AdamW."""
    model = Transformer(config.model)
    initialize_model(model, config.model, seed=0)
    sharded = world.world_size > 1
    if sharded:
        for block in model.model.layers.values():
            fully_shard(block)
        fully_shard(model)
    end_in_logits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def step(batch: StepBatch) -> None:
        weight = batch.loss_weight.sum()
        if sharded:
            dist.all_reduce(weight)
        optimizer.zero_grad()
        parts = batch.microbatches()
        for number, part in enumerate(parts, start=1):
            if sharded:
                model.set_requires_gradient_sync(number == len(parts))
            logits = model(part.tokens, part.positions, part.document_ids)
            losses = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none")
            loss = (losses * part.loss_weight.flatten()).sum() * (world.world_size / weight)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def end_in_logits(model: Transformer) -> None:
    """Have the model's forward end in logits, so that FSDP2 has gathered the head for it."""
    hidden = model.forward
    model.forward = lambda *inputs: model.logits(hidden(*inputs))  # type: ignore[method-assign]


def engine(config: RunConfig, world: World, settings: EngineConfig) -> Step:
    """An engine of llmtrain, without data loading."""
    made = make_engine(
        config.model, ParallelConfig(dp_shard=world.world_size), settings, world, seed=0,
        loss=pretraining_loss(2, config.engine.loss_chunk_tokens),
        optimizer_factory=optimizer_factory(config.optimizer), grad_clip_norm=1.0,
    )  # fmt: skip
    limits = no_limits(world.device)
    return lambda batch: made.train_step(batch, 1e-3, limits)


def zero(stage: int) -> EngineConfig:
    """DeepSpeed at ``stage``, nothing else set."""
    return EngineConfig(kind="deepspeed", device="cpu", deepspeed=DeepSpeedConfig(zero_stage=stage))


def timed(step: Step, batches: list[StepBatch], world: World, wall: bool) -> float:
    """Seconds per step: CPU time summed over the ranks, or the slowest rank's on the wall."""
    world.barrier()
    clock = time.perf_counter if wall else time.process_time
    start = clock()
    for batch in batches:
        step(batch)
    seconds = torch.tensor((clock() - start) / len(batches), dtype=torch.float64)
    if world.world_size > 1:
        reduction = dist.ReduceOp.MAX if wall else dist.ReduceOp.SUM
        dist.all_reduce(seconds, op=reduction)
    return seconds.item()


def compare(
    native: Step, other: Step, batches: list[StepBatch], world: World, options: argparse.Namespace
) -> dict[str, float]:
    """Run both in pairs; the first pair warms up."""
    ratios, seconds = [], {"native": [], "other": []}
    for number in range(options.pairs + 1):
        order = [("native", native), ("other", other)]
        pair = {
            name: timed(step, batches, world, options.wall)
            for name, step in (order if number % 2 else reversed(order))
        }
        if number:
            ratios.append(pair["other"] / pair["native"])
            for name, value in pair.items():
                seconds[name].append(value)
    medians = {f"{name}_ms": statistics.median(v) * 1e3 for name, v in seconds.items()}
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)} | medians


def machine() -> dict[str, object]:
    """What the figures were measured on and with."""
    return {
        **host(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "commit": commit(),
        "command": " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of one side of a pair")
    parser.add_argument("--rows", type=int, default=4, help="rows of a rank, one micro-batch")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--only", help="plain or zero")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with World(ParallelConfig(), EngineConfig(kind="deepspeed", device="cpu")) as world:
        torch.set_num_threads(1)
        rows = options.rows * world.world_size
        config = load(
            "train",
            [
                "model=llama_demo", "training.num_tokens=1e6", "training.sequence_length=256",
                f"training.global_batch_tokens={256 * rows}", *options.overrides,
                f"training.micro_batch_size={options.rows}",
            ],
            RunConfig,
        )  # fmt: skip
        shape = BatchShape(
            rows=rows,
            sequence_length=config.training.sequence_length,
            vocab_size=config.model.vocab_size,
        )
        whole = [synthetic_batch(shape, 0, number) for number in range(options.steps)]
        batches = [rank_rows(b, world.dp_rank, world.dp_size, options.rows) for b in whole]
        native = engine(config, world, EngineConfig(device="cpu"))
        several = world.world_size > 1
        others: dict[str, Callable[[], Step]] = {
            "plain FSDP2" if several else "plain": lambda: plain(config, world)
        }
        for stage in (3,) if several else (0, 1):
            others[f"zero {stage}"] = lambda stage=stage: engine(config, world, zero(stage))
        results = {}
        for name, make in others.items():
            if options.only is None or name.startswith(options.only):
                results[name] = compare(native, make(), batches, world, options)
        if world.rank == 0:
            report(results, world.world_size, options.wall)
            if options.json is not None:
                facts = {"ranks": world.world_size, "clock": "wall" if options.wall else "CPU"}
                text = json.dumps({"machine": machine(), **facts, "pairs": results}, indent=2)
                options.json.write_text(text + "\n")


def report(results: dict[str, dict[str, float]], ranks: int, wall: bool) -> None:
    """Print the table."""
    print(f"{ranks} rank(s), {'wall' if wall else 'CPU'} time per step in ms\n")
    print("| beside | native | other | native is faster by (median) | pairs | bar |")
    print("|---|---|---|---|---|---|")
    for name, r in results.items():
        bar = BARS[name.split()[0]]
        print(
            f"| {name} | {r['native_ms']:.1f} | {r['other_ms']:.1f} | {r['ratio']:.3f} "
            f"| {r['least']:.3f} to {r['most']:.3f} | {bar} |"
        )


if __name__ == "__main__":
    main()
