"""A run of several ranks that is hit again and again; for tests and benchmarks/chaos.py.

The driver does what a cluster does: it starts the same command until the run says that it is done,
and where one rank has ended it ends the others. What it then holds is a run that must be, bit by
bit, the one nobody has touched.

    storm = Storm(folder, LAYOUTS["fsdp4"], seed=0, num_steps=60, poisoned=[25])
    hits = [storm.hit(fault) for fault in ("kill one", "flip", POISON, "supervisor")]
    storm.finish()
    assert storm.differences() == []
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain import json_lines
from llmtrain.checkpoint import archive
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.data.plan import plan_of
from llmtrain.data.store import TokenStore
from tests.end_to_end.commands import TINY, Command, losses, saved_state, status, steps
from tests.end_to_end.poison import spoil, write_documents

SAVE_EVERY = 5
HANG_S = 4.0
END_S = 2.0
"""Ranks whose peer has died get so long to end by themselves; a launcher gives them no more."""
DISK = "48m"
"""Size of the disk of a run that fills it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is cut."""

    ranks: int
    words: tuple[str, ...]
    deepspeed: bool = False


LAYOUTS = {
    "dp2 pp2": Layout(4, ("parallel.pp=2", "parallel.dp_shard=2")),
    "fsdp4": Layout(4, ("parallel.dp_shard=4",)),
    "zero2": Layout(4, ("engine=deepspeed", "engine.deepspeed.zero_stage=2"), deepspeed=True),
}
PROCESSES = ("kill one", "kill all", "terminate", "hang", "kill in a save", "supervisor")
"""Faults of processes."""
FILES = ("truncate", "flip", "missing file")
"""Faults of the newest checkpoint, found when the run starts again."""
FULL_DISK = "full disk"
"""Needs a mount, and so root."""
POISON = "poisoned batch"
"""No number comes out of it; the run goes back and leaves it out."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault and what it cost."""

    fault: str
    at_step: int
    """Newest step when it struck."""
    back_at_step: int
    """Step the run went on from."""

    @property
    def steps_lost(self) -> int:
        """Steps that were made twice."""
        return max(0, self.at_step - self.back_at_step)


