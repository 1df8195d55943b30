"""How long training stands still for a save, beside a synchronous save, a plain copy and torch's.

One run measures all on the same bytes, round by round, in an order that turns. A state of plain
tensors is copied before ``save`` returns; the native engine is copied while it computes the next
gradients. What is timed is how long the loop stands still: the call of ``save``, and for the engine
the wait before its update besides. Steps while a thread, or a process, writes are timed apart: on a
core of its own the writer does not slow them, on the same core it takes its share.

    python benchmarks/checkpoints.py --folder /data --json benchmarks/results/checkpoints.json
"""

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp  # noqa: TID251
import torch.multiprocessing
from reporting import commit, host, note, rounded
from torch import Tensor

from llmtrain.checkpoint import tensor_files
from llmtrain.checkpoint.archive import locate
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
from llmtrain.run.progress import Progress
from llmtrain.train.loss import pretraining_loss

BARS = {"engine / synchronous": 0.15, "plain tensors / copy": 1.3}
"""Largest ratios of medians."""
BEHIND = CheckpointConfig(keep_last=1)
AT_ONCE = CheckpointConfig(keep_last=1, asynchronous=False)

Seconds = dict[str, list[float]]


class Plain:
    """Tensors, shaped as weights and two moments."""

    def __init__(self, num_bytes: int) -> None:
        shape = (1024, 4096)
        count = max(1, num_bytes // (4 * shape[0] * shape[1]))
        self.tensors = {f"model.{i}.weight": torch.randn(shape) for i in range(count)}

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tensors = dict(state)


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def progress(step: int) -> Progress:
    return Progress(num_steps=10**9, steps=StepSchedule(8, 8), step=step)


def plain_tensors(num_bytes: int, folder: Path, rounds: int) -> tuple[Seconds, dict[str, float]]:
    """Copy, save at once, save behind, torch's save and async_save, in turn."""
    state = Plain(num_bytes)
    target = {name: torch.empty_like(tensor).zero_() for name, tensor in state.tensors.items()}
    behind = Checkpoints(folder / "behind", BEHIND, state, facts={})
    at_once = Checkpoints(folder / "at-once", AT_ONCE, state, facts={})
    behind.prepare()
    at_once.prepare()
    pending: list[Any] = []

    def copy() -> None:
        for name, tensor in state.tensors.items():
            target[name].copy_(tensor)

    def of_torch(**options: Any) -> None:
        pending.append(dcp.async_save(state.tensors, checkpoint_id=folder / "torch", **options))

    numbers = iter(range(1, 10**6))
    acts: dict[str, Callable[[], object]] = {
        "copy": copy,
        "synchronous": lambda: at_once.save(progress(next(numbers))),
        "plain tensors": lambda: behind.save(progress(next(numbers))),
        "torch save": lambda: dcp.save(state.tensors, checkpoint_id=folder / "torch"),
        "torch async_save": of_torch,
    }
    found: Seconds = {name: [] for name in [*acts, "written behind"]}
    for number in range(rounds + 1):
        for name in turned(list(acts), number):
            seconds = timed(acts[name])
            rest = timed(lambda: (behind.wait(), [future.result() for future in pending]))
            pending.clear()
            shutil.rmtree(folder / "torch", ignore_errors=True)
            if number:  # the first round fills caches
                found[name].append(seconds)
                if name == "plain tensors":
                    found["written behind"].append(seconds + rest)
        note(f"plain tensors, round {number}: " + shown(found))
    files = locate(folder / "behind").meta["files"].values()
    size = sum(t.nbytes for t in state.tensors.values())
    behind.close()
    written = sum(record["bytes"] for record in files)
    return found, {"state_bytes": size, "written_bytes": written}


def turned(names: list[str], number: int) -> list[str]:
    return names[number % len(names) :] + names[: number % len(names)]


def shown(found: Seconds) -> str:
    return ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items() if values)


@contextmanager
def an_engine(words: list[str]) -> Iterator[tuple[Any, Callable[[], float]]]:
    """The native engine, and one step of it, timed."""
    config = load("train", ["training.num_tokens=1e9", *words], RunConfig)
    with World(config.parallel, config.engine) as world:
        engine = make_engine(
            config.model, config.parallel, config.engine, world, seed=0,
            loss=pretraining_loss(2, config.engine.loss_chunk_tokens),
            optimizer_factory=optimizer_factory(config.optimizer, 0), grad_clip_norm=1.0,
        )  # fmt: skip
        shape = BatchShape(
            rows=1, sequence_length=config.training.sequence_length,
            vocab_size=config.model.vocab_size,
        )  # fmt: skip
        batch = replace(synthetic_batch(shape, 0, 0))
        limits = no_limits(world.device)
        yield engine, lambda: timed(lambda: engine.train_step(batch, 1e-4, limits))
        engine.close()


