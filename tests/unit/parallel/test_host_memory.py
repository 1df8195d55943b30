"""Freed memory stays: the second block of a size costs no page faults."""

import subprocess
import sys

import pytest
import torch

from llmtrain.parallel.host_memory import keep_freed_memory

COUNT = """
import resource, sys, torch
from llmtrain.parallel.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory(torch.device("cpu")), end=" ")
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, end=" ")
"""
PAGES = (64 << 20) // 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_block_that_was_freed_costs_no_page_faults() -> None:
    answers = {}
    for how in ("keep", "plain"):
        run = subprocess.run(
            [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True
        )
        answers[how] = run.stdout.split()
    assert answers["keep"][0] == "True"
    assert int(answers["keep"][-1]) < PAGES / 10
    assert int(answers["plain"][-1]) > 0


def test_other_devices_leave_malloc_alone() -> None:
    assert not keep_freed_memory(torch.device("meta"))