class Storm:
    """One run under faults, and its undisturbed twin."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        seed: int,
        num_steps: int,
        poisoned: Sequence[int] = (),
        own_disk: bool = False,
    ) -> None:
        """Make the data, with the batches of steps ``poisoned``, which lie far apart, spoilt.

        ``own_disk`` puts the run on a small file system of its own.
        """
        self.folder = folder
        self.layout = layout
        self._draw = random.Random(seed)
        self._num_steps = num_steps
        self._runs = folder / "disk"
        self._runs.mkdir(parents=True)
        self._mounted = own_disk
        if own_disk:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self._runs)]
            subprocess.run(mount, check=True)
        self.run = self._runs / "storm"
        self._running: Command | None = None
        self._num_poisons = 0
        self._make_data(poisoned)

    @property
    def _command(self) -> Command:
        """The run where it runs."""
        if self._running is None:
            raise AssertionError("the run is not running")
        return self._running

    def close(self) -> None:
        """End what runs and give the disk back."""
        if self._running is not None:
            self._running.kill()
        if self._mounted:
            subprocess.run(["umount", "-l", str(self._runs)], check=True)

    def hit(self, fault: str) -> Hit:
        """Let the run make some steps, strike, and let it come back."""
        if fault == POISON:
            return self._meet_poison(self._under_way())
        struck = _STRIKES[fault](self, self._under_way())
        ended = self._running is None
        back = self._begin() if ended else struck
        return Hit(fault, struck, back)

    def finish(self) -> None:
        """Let the run come to its end."""
        if self._running is None:
            self._begin()
        self._settle(self._command)
        if status(self.run)["reason"] != "done":
            raise AssertionError((self.folder / "storm.log").read_text())

    def differences(self) -> list[str]:
        """Train the twin; what of the run is not as in it: tensors, steps, losses.

        It is told from the start to leave out what the run has left out.
        """
        told = [event["text"].rpartition(" with ")[2] for event in self._rollbacks[-1:]]
        twin = self._start("calm", self.folder, *told)
        if twin.wait() != 0:
            raise AssertionError(twin.output)
        calm = self.folder / "calm"
        last = self._num_steps
        expected, found = saved_state(calm, last), saved_state(self.run, last)
        wrong = sorted(set(expected) ^ set(found))
        wrong += [name for name in found if not _equal(found[name], expected[name])]
        if steps(self.run) != list(range(1, last + 1)):
            wrong.append("the steps of metrics.jsonl")
        if losses(self.run) != losses(calm):
            wrong.append("the losses of metrics.jsonl")
        return wrong

    def _words(self, name: str, runs: Path) -> list[str]:
        return [
            *TINY, f"name={name}", f"runs_dir={runs}", f"data.sources.web={self.folder}/web",
            f"training.num_tokens={256 * self._num_steps}", "training.micro_batch_size=1",
            "model.hidden_size=64", "model.intermediate_size=128",
            "model.tie_word_embeddings=false", f"checkpoint.every_steps={SAVE_EVERY}",
            f"monitor.hang_s={HANG_S:g}", "engine.timeout_s=60", "guard.spike_zscore=null",
        ]  # fmt: skip

    def _start(self, name: str, runs: Path, *more: str) -> Command:
        words = [
            "train", *self._words(name, runs), *self.layout.words, "guard.on_spike=[rollback]",
            f"checkpoint.start_from={self.folder}/weights", *more,
        ]  # fmt: skip
        return Command(
            words, self.folder / f"{name}.log", self.layout.ranks, deepspeed=self.layout.deepspeed
        )

    def _make_data(self, poisoned: Sequence[int]) -> None:
        """Documents that are a window each, and weights to start from."""
        store, count = self.folder / "web", 8 * (self._num_steps + 20 * len(poisoned))
        write_documents(store, count)
        words = self._words("first", self.folder)
        plan = plan_of(load("train", words, RunConfig), {"web": TokenStore.open(store)})
        windows = [w for step in poisoned for w in plan.windows(step - 1).windows.tolist()]
        shutil.rmtree(store)
        write_documents(store, count, windows)
        log = self.folder / "first.log"
        first = Command(["train", *words, "training.stop_at_step=1"], log)
        if first.wait() != 0:
            raise AssertionError(first.output)
        spoil(self.folder / "weights" / "checkpoints", saved_state(self.folder / "first", 1))

    @property
    def _rollbacks(self) -> list[dict[str, Any]]:
        """Events of the times the run went back by itself."""
        found = json_lines.read(self.run / "events.jsonl")
        return [event for event in found if event["kind"] == "rollback"]

    def _meet_poison(self, command: Command) -> Hit:
        """Let the run go on until it has gone back from the next poisoned batch."""
        met = self._num_poisons
        command.until(lambda: len(self._rollbacks) > met)
        self._num_poisons += 1
        event = self._rollbacks[met]
        return Hit(POISON, event["reached"], event["to_step"])

    @property
    def _newest(self) -> int:
        return max(steps(self.run), default=0)

    def _begin(self) -> int:
        """Start the run and see it begin; the step it goes on from."""
        path = self.run / "events.jsonl"
        seen = len(_starts(path))
        self._running = self._start("storm", self._runs)
        self._command.until(lambda: len(_starts(path)) > seen)
        return _starts(path)[-1]

    def _under_way(self) -> Command:
        """The run, some steps further and with two checkpoints behind it."""
        if self._running is None:
            self._begin()
        further = self._newest + self._draw.randrange(1, SAVE_EVERY + 2)
        self._reach(max(further, 2 * SAVE_EVERY))
        saved = self.run / "checkpoints"
        self._command.until(lambda: len(archive.scan(saved)) > 1)  # damage may have used them up
        return self._command

    def _reach(self, step: int) -> None:
        """Wait until the run has made ``step``, without an end between."""
        if step >= self._num_steps:
            raise AssertionError(f"{self._num_steps} steps are too few for so many faults")
        self._command.until(lambda: self._newest >= step)

    def _settle(self, command: Command) -> None:
        """Wait for the first rank to end, then for the others, then end them."""
        deadline = time.monotonic() + Command.time_limit_s
        while not command.ended and time.monotonic() < deadline:
            time.sleep(0.02)
        deadline = time.monotonic() + END_S
        while any(map(_lives, command.ranks)) and time.monotonic() < deadline:
            time.sleep(0.02)
        command.kill()
        self._running = None

    def _kill_one(self, command: Command) -> int:
        os.kill(self._draw.choice(command.ranks), signal.SIGKILL)
        return self._after(command)

    def _kill_all(self, command: Command) -> int:
        command.kill()
        return self._after(command)

    def _terminate(self, command: Command) -> int:
        command.send(signal.SIGTERM)
        return self._after(command)

    def _hang(self, command: Command) -> int:
        os.kill(self._draw.choice(command.ranks), signal.SIGSTOP)
        return self._after(command)

    def _kill_in_a_save(self, command: Command) -> int:
        folder = self.run / "checkpoints"
        command.until(lambda: any(folder.glob(".tmp-*")))
        time.sleep(self._draw.uniform(0.0, 0.02))
        command.kill()
        return self._after(command)

    def _kill_supervisor(self, command: Command) -> int:
        """Kill the process that watches for hangs, which the run does not need; it stops later."""
        for pid in _supervisors(self.run):
            os.kill(pid, signal.SIGKILL)
        self._reach(self._newest + 2)
        return self._terminate(command)

    def _damage(self, change: Callable[[Path], None]) -> "Callable[[Command], int]":
        def strike(command: Command) -> int:
            struck = self._kill_all(command)
            _, newest = max(archive.scan(self.run / "checkpoints"))
            change(self._draw.choice(sorted(p for p in newest.iterdir() if p.is_file())))
            return struck

        return strike

    def _fill_disk(self, command: Command) -> int:
        """Leave room for lines, not for a checkpoint; give it back after a save has failed."""
        struck, ballast = self._newest, self._runs / "ballast"
        with ballast.open("ab", buffering=0) as file:  # the run may be writing, too
            while shutil.disk_usage(self._runs).free > 300_000:
                file.write(bytes(100_000))
        events = self.run / "events.jsonl"
        command.until(lambda: any(
            e["kind"] == "save_failed" and e["step"] >= struck for e in json_lines.read(events)
        ))  # fmt: skip
        ballast.unlink()
        self._reach(self._newest + SAVE_EVERY)
        return struck

    def _after(self, command: Command) -> int:
        """Wait until it has ended; the newest step there was."""
        self._settle(command)
        return self._newest


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit; what is no number is so in both."""
    return torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


def _starts(events: Path) -> list[int]:
    """Steps that the starts of a run went on from."""
    found = json_lines.read(events)
    return [event["step"] for event in found if event["kind"] in ("start", "resumed")]


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _supervisors(run: Path) -> Sequence[int]:
    """Processes that watch the ranks of ``run``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"llmtrain.hang.supervisor" in line and str(run).encode() in line:
            found.append(int(process.name))
    return found


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


_STRIKES: dict[str, Callable[[Storm, Command], int]] = {
    "kill one": Storm._kill_one,
    "kill all": Storm._kill_all,
    "terminate": Storm._terminate,
    "hang": Storm._hang,
    "kill in a save": Storm._kill_in_a_save,
    "supervisor": Storm._kill_supervisor,
    "truncate": lambda storm, command: storm._damage(_truncate)(command),
    "flip": lambda storm, command: storm._damage(_flip)(command),
    "missing file": lambda storm, command: storm._damage(Path.unlink)(command),
    FULL_DISK: Storm._fill_disk,
}
