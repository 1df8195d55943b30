"""Shared memory and the disk of the runs: how much is free, how fast it is, whether it locks.

Invariant: what is written for a trial is taken away, and no folder is made.

    for finding in disk(Path("runs")): ...
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmtrain.doctor.finding import Finding
from llmtrain.doctor.machine import GIB

_SHARED_BYTES = GIB
_LITTLE_BYTES = 20 * GIB
_TRIAL_BYTES = 32 * 1024**2
_TRIAL_S = 0.5
"""A slow disk is tried for no longer."""
_SLOW_BYTES_PER_S = 50e6
_SLOW_SYNC_S = 0.1


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """The memory through which processes of one machine share tensors."""
    if not folder.is_dir():
        yield Finding(
            name="/dev/shm", value="missing", verdict="bad",
            advice="NCCL and worker processes share tensors there: mount -t tmpfs shm /dev/shm",
        )  # fmt: skip
        return
    total, free = _space(folder)
    value = f"{free / GIB:.2f} GiB free of {total / GIB:.2f}"
    if free < _SHARED_BYTES:
        yield Finding(
            name="/dev/shm", value=value, verdict="warn",
            advice="NCCL may fail with 'unhandled system error': docker --shm-size=16g or "
            "--ipc=host; Kubernetes: an emptyDir with medium Memory at /dev/shm",
        )  # fmt: skip
    else:
        yield Finding(name="/dev/shm", value=value)


def disk(runs_dir: Path) -> Iterator[Finding]:
    """Free space where runs are kept, its speed, and whether files can be locked."""
    folder = _existing(runs_dir)
    total, free = _space(folder)
    kind = _file_system(folder)
    where = str(runs_dir) if folder == runs_dir else f"{runs_dir} (to be made in {folder})"
    value = f"{where}: {free / GIB:.1f} GiB free of {total / GIB:.0f}, {kind}"
    if free < _LITTLE_BYTES:
        yield Finding(
            name="disk of runs", value=value, verdict="bad" if free < GIB else "warn",
            advice="a checkpoint takes 12 bytes per parameter (7B: 84 GB); use another runs_dir",
        )  # fmt: skip
    else:
        yield Finding(name="disk of runs", value=value)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            yield _speed(file)
            yield _locks(file)
    except OSError as error:
        yield Finding(
            name="writing to disk", value=f"{folder}: {error.strerror}", verdict="bad",
            advice="nothing of a run could be kept there; use another runs_dir",
        )  # fmt: skip


def _speed(file: IO[bytes]) -> Finding:
    """Write a little, wait until it is on the disk, then twice a line."""
    block, written, start = os.urandom(1024**2), 0, time.monotonic()
    while written < _TRIAL_BYTES and time.monotonic() - start < _TRIAL_S:
        written += file.write(block)
        file.flush()
    os.fsync(file.fileno())
    rate = written / (time.monotonic() - start)
    middle = time.monotonic()
    for _ in range(2):
        file.write(b"line\n")
        file.flush()
        os.fsync(file.fileno())
    sync_s = (time.monotonic() - middle) / 2
    value = f"{rate / 1e6:,.0f} MB/s written, a sync takes {sync_s * 1e3:.1f} ms"
    if rate >= _SLOW_BYTES_PER_S and sync_s <= _SLOW_SYNC_S:
        return Finding(name="speed of disk", value=value)
    return Finding(
        name="speed of disk", value=value, verdict="warn",
        advice=f"a checkpoint of 84 GB (7B) takes {84e9 / rate / 60:,.0f} min here; use a faster "
        "disk for runs_dir, or save less often (checkpoint.every_steps)",
    )  # fmt: skip


def _locks(file: IO[bytes]) -> Finding:
    """Whether a run can be kept from a second process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Finding(
            name="locks of disk", value=f"refused ({error.strerror})", verdict="warn",
            advice="nothing keeps a second process from a run here: start each run once, or mount "
            "with locks (NFS: without nolock; Lustre: with flock)",
        )  # fmt: skip
    return Finding(name="locks of disk", value="work")


def _space(folder: Path) -> tuple[int, int]:
    """Bytes of a file system: all, and those free for this user."""
    about = os.statvfs(folder)
    return about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize


def _existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    path = path.expanduser()
    whole = path if path.is_absolute() else Path.cwd() / path
    return next(each for each in (path, *whole.parents) if each.is_dir())


def _file_system(folder: Path) -> str:
    """Kind of the file system a folder is on, as /proc/mounts has it."""
    whole, best, kind = str(folder.resolve()), "", "unknown file system"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, name, *_ = line.split()
        inside = whole == mount or whole.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind
