"""Start the real commands on tiny models and stores, watch them, and kill them."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmtrain.checkpoint import archive
from llmtrain.cli import main
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import write_manifest
from llmtrain.data.writer import ShardWriter
from tests.distributed.states import read
from tests.ports import free_ports
from tests.world import fork_rank

REPOSITORY = Path(__file__).parents[2]
VOCABULARY = 64
TOKENIZER_HASH = "ab" * 32
TIME_LIMIT_S = 120

TINY = (
    "model=llama_demo",
    f"model.vocab_size={VOCABULARY}",
    "model.num_hidden_layers=2",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "training.num_tokens=10240",
    "training.sequence_length=32",
    "training.global_batch_tokens=256",
    "training.micro_batch_size=2",
    "optimizer.lr=1e-2",
    "checkpoint.every_steps=20",
    "monitor.log_every_steps=1",
    "monitor.wandb=disabled",
)
"""40 steps of 8 rows on a model of two small blocks."""


def make_store(folder: Path, seed: int, num_documents: int = 60) -> Path:
    """A store of random documents."""
    generator = np.random.default_rng(seed)
    with ShardWriter(folder, 0, vocab_size=VOCABULARY, eos_id=2) as writer:
        for number in range(num_documents):
            tokens = generator.integers(3, VOCABULARY, generator.integers(20, 200))
            writer.add(tokens, DocumentRecord(id=f"{seed:08x}{number:024x}"))
    write_manifest(
        folder,
        [writer.info],
        tokenizer_hash=TOKENIZER_HASH,
        vocab_size=VOCABULARY,
        eos_id=2,
    )
    return folder


class Command:
    """One ``llmtrain`` command, alone or on several ranks.

    Its processes are forked from one that has imported torch, which saves most of the time of small
    runs; each has a session, an environment and an output of its own and runs the console script's
    function. With ``torchrun`` the real launcher starts real interpreters.
    """

    time_limit_s = TIME_LIMIT_S

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        ranks: int = 1,
        torchrun: bool = False,
        body: Callable[..., int] | None = None,
        environments: Sequence[dict[str, str]] = (),
        deepspeed: bool = False,
    ) -> None:
        """``body`` takes the place of ``run_words``, ``environments`` add to those of the ranks.

        With ``deepspeed`` it is forked from a process that has imported DeepSpeed too.
        """
        self.log = log
        log.touch()
        self._processes = (
            [_Launcher(words, log, ranks)]
            if torchrun
            else _forked_ranks(words, log, ranks, body or run_words, environments, deepspeed)
        )

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self.log.read_text()

    @property
    def pid(self) -> int:
        """Process id of the launcher, or of rank 0 where there is none."""
        return self._processes[0].pid

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks, in order."""
        return [pid for process in self._processes for pid in process.ranks]

    @property
    def children(self) -> list[int]:
        """Process ids that the launcher, or rank 0, has started."""
        return children(self.pid)

    @property
    def ended(self) -> bool:
        """Whether the launcher, or any rank where there is none, has ended."""
        return any(process.status(0.0) is not None for process in self._processes)

    def wait(self) -> int:
        """The worst exit status; kills everything at the time limit."""
        deadline = time.monotonic() + self.time_limit_s
        found = [process.status(deadline - time.monotonic()) for process in self._processes]
        if None in found:
            self.kill()
            raise AssertionError(f"not done after {self.time_limit_s} s:\n{self.output}")
        return max((status for status in found if status is not None), key=abs)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which it must before the command ends."""
        deadline = time.monotonic() + self.time_limit_s
        while not condition():
            if self.ended or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended too early:\n{self.output}")
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send a signal to the launcher, or to every rank where there is none."""
        for process in self._processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        """End launcher and ranks at once."""
        for pid in {*self.ranks, *(process.pid for process in self._processes)}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.status(TIME_LIMIT_S)


def children(pid: int) -> list[int]:
    """Process ids of what a process has started; none where it has ended."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return sorted(int(child) for child in found.split())


class _Launcher:
    """A real torchrun."""

    def __init__(self, words: Sequence[str], log: Path, ranks: int) -> None:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", "llmtrain", *words],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def ranks(self) -> list[int]:
        return children(self.pid)

    def status(self, timeout_s: float) -> int | None:
        """Its exit status, None where it has not ended in time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


class _Forked:
    """A process that runs the function of the console script."""

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        environment: dict[str, str],
        body: Callable[..., int],
        deepspeed: bool,
    ) -> None:
        self._rank = fork_rank(deepspeed)
        self.pid = self._rank.pid
        self.ranks = [self.pid]
        self._status: int | None = None
        self._rank.pipe.send((body, 0, 1, "", (list(words), str(log), environment)))

    def status(self, timeout_s: float) -> int | None:
        """Its exit status, -9 where it was killed; None where it has not ended in time."""
        if self._status is None and self._rank.pipe.poll(max(0.0, timeout_s)):
            try:
                _, self._status = self._rank.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._status = -signal.SIGKILL
            self._rank.pipe.close()
        return self._status


def _forked_ranks(
    words: Sequence[str],
    log: Path,
    ranks: int,
    body: Callable[..., int],
    environments: Sequence[dict[str, str]],
    deepspeed: bool,
) -> list[_Forked]:
    """Ranks that find in their environment what a launcher would set."""
    if ranks == 1:
        return [_Forked(words, log, {**os.environ, "OMP_NUM_THREADS": "1"}, body, deepspeed)]
    (port,) = free_ports(1)
    return [
        _Forked(
            words,
            log,
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
             "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
             **(environments[rank] if environments else {})},
            body,
            deepspeed,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def run_words(
    place: object,
    words: list[str],
    log: str,
    environment: dict[str, str],
    command: Callable[[list[str]], int] = main,
) -> int:
    """Be a process that the shell has started: session, folder, environment, output."""
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        return command(words)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_torchrun(
    place: object, words: list[str], log: str, environment: dict[str, str], max_restarts: int = 0
) -> int:
    """Be torchrun with two ranks, which are forks of this process instead of new ones."""
    from torch.distributed import run

    options = ["--standalone", "--nproc-per-node=2", "--run-path", "--start-method=fork",
               f"--max-restarts={max_restarts}"]  # fmt: skip
    multiprocessing.current_process().daemon = False  # as what forked it is; those start nothing

    def launch(words: list[str]) -> int:
        try:
            run.main([*options, str(REPOSITORY / "llmtrain" / "__main__.py"), *words])
        except Exception:  # of a rank, or of the signal that ended it
            traceback.print_exc()
            return 1
        return 0

    return run_words(place, words, log, environment, launch)


def steps(run: Path) -> list[int]:
    """Steps in the run's metrics.jsonl."""
    return [row["step"] for row in rows(run)]


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in rows(run)}


def rows(run: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's metrics.jsonl; none where there is no file yet."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def status(run: Path) -> dict[str, Any]:
    """The run's status.json."""
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def saved_steps(run: Path) -> list[int]:
    """Steps of the run's checkpoints, in order."""
    return sorted(step for step, _ in archive.scan(run / "checkpoints"))


def saved_state(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: parameters and optimizer."""
    return read(archive.locate(run / "checkpoints" / archive.folder_name(step)).path)
