"""Runs of four ranks under faults at random moments, each beside one that nobody touches.

Killed ranks, SIGTERM, stopped ranks, kills inside a save, a killed supervisor, damaged checkpoints
and a full disk, in every layout; the same command is started until the run is done. In the end its
parameters, optimizer state and losses must be those of the undisturbed run, bit by bit.

    python benchmarks/chaos.py --faults 54 --json benchmarks/results/chaos.json

Needs root for the full disk (a tmpfs of its own); elsewhere that fault is left out, and said so.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.end_to_end.chaos import FILES, FULL_DISK, LAYOUTS, PROCESSES, SAVE_EVERY, Hit, Storm

STEPS_PER_FAULT = 2 * SAVE_EVERY


def weather(layout: str, num_faults: int, seed: int, folder: Path) -> tuple[list[Hit], list[str]]:
    """Hit a run of ``layout``; the faults, and what differs in the end."""
    kinds = [*PROCESSES, *FILES, *([FULL_DISK] if os.geteuid() == 0 else [])]
    faults = (kinds * (num_faults // len(kinds) + 1))[:num_faults]
    random.Random(seed).shuffle(faults)
    storm = Storm(
        folder, LAYOUTS[layout], seed, num_steps=(num_faults + 2) * STEPS_PER_FAULT,
        own_disk=os.geteuid() == 0,
    )  # fmt: skip
    hits = []
    try:
        for fault in faults:
            hits.append(storm.hit(fault))
            print(f"{layout}: {hits[-1]}", file=sys.stderr, flush=True)
        storm.finish()
        return hits, storm.differences()
    finally:
        storm.close()


def table(hits: Sequence[Hit]) -> str:
    """A line per kind of fault."""
    lines = ["| fault | times | recovered | steps lost, median | most |", "|---|---|---|---|---|"]
    for fault in [*PROCESSES, *FILES, FULL_DISK]:
        lost = [hit.steps_lost for hit in hits if hit.fault == fault]
        if lost:
            most = max(lost)
            lines.append(
                f"| {fault} | {len(lost)} | {len(lost)} | {statistics.median(lost):g} | {most} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Run every layout and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=54, help="in all layouts together")
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file of results")
    arguments = parser.parse_args()
    layouts = arguments.layout or list(LAYOUTS)
    each = -(-arguments.faults // len(layouts))
    found: dict[str, dict[str, object]] = {}
    every: list[Hit] = []
    for number, layout in enumerate(layouts):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            hits, wrong = weather(layout, each, arguments.seed + number, Path(folder))
        every += hits
        found[layout] = {
            "seconds": round(time.monotonic() - began, 1),
            "hits": [asdict(hit) for hit in hits],
            "differences": wrong,
        }
        end = "equal bit by bit" if not wrong else f"differs: {', '.join(wrong)}"
        print(f"{layout}: {len(hits)} faults, {found[layout]['seconds']} s; in the end {end}")
    print(table(every))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(result["differences"] for result in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
