"""How rows are laid out and spread over programs: what all kernels share.

Invariant: the choice depends on shapes and on the device's kind alone, so that a run repeats.

    tile = {"COLUMNS": next_power_of_2(5120), "num_warps": num_warps(8192)}
"""

import functools

import torch
from torch import Tensor

_ELEMENTS_PER_WARP = 512
"""16 elements for each of 32 threads: two loads of 16 bytes in bf16."""

_PROGRAMS_PER_PROCESSOR = 2
"""Where programs walk over rows: enough for one to load while the other computes."""

_INTERPRETED_PROGRAMS = 3
"""The same on the CPU, where the interpreter runs one program after the other."""


def next_power_of_2(size: int) -> int:
    """Give the smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def num_warps(elements: int) -> int:
    """Choose the warps of a program that works on ``elements`` at once, a power of two."""
    return min(16, max(4, elements // _ELEMENTS_PER_WARP))


@functools.cache
def programs_per_device(device: torch.device) -> int:
    """Give how many programs share a device where each walks over many rows."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * processors


def as_rows(x: Tensor) -> Tensor:
    """View [..., D] as rows [T, D], evenly spaced and each contiguous; copied where it is not."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
