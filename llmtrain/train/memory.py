"""When memory runs out: the numbers, what to change, and a snapshot where one was recorded.

Invariant: advice is taken from the run's own configuration, and every change it names passes the
support matrix.

    record_history(config.monitor.memory_history, world.device)
    with explained(config, world, run.path, progress):
        ...    # a failed allocation leaves as OutOfMemoryError with a sentence
"""

import logging
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.run import RunConfig, broken_rules
from llmtrain.errors import ConfigError, OutOfMemoryError
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress

logger = logging.getLogger(__name__)

_GIB = 2**30
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": _GIB, "TiB": 2**40}
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) (bytes|[KMGT]iB)")
_LARGE_LOGITS_BYTES = 2**28
_HISTORY_ENTRIES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A failed allocation and the memory around it, in bytes."""

    asked: int | None
    """What was asked for; None where the message does not say."""
    held: int
    """What this process held: tensors on the GPU, or resident memory."""
    free: int
    """What nobody held."""
    total: int
    """What the device, or the machine, has, or the limit of this process (``ulimit -v``)."""

    @classmethod
    def of(cls, error: BaseException, device: torch.device) -> "Shortage | None":
        """Read a failed allocation of a GPU or of the host; None for any other error."""
        text = str(error)
        on_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
        if not on_host and not isinstance(error, torch.OutOfMemoryError):
            return None
        found = _ASKED.search(text)
        asked = round(float(found[1]) * _UNITS[found[2]]) if found else None
        if device.type == "cuda" and not on_host:
            free, total = torch.cuda.mem_get_info(device)
            held = torch.cuda.memory_allocated(device)
            return cls(asked=asked, held=held, free=free, total=total)
        free, total = _host_room()
        return cls(asked=asked, held=_resident_bytes(), free=free, total=total)

    def __str__(self) -> str:
        """The numbers, as a part of a sentence."""
        asked = "" if self.asked is None else f"asked for {_gib(self.asked)}, "
        return f"{asked}held {_gib(self.held)}, {_gib(self.free)} of {_gib(self.total)} were free"


@contextmanager
def explained(config: RunConfig, world: World, folder: Path, progress: Progress) -> Iterator[None]:
    """Turn a failed allocation inside into an OutOfMemoryError that says what to change.

    Where allocations were recorded, they are written to ``folder``.
    """
    try:
        yield
    except RuntimeError as error:
        shortage = Shortage.of(error, world.device)
        if shortage is None:
            raise
        logger.error("out of memory", exc_info=error, extra={"file_only": True})
        snapshot = _write_snapshot(config, world, folder)
        raise OutOfMemoryError(
            f"out of memory on rank {world.rank} after {progress.step} steps: {shortage}; "
            f"{_advice(config, world)}{snapshot}"
        ) from error


def record_history(wanted: bool, device: torch.device) -> None:
    """Have torch remember every allocation on a GPU, with its stack.

    Raises:
        ConfigError: ``device`` is none.
    """
    if not wanted:
        return
    if device.type != "cuda":
        raise ConfigError(
            f"monitor.memory_history=true records CUDA allocations, and the device is "
            f"{device.type}; set it to false"
        )
    torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)


def _write_snapshot(config: RunConfig, world: World, folder: Path) -> str:
    """Write what was recorded; says where, as the end of a message."""
    if not config.monitor.memory_history:
        return ""
    path = folder / f"memory-rank{world.rank}.pickle"
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    return f"; allocations are in {path}, to be opened at https://pytorch.org/memory_viz"


def _advice(config: RunConfig, world: World) -> str:
    """Say which changes lower the memory of a step, the cheapest in time first."""
    found = [
        text
        for changed, text in _changes(config, world.device)
        if not broken_rules(changed, world.world_size)
    ]
    if config.engine.kind == "native" and not config.parallel.cpu_offload:
        found.append(f"more ranks along parallel.dp_shard (now {world.axes.dp_shard})")
    elif config.engine.kind == "deepspeed" and config.engine.deepspeed.zero_stage < 3:
        stage = config.engine.deepspeed.zero_stage
        found.append(f"a higher engine.deepspeed.zero_stage (now {stage})")
    if not found:
        return "use a smaller model, or more devices"
    *others, last = found
    return f"use {', '.join(others)} or {last}" if others else f"use {last}"


def _changes(config: RunConfig, device: torch.device) -> Iterator[tuple[RunConfig, str]]:
    """Configurations that need less memory, and how to say so."""
    training, parallel, engine = config.training, config.parallel, config.engine
    if training.micro_batch_size > 1:
        size = training.micro_batch_size
        fewer = next(n for n in range(size // 2, 0, -1) if size % n == 0)
        yield (
            replace(config, training=replace(training, micro_batch_size=fewer)),
            f"training.micro_batch_size={fewer} (now {size})",
        )
    logits = engine.loss_chunk_tokens * config.model.vocab_size // parallel.tp * 4
    if logits >= _LARGE_LOGITS_BYTES:
        chunk = engine.loss_chunk_tokens // 2
        yield (
            replace(config, engine=replace(engine, loss_chunk_tokens=chunk)),
            f"engine.loss_chunk_tokens={chunk} (now {engine.loss_chunk_tokens}, "
            f"{_gib(logits)} of logits)",
        )
    if parallel.recompute != "full":
        fields: dict[str, Any] = {"recompute": "full", "recompute_budget": 0.5}
        yield (
            replace(config, parallel=replace(parallel, **fields)),
            f"parallel.recompute=full (now {parallel.recompute})",
        )
    if not parallel.activation_offload and device.type != "cpu":
        yield (
            replace(config, parallel=replace(parallel, activation_offload=True)),
            "parallel.activation_offload=true",
        )
    if not parallel.cpu_offload and device.type != "cpu":
        yield (
            replace(config, parallel=replace(parallel, cpu_offload=True)),
            "parallel.cpu_offload=true",
        )


def _resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _host_room() -> tuple[int, int]:
    """Free and total bytes of the machine, or of what this process may address."""
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or not sys.platform.startswith("linux"):
        return free, total
    addressed = page * int(Path("/proc/self/statm").read_text().split()[0])
    return min(free, max(0, limit - addressed)), min(total, limit)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.2f} GiB"
