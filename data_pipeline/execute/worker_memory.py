"""Memory of worker processes: kept small between tasks, so that a budget is there for the data.

A worker's own memory is what it does not share with the fork server it comes from (USS: RSS less
shared pages). What a task frees goes back to the machine; a worker that keeps much all the same is
replaced before the next phase.

    settle_in()                # once in a worker
    give_back()                # after each task
    own_bytes(os.getpid())
"""

import ctypes
from contextlib import suppress
from pathlib import Path

IDLE_BYTES = 32 << 20
"""An idle worker that holds more of its own is replaced."""
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 1 << 20
"""glibc: allocations of this size are mapped, and unmapped when they are freed."""


def settle_in() -> None:
    """Make a process a good worker: Arrow has one thread, and memory that is freed goes back.

    The workers are the parallelism. glibc would keep the memory of large buffers for later ones,
    and Arrow's own allocator keeps more; a worker under a budget cannot afford either.
    """
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    pa.set_memory_pool(pa.system_memory_pool())
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back() -> None:
    """Return what a task has freed to the machine."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def own_bytes(pid: int) -> int:
    """Return the memory that would be free if a process ended; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    private = (line.split() for line in text.splitlines() if line.startswith("Private_"))
    return sum(int(words[1]) << 10 for words in private)
