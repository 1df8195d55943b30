"""Freed memory stays: the second block of a size costs no page faults."""

import resource
import sys

import pytest
import torch

from llmtrain.parallel.host_memory import keep_freed_memory
from tests.world import RankPool

BLOCK = 64 << 20
PAGES = BLOCK // 4096


def faults(place: object, keep: bool) -> tuple[bool, list[int]]:
    """Whether freed memory is kept now, and the page faults of three blocks one after another."""
    kept, counts = keep and keep_freed_memory(torch.device("cpu")), []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(BLOCK)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return kept, counts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_block_that_was_freed_costs_no_page_faults() -> None:
    with RankPool() as pool:  # a process of its own, which the setting ends with
        _, plain = pool.run(faults, False, size=1)[0]
        kept, counts = pool.run(faults, True, size=1)[0]
    assert kept
    assert counts[-1] < PAGES / 10
    assert plain[-1] > 0


def test_other_devices_leave_malloc_alone() -> None:
    assert not keep_freed_memory(torch.device("meta"))
