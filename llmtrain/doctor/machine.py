"""Processor, memory and limits of this machine, as the container it may be sees them.

for finding in [*cores(num_gpus=8), *memory(gpu_bytes=0)]: ...
"""

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from llmtrain.doctor.finding import Finding

GIB = 1024**3

_CORES_PER_GPU = 4
_MIN_MEMORY_BYTES = 2 * GIB
_NUM_FILES = 4096
"""Open files: sockets of every peer, shards of every store, libraries."""
_NUM_PROCESSES = 4096
"""Threads count too: every rank starts some dozens."""


def system() -> Iterator[Finding]:
    """Operating system and interpreter."""
    about = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding(name="system", value=f"{about}, Python {platform.python_version()}")


def cores(num_gpus: int) -> Iterator[Finding]:
    """Cores this process may use."""
    have, all_of_them = _usable_cores(), os.cpu_count() or 1
    value = f"{have} cores" + (f" of {all_of_them}" if have < all_of_them else "")
    if have < num_gpus * _CORES_PER_GPU:
        yield Finding(
            name="processor", value=value, verdict="warn",
            advice=f"{num_gpus} GPUs are kept busy by about {num_gpus * _CORES_PER_GPU} cores; "
            "ask for more (Slurm: --cpus-per-task, Kubernetes: resources.requests.cpu)",
        )  # fmt: skip
    else:
        yield Finding(name="processor", value=value)


def _usable_cores() -> int:
    """Cores by affinity and by the quota of the control group."""
    have = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal():
        have = min(have, max(1, int(quota[0]) // int(quota[1])))
    return have


def memory(gpu_bytes: int) -> Iterator[Finding]:
    """Main memory, in all and free."""
    table = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
    total, free = (int(table[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal() and int(limit) < total:
        total = int(limit)
        free = min(free, total - int(_read("/sys/fs/cgroup/memory.current") or 0))
    value = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < _MIN_MEMORY_BYTES:
        advice = f"at least {_MIN_MEMORY_BYTES // GIB} GiB are needed; end what uses the rest"
        yield Finding(name="memory", value=value, verdict="warn", advice=advice)
    elif total < gpu_bytes:
        yield Finding(
            name="memory", value=value, verdict="warn",
            advice=f"less than the {gpu_bytes / GIB:.0f} GiB of the GPUs: checkpoints are staged "
            "in main memory, and offloading has no room",
        )  # fmt: skip
    else:
        yield Finding(name="memory", value=value)


def limits(infiniband: bool) -> Iterator[Finding]:
    """The soft limits of this process that training runs into."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _limit("open files", files, _NUM_FILES, f"ulimit -n {_NUM_FILES}", "nofile")
    processes = resource.getrlimit(resource.RLIMIT_NPROC)
    yield _limit("processes", processes, _NUM_PROCESSES, f"ulimit -u {_NUM_PROCESSES}", "nproc")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    value = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 1024:.0f} KiB"
    if infiniband and locked != resource.RLIM_INFINITY:
        yield Finding(
            name="locked memory", value=value, verdict="bad",
            advice="InfiniBand registers memory that must stay: ulimit -l unlimited (memlock in "
            "/etc/security/limits.conf; docker --ulimit memlock=-1; PropagateResourceLimits in "
            "slurm.conf)",
        )  # fmt: skip
    else:
        yield Finding(name="locked memory", value=value)


def _limit(name: str, limit: tuple[int, int], needed: int, command: str, keyword: str) -> Finding:
    soft, hard = limit
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding(name=name, value=value)
    raised = hard == resource.RLIM_INFINITY or hard >= needed
    how = command if raised else f"raise {keyword} in /etc/security/limits.conf"
    advice = f"many ranks need {needed:,}; {how} before the run"
    return Finding(name=name, value=value, verdict="warn", advice=advice)


def _read(path: str) -> str:
    """Content of a small file of the kernel; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
