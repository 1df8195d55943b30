"""What every side of the training benchmark shares: the case, its batches, its start weights.

A side builds its model and runs its own loop; after every step it calls ``Meter.done``, which
answers the caller and waits until more steps are asked for. The loop is therefore the side's real
one, and steps of several sides can be taken in turn. Processor time is that of the process with
all its threads. Memory is the largest RSS of the steps asked for, less what the process had after
its imports. Needs torch and numpy alone, so that every interpreter can run it.

    case, meter = begin()
    for step in itertools.count():
        ...
        meter.done(loss)
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IGNORE = -100
"""Target where there is none: the next token is of another document, or outside the row."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, batch and precision; the same for all sides."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    rows: int
    sequence_length: int
    precision: str
    """fp32, or bf16: products and hidden states in bf16, fp32 master weights and updates."""
    document_tokens: int | None = None
    """Mean length of the documents packed into a row; None is one document a row."""
    compile: bool = False
    threads: int = 1
    lr: float = 3e-4
    clip: float = 1.0
    rope_theta: float = 10_000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Rows:
    """A batch, all int64 [rows, sequence_length]."""

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor


def rows_of(case: Case, step: int) -> Rows:
    """Make the batch of a step: Zipf-like tokens, so that losses fall, in documents of any length.

    The last token of a document, and of a row, has no target.
    """
    random = np.random.default_rng([11, step])
    shape = (case.rows, case.sequence_length)
    tokens = (case.vocab_size * random.random(shape) ** 4).astype(np.int64)
    starts = np.zeros(shape, dtype=bool)
    if case.document_tokens is not None:
        starts = random.random(shape) < 1 / case.document_tokens
    starts[:, 0] = True
    index = np.arange(case.sequence_length)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    targets[:, :-1] = np.where(starts[:, 1:], IGNORE, tokens[:, 1:])
    documents = np.cumsum(starts, axis=1) - 1
    return Rows(*(torch.from_numpy(array) for array in (tokens, targets, positions, documents)))


def start_weights(case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the start weights by their Hugging Face names, the head tied to the embedding."""
    width, inner = case.hidden_size, case.intermediate_size
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    yield "model.embed_tokens.weight", drawn(case.vocab_size, width)
    for layer in range(case.num_layers):
        block = f"model.layers.{layer}."
        yield block + "input_layernorm.weight", torch.ones(width)
        yield block + "post_attention_layernorm.weight", torch.ones(width)
        for name in "qkvo":
            yield f"{block}self_attn.{name}_proj.weight", drawn(width, width)
        for name in ("gate", "up"):
            yield f"{block}mlp.{name}_proj.weight", drawn(inner, width)
        yield block + "mlp.down_proj.weight", drawn(width, inner)
    yield "model.norm.weight", torch.ones(width)


def fused_weights(case: Case, names: Mapping[str, str], qkv: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the start weights by names of a model with one matrix for queries, keys and values.

    ``names`` are its names by parts of Hugging Face's, ``qkv`` its name of that matrix, in which
    ``{}`` stands for the layer.
    """
    parts: list[Tensor] = []
    for name, value in start_weights(case):
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            parts.append(value)
            if len(parts) == 3:
                yield qkv.format(name.split(".")[2]), torch.cat(parts)
                parts = []
            continue
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        yield name, value


def fill(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give every parameter of ``model`` its start weight; raises ValueError for one without."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights:
            parameters.pop(name).copy_(value)
    if parameters:
        raise ValueError(f"no start weights for {sorted(parameters)}")


class Meter:
    """Answers requests from inside a loop."""

    def __init__(self, requests: Any, answers: Any) -> None:
        self._requests, self._answers = requests, answers
        self._left, self._losses = 1, list[float]()
        self._base = _status_bytes("VmRSS")
        self._begin()

    def done(self, loss: float, **more: float) -> None:
        """Count a step; when all that were asked for are done, answer and wait for more."""
        self._losses.append(loss)
        self._left -= 1
        if self._left:
            return
        self.answer(
            wall_s=time.perf_counter() - self._wall, cpu_s=time.process_time() - self._cpu,
            losses=self._losses, peak_bytes=_status_bytes("VmHWM") - self._base, **more,
        )  # fmt: skip
        line = self._requests.readline()
        if not line:
            self._answers.flush()
            os._exit(0)  # the loops of some sides would catch an exception
        self._left, self._losses = int(json.loads(line)["steps"]), []
        self._begin()

    def answer(self, **result: Any) -> None:
        """Write one line."""
        self._answers.write(json.dumps(result) + "\n")
        self._answers.flush()

    def _begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is now
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def begin() -> tuple[Case, Meter]:
    """Read the case; what libraries print goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    case = Case(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(case.threads)
    return case, Meter(sys.stdin, answers)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}")
