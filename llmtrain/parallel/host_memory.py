"""The host's memory between steps: what a step frees stays with the process for the next one.

By default glibc returns large blocks to the system. On a CPU the next step then takes them anew,
gradients and activations alike, at a page fault for every 4 KiB.

Invariant: only where freed memory stays changes; what cannot be asked (another libc) is left alone.

    keep_freed_memory(world.device)    # after the model is made, before the first step
"""

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of the settings in malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX."""

_NEVER = 2**31 - 1


def keep_freed_memory(device: torch.device) -> bool:
    """Have malloc give nothing back to the system where steps run on a CPU; tells whether it will.

    The process then holds the most it ever used. What was taken before, and is large, still goes
    back when it is freed.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
