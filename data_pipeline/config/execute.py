"""Settings of where tasks run; none of them changes a byte of what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipeline.config.checks import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """``executor=ray``: one remote task per shard task."""

    address: str | None = None
    """Address of a running cluster, host:port, or auto for the one of this machine; null starts a
    cluster here and stops it at the end."""
    cpus_per_task: float = 1.0
    """Cores a task reserves."""
    memory_gib: float | None = None
    """Memory a task reserves, in GiB; null reserves none."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(cpus_per_task=self.cpus_per_task)
        if self.memory_gib is not None:
            check_positive(memory_gib=self.memory_gib)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """``executor=slurm``: job arrays of ``num_workers`` workers that take task after task."""

    partition: str | None = None
    """Partition; null takes the cluster's default."""
    account: str | None = None
    """Account the jobs are charged to; null takes the user's default."""
    qos: str | None = None
    """Quality of service; null takes the user's default."""
    cpus_per_task: int = 1
    """Cores of a worker."""
    memory_gib: float | None = None
    """Memory of a worker, in GiB; null takes the partition's default."""
    hours: float = 12.0
    """Time limit of a worker's job; it takes no task it may have no time for, and a new job follows
    while there is work."""
    idle_s: float = 60.0
    """Seconds a worker waits for the next task before its job ends; the phases of a pipeline follow
    each other at once in jobs that still run."""
    poll_s: float = 15.0
    """Seconds between two looks at the queue of Slurm; answers are looked for in a folder, without
    Slurm."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further options of sbatch by name: {constraint: ssd, nice: "100"}."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(
            cpus_per_task=self.cpus_per_task, hours=self.hours, idle_s=self.idle_s,
            poll_s=self.poll_s,
        )  # fmt: skip
        if self.memory_gib is not None:
            check_positive(memory_gib=self.memory_gib)