def of_engine(
    words: list[str], folder: Path, rounds: int, apart: bool
) -> tuple[Seconds, dict[str, float]]:
    """Save behind steps: what the step with the save loses, and those while files are written."""
    with an_engine(words) as (engine, step):
        checkpoints = Checkpoints(folder / "engine", BEHIND, engine, facts={})
        checkpoints.prepare()
        step()
        worker = Apart(checkpoints, folder / "apart") if apart else None
        found: Seconds = {
            "stood still": [], "step": [], "step with the save": [], "steps while writing": [],
        }  # fmt: skip
        for number in range(rounds + 1):
            undisturbed = [step() for _ in range(4)]
            usual = statistics.median(undisturbed)
            if worker is not None:
                wait, with_save, stood = worker.save(engine), 0.0, 0.0
            else:
                before = checkpoints.stalled_s
                with_save = timed(lambda n=number: checkpoints.save(progress(n + 1))) + step()
                stood = checkpoints.stalled_s - before
                wait = checkpoints._save.done.is_set  # type: ignore[union-attr]
            during = [step()]
            while not wait():
                during.append(step())
            checkpoints.wait()
            if number:
                found["stood still"].append(stood)
                found["step"].append(usual)
                found["step with the save"].append(with_save)
                found["steps while writing"].append(statistics.mean(during))
            note(
                f"engine, round {number}: stood still {stood:.3f}, step {usual:.3f}, with the save "
                f"{with_save:.3f}, while writing {statistics.mean(during):.3f} x {len(during)}"
            )
        size = sum(p.num_bytes for p in checkpoints._writer.file.pieces)  # type: ignore[union-attr]
        checkpoints.close()
    return found, {"state_bytes": size}


class Apart:
    """A process of its own that writes what is staged, for comparison with a thread."""

    def __init__(self, checkpoints: Checkpoints, path: Path) -> None:
        staging, file = checkpoints._writer.staging, checkpoints._writer.file
        if staging is None or file is None:
            raise RuntimeError("prepare() comes first")
        staging._touching.join()
        starts = [value.data_ptr() - staging._memory.data_ptr() for value in staging.values]
        staging._memory.share_memory_()
        staging.values = [
            staging._memory[start : start + piece.num_bytes].view(piece.dtype).view(piece.shape)
            for piece, start in zip(file.pieces, starts, strict=True)
        ]
        pieces = [(piece.before, piece.after, piece.num_bytes) for piece in file.pieces]
        spawn = torch.multiprocessing.get_context("spawn")
        self._staging, (self._pipe, theirs) = staging, spawn.Pipe()
        spawn.Process(
            target=_serve, args=(theirs, path, staging._memory, pieces), daemon=True
        ).start()
        self._pipe.recv()

    def save(self, engine: Any) -> Callable[[], bool]:
        self._staging.copy(engine.state_dict())
        self._pipe.send("write")
        return lambda: self._pipe.poll() and bool(self._pipe.recv())


def _serve(pipe: Any, path: Path, memory: Tensor, pieces: list[tuple[bytes, bytes, int]]) -> None:
    content = memory.numpy().data

    def parts() -> Iterator[bytes | memoryview]:
        start = 0
        for before, after, size in pieces:
            yield before
            yield content[start : start + size]
            yield after
            start += -(-size // 64) * 64

    pipe.send("ready")
    while pipe.recv():
        tensor_files.write_bytes(path, parts())
        pipe.send("written")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=12, help="of the engine's model, 7 M each")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(arguments.threads)
    words = [
        "model=llama_demo", "model.hidden_size=768", "model.intermediate_size=2048",
        "model.num_attention_heads=12", "model.num_key_value_heads=12", "model.vocab_size=8192",
        f"model.num_hidden_layers={arguments.layers}", "training.sequence_length=32",
        "training.global_batch_tokens=32", "engine.device=cpu",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=arguments.folder) as name:
        folder = Path(name)
        seconds, sizes = plain_tensors(int(arguments.gb * 1e9), folder, arguments.rounds)
        engine, engine_sizes = of_engine(words, folder, arguments.rounds, apart=False)
        apart, _ = of_engine(words, folder, arguments.rounds, apart=True)
    report = summary(seconds, sizes, engine, engine_sizes, apart)
    report |= {"threads": arguments.threads, "machine": host(), "commit": commit()}
    text = json.dumps(rounded(report), indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    print(text)
    missed = [name for name, bar in BARS.items() if report["ratios"][name] > bar]
    for name in missed:
        note(f"{name} is {report['ratios'][name]:.3f}, beyond {BARS[name]}")
    return 1 if missed else 0


def summary(
    seconds: Seconds, sizes: dict[str, float], engine: Seconds, engine_sizes: dict[str, float],
    apart: Seconds,
) -> dict[str, Any]:  # fmt: skip
    """Medians, and ratios; the engine's are brought to the bytes of the plain tensors."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    middle |= {name: statistics.median(values) for name, values in engine.items()}
    scale = sizes["state_bytes"] / engine_sizes["state_bytes"]
    written, usual = sizes["written_bytes"], statistics.median(apart["step"])
    return {
        "seconds": middle,
        "ratios": {
            "plain tensors / copy": middle["plain tensors"] / middle["copy"],
            "plain tensors / synchronous": middle["plain tensors"] / middle["synchronous"],
            "plain tensors / torch save": middle["plain tensors"] / middle["torch save"],
            "engine / synchronous": middle["stood still"] * scale / middle["synchronous"],
            "engine / torch save": middle["stood still"] * scale / middle["torch save"],
            "torch async_save / torch save": middle["torch async_save"] / middle["torch save"],
            "plain tensors / torch async_save": middle["plain tensors"]
            / middle["torch async_save"],
            "synchronous / torch save": middle["synchronous"] / middle["torch save"],
            "written / least": written / sizes["state_bytes"],
            "step while a thread writes": middle["steps while writing"] / middle["step"],
            "step while a process writes": statistics.median(apart["steps while writing"]) / usual,
        },
        "state_bytes": sizes["state_bytes"],
        "engine_state_bytes": engine_sizes["state_bytes"],
    }


if __name__ == "__main__":
    sys.exit(main())
