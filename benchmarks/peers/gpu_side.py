"""What every side of the GPU benchmark shares: the case, its batches, how its steps are timed.

A side makes a function that takes one step; ``measure`` warms it up, times it by events on the
device (by the clock on a CPU) and prints one line of JSON. Needs torch alone.

    case = read_case()
    measure(case, step, "transformers")      # step takes the micro-batches of one step
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, batch and precision; the same for all sides."""

    model: dict[str, Any]
    """Fields of llmtrain's ModelConfig, which are Hugging Face's."""
    micro_batch_size: int
    sequence_length: int
    accumulation: int
    precision: str
    warmup_steps: int
    steps: int
    device: str
    compile: bool

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.micro_batch_size * self.accumulation * self.sequence_length

    def autocast(self) -> torch.autocast:
        """Products in bf16 over fp32 parameters where the case says so."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


def read_case() -> Case:
    """Read the case from the command line and select the device."""
    case = Case(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    return case


def measure(case: Case, step: Callable[[list[tuple[Tensor, Tensor]]], None], package: str) -> None:
    """Time ``step``, which takes the micro-batches of one optimizer step, and print the figures."""
    cuda = case.device == "cuda"
    shape = (case.accumulation, case.micro_batch_size, case.sequence_length + 1)
    window = torch.randint(case.model["vocab_size"], shape, device=case.device)
    parts = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in window]
    started = time.perf_counter()
    for _ in range(case.warmup_steps):
        step(parts)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    warmup_s = time.perf_counter() - started
    marks: list[Any] = [_mark(cuda)]
    for _ in range(case.steps):
        step(parts)
        marks.append(_mark(cuda))
    if cuda:
        torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) * 1e-3 if cuda else b - a for a, b in pairwise(marks)]
    middle = statistics.median(seconds)
    print(json.dumps({
        "package": package, "version": version(package), "torch": torch.__version__,
        "tokens_per_s": case.tokens / middle, "step_s": middle, "steps_s": seconds,
        "warmup_s": warmup_s,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }))  # fmt: skip


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of all sides."""
    return torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
