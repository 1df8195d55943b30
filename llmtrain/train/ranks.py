"""What every rank says of itself at logging steps: its time, its GPU, its part of the weights.

One sum over all ranks carries everything, at logging steps only. Who is slow is told by the time a
rank was busy itself. On the CPU that is processor time from the demand for a batch to the end of
the step, and what it waited for its own batches: a wait for peers costs no processor time. A GPU is
busy while it waits inside a collective, so there it is wall-clock, in which all ranks that wait for
each other look alike.

    watch = RankWatch(world, engine, batches, every_steps=10, layers=layers)
    hooks.insert(0, watch)        # on every rank, before any hook that takes time
    watch.fields()                # on rank 0: rank_step_time_s, layer_weight_norm, gpu_...
"""

from collections.abc import Sequence
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.engine.protocol import StepResult
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress
from llmtrain.train.feed import Feed
from llmtrain.train.metrics import Row
from llmtrain.train.norms import layer_norms

_PER_RANK = 3
"""Numbers of a rank: seconds per step, watts, bytes."""


class Weighted(Protocol):
    """The part of an engine whose weights are measured."""

    def weight_squares(self) -> Tensor:
        """Squared norms by row of the table of what this rank counts, float64."""
        ...


class RankWatch:
    """Hook on every rank; at logging steps rank 0 has what the ranks said."""

    def __init__(
        self,
        world: World,
        engine: Weighted,
        batches: Feed,
        *,
        every_steps: int,
        layers: Sequence[str] | None,
    ) -> None:
        """Ask every ``every_steps`` steps and after the last; None ``layers``: no norms."""
        self._world = world
        self._engine = engine
        self._batches = batches
        self._every_steps = every_steps
        self._layers = layers
        self._busy_s = 0.0
        self._waited_s = batches.waited_s
        self._num_steps = 0
        self._found: Row = {}

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Count the step; at a logging step give the numbers to rank 0."""
        due = progress.step % self._every_steps == 0 or progress.finished
        if due and self._world.device.type == "cuda":
            result.grad_norm.item()  # until this rank's device is done
        self._busy_s += self._batches.busy_s() - self._batches.asked_s
        self._num_steps += 1
        if not due:
            return
        mine = [self._own_step_time_s(), *gpu_load(self._world.device)]
        ranks = torch.zeros((self._world.world_size, _PER_RANK), dtype=torch.float64)
        ranks[self._world.rank] = torch.tensor(mine, dtype=torch.float64)
        parts = [ranks.to(self._world.device).flatten()]
        if self._layers is not None:
            parts.append(self._engine.weight_squares())
        packed = self._world.sum(torch.cat(parts))
        if self._world.rank == 0:
            self._found = self._read(packed.tolist())

    def fields(self) -> Row:
        """Fields of the row of a logging step; none at other steps."""
        found, self._found = self._found, {}
        return found

    def _own_step_time_s(self) -> float:
        """Seconds per step since the last call in which this rank did not wait for others."""
        waited_s = self._batches.waited_s - self._waited_s
        on_gpu = self._world.device.type == "cuda"  # wall-clock has the wait in it
        own_s = self._busy_s / self._num_steps + (0.0 if on_gpu else waited_s / self._num_steps)
        self._busy_s, self._num_steps, self._waited_s = 0.0, 0, self._batches.waited_s
        return own_s

    def _read(self, packed: list[float]) -> Row:
        size = _PER_RANK * self._world.world_size
        times, watts, memory = (packed[:size][part::_PER_RANK] for part in range(_PER_RANK))
        row: Row = {}
        if self._world.world_size > 1:
            row["rank_step_time_s"] = {
                "min": min(times), "median": median(times), "max": max(times),
                "slowest_rank": times.index(max(times)),
            }  # fmt: skip
        if any(watts):
            row["gpu_power_w"] = sum(watts) / len(watts)
        if any(memory):
            row["gpu_memory_bytes"] = int(max(memory))
        if self._layers is not None:
            row["layer_weight_norm"] = layer_norms(self._layers, packed[size:])
        return row


def gpu_load(device: torch.device) -> tuple[float, float]:
    """Watts and bytes in use of a GPU as its driver tells; 0 where it does not, or on the CPU."""
    if device.type != "cuda":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return _watts(device), float(total - free)


def _watts(device: torch.device) -> float:
    """Power of a GPU; 0 without nvidia-ml-py, or where the driver does not tell."""
    try:
        return torch.cuda.power_draw(device) / 1000
    except ImportError:
        return 0.0
    except Exception as error:
        if not type(error).__module__.startswith("pynvml"):  # whose errors share no other base
            raise
        return 0.0
