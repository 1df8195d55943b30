"""Ranks that hang when told to, and what the run then says; for tests and benchmarks/hangs.py."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain import json_lines
from llmtrain.data.loader import Batches
from llmtrain.parallel.stage import StageModule
from tests.end_to_end.commands import TINY, Command, run_words, steps

FAULTS = ("stop", "data", "python", "lock")
"""SIGSTOP; a reader that sleeps; a main thread that sleeps; a call that keeps Python's lock."""


def words(folder: Path, name: str, deadline_s: float, *more: str) -> tuple[str, ...]:
    """A run that lasts until it is hit."""
    return (
        "train", *TINY, f"name={name}", f"runs_dir={folder}", f"data.sources.web={folder}/web",
        "training.num_tokens=100_000_000", "checkpoint.every_steps=100000",
        f"monitor.hang_s={deadline_s:g}", *more,
    )  # fmt: skip


def start(
    command: tuple[str, ...], folder: Path, ranks: int, nodes: int = 1
) -> tuple[Command, Path]:
    """The run on ``ranks`` ranks, as of ``nodes`` machines, and its folder."""
    name = next(word for word in command if word.startswith("name=")).partition("=")[2]
    per_node = ranks // nodes
    environments = [
        {"LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node),
         "HANG_ORDERS": str(folder / name)}
        for rank in range(ranks)
    ]  # fmt: skip
    log = folder / f"{name}.log"
    return Command(
        command, log, ranks=ranks, body=faulty_words, environments=environments
    ), folder / name


def hit(command: Command, run: Path, rank: int, fault: str) -> float:
    """Have a rank hang; when that was, on the monotonic clock."""
    if fault == "stop":
        os.kill(command.ranks[rank], signal.SIGSTOP)
    else:
        (run / f"{fault}-{rank}").touch()
    return time.monotonic()


def hang_event(run: Path) -> dict[str, Any] | None:
    """The last hang among the run's events."""
    found = [e for e in json_lines.read(run / "events.jsonl") if e["kind"] == "hang"]
    return found[-1] if found else None


def noticed(command: Command, run: Path, since: float) -> tuple[dict[str, Any], float]:
    """The event of a hang, and seconds until it was there."""
    while (event := hang_event(run)) is None:
        assert time.monotonic() - since < 60, command.output
        time.sleep(0.02)
    return event, time.monotonic() - since


def under_way(command: Command, run: Path, at_step: int = 3) -> None:
    """Wait for the first steps."""
    command.until(lambda: len(steps(run)) >= at_step)


def faulty_words(place: object, words: list[str], log: str, environment: dict[str, str]) -> int:
    """``run_words`` of a rank that looks for its orders."""
    orders, rank = Path(environment["HANG_ORDERS"]), environment["RANK"]

    def obeying(function: Callable[..., Any], *faults: str) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            for fault in faults:
                if (orders / f"{fault}-{rank}").exists():
                    _hang(fault)
            return function(*arguments, **named)

        return called

    Batches._read = obeying(Batches._read, "data")  # type: ignore[method-assign]
    StageModule.forward = obeying(StageModule.forward, "python", "lock")  # type: ignore[method-assign]
    return run_words(place, words, log, environment)


def _hang(fault: str) -> None:
    if fault == "lock":
        ctypes.PyDLL(None).sleep(600)
    time.sleep(600)
