"""Start the real commands on tiny models and stores, watch them, and kill them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import write_manifest
from llmtrain.data.writer import ShardWriter
from llmtrain.train import archive

REPOSITORY = Path(__file__).parents[2]
VOCABULARY = 64
TOKENIZER_HASH = "ab" * 32
TIME_LIMIT_S = 120

TINY = (
    "model=llama_demo",
    f"model.vocab_size={VOCABULARY}",
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
"""40 steps of 8 rows on a model of four small blocks."""


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
    """One ``llmtrain`` command, alone or on several ranks under torchrun."""

    def __init__(self, words: Sequence[str], log: Path, ranks: int = 1) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start = [sys.executable, *(launcher if ranks > 1 else []), "-m", "llmtrain"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*start, *words],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self.log.read_text()

    def wait(self) -> int:
        """Its exit status; kills everything at the time limit."""
        try:
            return self.process.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {TIME_LIMIT_S} s:\n{self.output}") from None

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which it must before the command ends."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended too early:\n{self.output}")
            time.sleep(0.005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send ``number`` to the launcher and to every rank."""
        for pid in [self.process.pid, *self.ranks]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def ranks(self) -> list[int]:
        """Process ids of the ranks a launcher started, in order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return sorted(int(pid) for pid in children.read_text().split())
        except FileNotFoundError:
            return []


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
    folder = archive.locate(run / "checkpoints" / archive.folder_name(step)).path
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state
