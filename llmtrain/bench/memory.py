"""Peak memory of a stretch of time, on a device or of this process.

Invariant: what came before ``reset_peak`` does not count, where the system can forget it (devices,
and Linux for processes; elsewhere the peak is that of the whole process).

    held = reset_peak(device)
    ...
    peak_bytes(device)
"""

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        _FORGET.write_text("5")  # proc(5): the peak becomes what is resident now
    return _status_bytes("VmRSS") or _whole_peak()


def peak_bytes(device: torch.device) -> int:
    """Largest memory since ``reset_peak``: allocated on the device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or _whole_peak()


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _whole_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
