"""What ``llmtrain plan`` takes: a training command line, and the GPUs it is for."""

from dataclasses import dataclass

from llmtrain.config.fields import below, not_positive, outside
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(RunConfig):
    """``llmtrain plan``: whether a run fits on GPUs that are not here, and which layout to use.

    It reads model, parallel, engine, training and optimizer of a training command line, and needs
    neither data nor a GPU. Memory is counted; times follow from the rates given here.
    """

    gpu: str = "H100"
    """Kind of GPU, by a part of its name: peak rate and memory are looked up."""
    num_gpus: int = 8
    """GPUs in all."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    memory_gib: float | None = None
    """Memory of a GPU; null looks it up."""
    reserve_gib: float = 6.0
    """Memory of a GPU that is left for CUDA, communication buffers and fragmentation."""
    mfu: float = 0.45
    """Share of the peak that a GPU reaches while it computes, 0 to 1; ``llmtrain bench`` says."""
    node_gb_per_s: float = 300.0
    """Bytes per second a GPU sends to others of its machine, in GB/s (NVLink 4: 450 at best)."""
    network_gb_per_s: float = 40.0
    """Bytes per second a GPU sends to other machines, in GB/s (400 Gbit/s: 50 at best)."""
    search: bool = False
    """Try all layouts, micro-batch sizes and kinds of recomputation, and show the fastest."""
    show: int = 8
    """Layouts to show of a search."""

    def __post_init__(self) -> None:
        """Refuse empty clusters and rates of nothing."""
        problems = below(self, 1, "num_gpus", "gpus_per_node", "show")
        problems += not_positive(
            self, "memory_gib", "mfu", "node_gb_per_s", "network_gb_per_s"
        ) + outside(self, 0, 1, "mfu")
        if self.reserve_gib < 0:
            problems.append(f"reserve_gib={self.reserve_gib} must be at least 0")
        if problems:
            raise ConfigError(problems)
