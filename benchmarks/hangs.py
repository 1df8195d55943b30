"""Whether a hang is noticed in time and the rank at fault is the one named, over layouts.

Every case is a run of real processes: a rank drawn at random stops (SIGSTOP), waits for its data,
sleeps in its main thread, or calls into C without letting Python's lock go. The supervisor must
write its event within the deadline plus 5 s, name that rank alone, and end the run.

    python benchmarks/hangs.py --cases 20 --deadline 3
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.end_to_end import hangs
from tests.end_to_end.commands import make_store

GRACE_S = 5.0

LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "pp2": (2, 1, ("parallel.pp=2",)),
    "fsdp2": (2, 1, ("parallel.dp_shard=2",)),
    "dp2": (2, 1, ("parallel.dp_replicate=2", "parallel.dp_shard=1")),
    "tp2": (2, 1, ("parallel.tp=2", "model.num_key_value_heads=2")),
    "dp2 x pp2": (4, 1, ("parallel.pp=2", "parallel.dp_shard=2")),
    "pp2 on 2 machines": (2, 2, ("parallel.pp=2",)),
    "fsdp2 on 2 machines": (2, 2, ("parallel.dp_shard=2",)),
}
"""Ranks, machines and overrides of each layout."""


@dataclass(frozen=True, slots=True)
class Case:
    """One hang and what was said of it."""

    layout: str
    fault: str
    rank: int
    named: tuple[int, ...]
    noticed_s: float
    status: int
    sentence: str

    def right(self, deadline_s: float) -> bool:
        """Whether it was noticed in time, the rank at fault was named alone, and the run ended."""
        in_time = self.noticed_s <= deadline_s + GRACE_S
        return in_time and self.named == (self.rank,) and self.status != 0


def run_case(number: int, folder: Path, deadline_s: float, draw: random.Random) -> Case:
    """Run case ``number``: layouts in turn, faults in turn, the rank by chance."""
    layout = list(LAYOUTS)[number % len(LAYOUTS)]
    fault = hangs.FAULTS[number % len(hangs.FAULTS)]
    ranks, machines, words = LAYOUTS[layout]
    rank = draw.randrange(ranks)
    words = hangs.words(folder, f"case-{number}", deadline_s, *words)
    command, run = hangs.start(words, folder, ranks, machines)
    try:
        hangs.under_way(command, run, at_step=draw.randrange(3, 12))
        since = hangs.hit(command, run, rank, fault)
        event, noticed_s = hangs.noticed(command, run, since)
        status = command.wait()
    finally:
        command.kill()
    named = tuple(event["ranks"])
    return Case(layout, fault, rank, named, noticed_s, status, event["text"])


def table(cases: Sequence[Case], deadline_s: float) -> str:
    """A line per case, and the sum."""
    lines = [f"{'layout':<20}{'fault':<8}{'rank':>5}{'named':>8}{'noticed s':>11}{'status':>8}"]
    for case in cases:
        named = ",".join(map(str, case.named)) or "none"
        wrong = "" if case.right(deadline_s) else f"  <- {case.sentence}"
        lines.append(
            f"{case.layout:<20}{case.fault:<8}{case.rank:>5}{named:>8}{case.noticed_s:>11.2f}"
            f"{case.status:>8}{wrong}"
        )
    good = sum(case.right(deadline_s) for case in cases)
    worst = max((case.noticed_s for case in cases), default=0.0)
    lines.append(
        f"{good} of {len(cases)} right: named alone, within {deadline_s:g} + {GRACE_S:g} s, run "
        f"ended; the latest after {worst:.2f} s"
    )
    return "\n".join(lines)


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--deadline", type=float, default=3.0, help="monitor.hang_s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of all cases")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hangs-"))
    make_store(folder / "web", seed=0)
    cases = []
    for number in range(arguments.first, arguments.first + arguments.cases):
        draw = random.Random(f"{arguments.seed}-{number}")
        cases.append(run_case(number, folder, arguments.deadline, draw))
        print(f"{number}: {cases[-1]}", file=sys.stderr, flush=True)
    print(table(cases, arguments.deadline))
    if arguments.out is not None:
        plain = {"time": time.time(), "deadline_s": arguments.deadline}
        found = {**plain, "cases": [asdict(case) for case in cases]}
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    shutil.rmtree(folder)
    return 0 if all(case.right(arguments.deadline) for case in cases) else 1


if __name__ == "__main__":
    raise SystemExit(main())
