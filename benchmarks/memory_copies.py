"""What copies in the memory of two nodes cost the training, and how fast a run goes on from them.

Two ranks of FSDP2 stand for two nodes on this machine: each writes its half of the state and sends
it to the other over a socket. Round by round, in an order that turns, a step is saved to disk, to
memory, and to both; what is timed is how long the loop stands still (the call of ``save`` and the
wait before the next update), the steps while the save is on its way, and the seconds until it is
committed. Then the same state is loaded from disk (its pages dropped before), from memory, and from
memory after one node has lost its copy.

    python benchmarks/memory_copies.py --json benchmarks/results/memory_copies.json
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251
import torch.multiprocessing
from reporting import commit, host, note, rounded

from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.config.load import load
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.run import RunConfig
from llmtrain.config.training import CheckpointConfig
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from llmtrain.train.loss import pretraining_loss

NODES = ("one", "two")
KINDS = ("disk", "memory", "both")
Seconds = dict[str, list[float]]


def timed(act: Callable[[], object]) -> float:
    dist.barrier()
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


class Bench:
    """One rank: an engine and the checkpoints of its runs."""

    def __init__(self, world: World, config: RunConfig, folder: Path) -> None:
        self.folder = folder
        self.node = NODES[world.rank]
        self.engine = make_engine(
            config.model, config.parallel, config.engine, world, seed=0,
            loss=pretraining_loss(2, config.engine.loss_chunk_tokens),
            optimizer_factory=optimizer_factory(config.optimizer, 0), grad_clip_norm=1.0,
        )  # fmt: skip
        shape = BatchShape(
            rows=1, sequence_length=config.training.sequence_length,
            vocab_size=config.model.vocab_size,
        )  # fmt: skip
        self.batch = synthetic_batch(shape, world.rank, 0)
        self.limits = no_limits(world.device)
        self.found: Seconds = {}

    def step(self) -> float:
        return timed(lambda: self.engine.train_step(self.batch, 1e-4, self.limits))

    def checkpoints(self, kind: str) -> Checkpoints:
        memory = {"memory_every_steps": 1, "memory_dir": str(self.folder / "shm")}
        config = CheckpointConfig(
            every_steps=10**6 if kind == "memory" else 1, keep_last=1,
            **({} if kind == "disk" else memory),  # type: ignore[arg-type]
        )  # fmt: skip
        directory = self.folder / kind / "checkpoints"
        return Checkpoints(directory, config, self.engine, facts={}, node=self.node)

    def save(self, kind: str, made: Checkpoints, numbers: Iterator[int]) -> None:
        """Save behind four steps, and once more with nothing beside it."""
        usual = statistics.median(self.step() for _ in range(4))
        before = made.stalled_s
        made.save(progress(next(numbers)))
        steps = [self.step() for _ in range(4)]
        self.add(f"{kind}: stood still", made.stalled_s - before)
        self.add(f"{kind}: four steps beside it", sum(steps) / (4 * usual))
        made.wait()
        self.add(f"{kind}: until committed", timed(lambda: saved(made, next(numbers))))
        self.add("a step", usual)

    def restore(self, kind: str, label: str) -> None:
        made = self.checkpoints(kind)
        self.add(label, timed(lambda: made.restore(progress(0))))
        made.close()

    def add(self, name: str, value: float) -> None:
        self.found.setdefault(name, []).append(value)


def saved(made: Checkpoints, step: int) -> None:
    made.save(progress(step))
    made.wait()


def progress(step: int) -> Progress:
    return Progress(num_steps=10**9, steps=StepSchedule(8, 8), step=step)


def drop_pages(folder: Path) -> None:
    """Have the files below ``folder`` read from the disk."""
    for path in folder.rglob("*.distcp"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(rank: int, config: RunConfig, folder: Path, rounds: int, answer: Any) -> None:
    """The body of one rank."""
    torch.set_num_threads(1)
    place = Place(
        rank=rank, world_size=2, local_rank=rank, local_world_size=2,
        store=dist.FileStore(str(folder / "store"), 2),
    )  # fmt: skip
    with World(config.parallel, config.engine, place) as world:
        bench, numbers = Bench(world, config, folder), iter(range(1, 10**6))
        runs = {kind: bench.checkpoints(kind) for kind in KINDS}
        for made in runs.values():
            made.restore(progress(0))
            made.prepare()
        bench.step()
        for number in range(rounds + 1):
            for turn in range(len(KINDS)):
                kind = KINDS[(turn + number) % len(KINDS)]
                bench.save(kind, runs[kind], numbers)
            if not number:
                bench.found.clear()  # the first round fills caches
        for made in runs.values():
            made.close()
        for _ in range(rounds):
            drop_pages(folder / "disk")
            bench.restore("disk", "restore from disk")
            bench.restore("memory", "restore from memory")
        lose_copy(bench, rounds)
        files = next((folder / "disk").rglob("meta.json"))
        size = sum(r["bytes"] for r in json.loads(files.read_text())["files"].values())
        if rank == 0:
            answer.put((bench.found, size))
        bench.engine.close()


def lose_copy(bench: Bench, rounds: int) -> None:
    for _ in range(rounds):
        dist.barrier()
        if bench.node == NODES[1]:
            for path in bench.folder.glob("shm/*-memory-*/two"):
                shutil.rmtree(path)
        bench.restore("memory", "restore from memory, a node lost")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4, help="of the model, 7 M each")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = load("train", [
        "training.num_tokens=1e9", "model=llama_demo", "model.hidden_size=768",
        "model.intermediate_size=2048", "model.num_attention_heads=12",
        "model.num_key_value_heads=12", "model.vocab_size=8192",
        f"model.num_hidden_layers={arguments.layers}", "training.sequence_length=64",
        "training.global_batch_tokens=128", "engine.device=cpu", "parallel.dp_shard=2",
    ], RunConfig)  # fmt: skip
    spawn = torch.multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    with (
        tempfile.TemporaryDirectory(prefix="copies-", dir=arguments.folder) as name,
        tempfile.TemporaryDirectory(prefix="copies-", dir=arguments.memory) as memory,
    ):
        folder = Path(name)
        (folder / "shm").symlink_to(memory)
        note("two ranks begin")
        ranks = [
            spawn.Process(target=measure, args=(rank, config, folder, arguments.rounds, answer))
            for rank in range(2)
        ]  # fmt: skip
        for rank in ranks:
            rank.start()
        found, size = answer.get(timeout=900)
        for rank in ranks:
            rank.join()
    middle = {label: statistics.median(values) for label, values in sorted(found.items())}
    report: dict[str, Any] = {"median": middle}
    report["range"] = {label: [min(values), max(values)] for label, values in found.items()}
    report |= {"state_bytes": size, "rounds": arguments.rounds}
    report |= {"machine": host(), "commit": commit()}
    text = json.dumps(rounded(report), indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
