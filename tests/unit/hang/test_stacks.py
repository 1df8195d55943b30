"""Stacks that a process writes on a signal, and what they say of its main thread."""

import faulthandler
import os
import threading
from pathlib import Path

import torch.distributed.distributed_c10d as c10d

from llmtrain.hang.stacks import SIGNAL, ask, frames, place, stack_path, waits
from llmtrain.parallel import forward, mesh

MAIN = 0x7F01


def stack(*places: tuple[str, int, str]) -> str:
    """A dump of two threads, the second of which stands at ``places``."""
    lines = [
        "Thread 0x0000000000000001 (most recent call first):",
        '  File "a.py", line 1 in a',
        "",
    ]
    lines += [f"Current thread 0x{MAIN:016x} (most recent call first):"]
    lines += [f'  File "{file}", line {line} in {name}' for file, line, name in places]
    return "\n".join(lines)


def line_of(file: str | None, text: str) -> tuple[str, int]:
    assert file is not None
    lines = Path(file).read_text().splitlines()
    return file, next(number for number, line in enumerate(lines, 1) if text in line)


def test_a_thread_in_torch_distributed_waits() -> None:
    at = stack((c10d.__file__, 10, "all_reduce"), ("train.py", 5, "step"))
    assert waits(at, MAIN)
    assert not waits(at, 1)
    assert place(at, MAIN) == "all_reduce (distributed/distributed_c10d.py:10)"
    assert frames(at, MAIN)[1] == ("train.py", 5, "step")


def test_a_thread_of_ours_waits_where_its_line_does() -> None:
    assert waits(stack((*line_of(mesh.__file__, "work.wait(timedelta"), "agree")), MAIN)
    assert waits(stack((*line_of(forward.__file__, "sent.popleft()[0].wait()"), "f")), MAIN)
    computes = line_of(forward.__file__, "output = modules[stage](")
    assert not waits(stack((*computes, "forward_only")), MAIN)


def test_frames_of_operators_hide_nothing() -> None:
    ops = ("/x/site-packages/torch/_ops.py", 3, "__call__")
    waiting = line_of(mesh.__file__, "work.wait(timedelta")
    assert waits(stack(ops, (*waiting, "agree")), MAIN)
    assert not waits(stack(ops, ("layers.py", 3, "forward")), MAIN)
    assert not waits("", MAIN)


def test_a_process_answers_and_one_that_does_not_is_left_out(tmp_path: Path) -> None:
    with stack_path(tmp_path, 0).open("w") as file:
        faulthandler.register(SIGNAL, file=file, all_threads=True)
        found = ask({0: os.getpid(), 1: 2**22 + 1}, tmp_path)
        faulthandler.unregister(SIGNAL)
    assert list(found) == [0]
    main = threading.main_thread().ident
    assert main is not None
    assert ask.__name__ in {name for _, _, name in frames(found[0], main)}
