"""Runs of four ranks under faults at random moments, each beside one that nobody touches.

Killed ranks, SIGTERM, stopped ranks, kills inside a save, a killed supervisor, damaged checkpoints,
a poisoned batch and a full disk, in every layout; the same command is started until the run is
done. In the end its parameters, optimizer state and losses must be those of the undisturbed run,
bit by bit; after a poisoned batch, of one that was told to leave it out.

    python benchmarks/chaos.py --faults 54 --minutes 25 --json benchmarks/results/chaos.json

Needs root for the full disk (a tmpfs of its own); elsewhere that fault is left out, and said so.
The file is written after every fault, and what is in it is printed by ``--print FILE``.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.end_to_end.chaos import (
    FILES,
    FULL_DISK,
    LAYOUTS,
    POISON,
    PROCESSES,
    SAVE_EVERY,
    Hit,
    Storm,
)

KINDS = (*PROCESSES, *FILES, POISON, FULL_DISK)
STEPS_PER_FAULT = 2 * SAVE_EVERY
APART = 5 * SAVE_EVERY
"""Steps from one poisoned batch to the next: no rollback leaves out two."""

Found = dict[str, dict[str, Any]]
"""By layout: seconds, hits, and what differs in the end (None while it runs)."""


def forecast(num_faults: int, first: int, seed: int) -> list[str]:
    """Faults in the order they strike: every kind as often as the others, or once more.

    Args:
        num_faults: how many.
        first: number of the kind that comes first where not all come as often.
        seed: of the order.
    """
    kinds = [kind for kind in KINDS if kind != FULL_DISK or os.geteuid() == 0]
    faults = [kinds[(first + number) % len(kinds)] for number in range(num_faults)]
    random.Random(seed).shuffle(faults)
    return faults


def poisoned_steps(faults: Sequence[str]) -> list[int]:
    """Steps whose batches are spoilt, so that each is met about when its turn comes."""
    steps = list[int]()
    for number, fault in enumerate(faults):
        if fault == POISON:
            steps.append(max([SAVE_EVERY * (number + 3), *(step + APART for step in steps)]))
    return steps


def weather(
    layout: str, faults: Sequence[str], seed: int, until: float, keep: Callable[[list[Hit]], None]
) -> list[str]:
    """Hit a run of ``layout`` until ``until`` at the latest; returns what differs in the end."""
    hits, poisoned = list[Hit](), poisoned_steps(faults)
    num_steps = (len(faults) + 4) * STEPS_PER_FAULT + APART * len(poisoned)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        storm = Storm(
            Path(folder), LAYOUTS[layout], seed, num_steps, poisoned, own_disk=os.geteuid() == 0
        )
        try:
            for fault in faults:
                if time.monotonic() > until:
                    break
                hits.append(storm.hit(fault))
                keep(hits)
                print(f"{layout}: {hits[-1]}", file=sys.stderr, flush=True)
            storm.finish()
            return storm.differences()
        finally:
            storm.close()


def table(found: Found) -> str:
    """A line per kind of fault, then one per layout."""
    hits = [hit for result in found.values() for hit in result["hits"]]
    lines = ["| fault | times | recovered | steps lost, median | most |", "|---|---|---|---|---|"]
    for fault in KINDS:
        lost = [max(0, hit["at_step"] - hit["back_at_step"]) for hit in hits if
                hit["fault"] == fault]  # fmt: skip
        if lost:
            middle = statistics.median(lost)
            lines.append(f"| {fault} | {len(lost)} | {len(lost)} | {middle:g} | {max(lost)} |")
    lines.append("")
    for layout, result in found.items():
        wrong = result["differences"]
        end = "not done" if wrong is None else "equal bit by bit" if not wrong else ", ".join(wrong)
        lines.append(f"{layout}: {len(result['hits'])} faults, {result['seconds']} s; {end}")
    return "\n".join(lines)


def main() -> int:
    """Run every layout and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=54, help="in all layouts together")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no fault begins after them")
    parser.add_argument("--json", type=Path, help="file of results")
    parser.add_argument("--print", type=Path, metavar="FILE", help="print the table of a file")
    arguments = parser.parse_args()
    if arguments.print is not None:
        print(table(json.loads(arguments.print.read_text())))
        return 0
    layouts = arguments.layout or list(LAYOUTS)
    each = -(-arguments.faults // len(layouts))
    found: Found = {}
    began = time.monotonic()
    for number, layout in enumerate(layouts):
        here = time.monotonic()
        result = found[layout] = {"seconds": 0.0, "hits": [], "differences": None}

        def keep(hits: list[Hit], result: dict[str, Any] = result, here: float = here) -> None:
            result["seconds"] = round(time.monotonic() - here, 1)
            result["hits"] = [asdict(hit) for hit in hits]
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(found, indent=1) + "\n")

        until = began + 60 * arguments.minutes * (number + 1) / len(layouts)
        faults = forecast(each, number * each, arguments.seed + number)
        result["differences"] = weather(layout, faults, arguments.seed + number, until, keep)
        keep([Hit(**hit) for hit in result["hits"]])
        print(table(found), flush=True)
    return int(any(result["differences"] for result in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
