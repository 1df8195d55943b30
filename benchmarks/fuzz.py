"""Feeds damaged input to the readers for some minutes and reports what breaks.

Cases are random bytes and real records with random changes, as WARC, HTML, JSONL (five kinds of
compression) and Parquet; tests/fuzzing.py says what has to hold. They run in a process of their
own, so that a case that kills it or never ends is found too. A case is named by kind and seed.

    python -m benchmarks.fuzz --minutes 10
    python -m benchmarks.fuzz --case warc 1234
"""

import argparse
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

from tests.fuzzing import KINDS, check, random_case

CASE_SECONDS = 60.0
"""A case that takes longer hangs."""


def run_child(first: int, seconds: float) -> None:
    """Run cases from seed ``first`` on, saying before and after each what it is and what became."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for seed in count(first):
            for kind in KINDS:
                say({"begin": kind, "seed": seed})
                say({"kind": kind, "seed": seed, "result": outcome(kind, seed, Path(folder) / "x")})
            if time.monotonic() > end:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say({"peak_mib": round(peak)})


def say(message: dict[str, Any]) -> None:
    """Write one line to the parent."""
    print(json.dumps(message), flush=True)


def outcome(kind: str, seed: int, folder: Path) -> str:
    """Run one case: ``read``, ``refused``, or what went wrong."""
    try:
        return check(random_case(random.Random(f"{kind} {seed}"), kind), folder)
    except Exception:  # whatever it is, it is what is looked for
        return traceback.format_exc()


class Child:
    """A process that runs cases."""

    def __init__(self, first: int, seconds: float) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "benchmarks.fuzz",
             "--child", str(first), str(seconds)],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self._rest = b""

    def messages(self) -> Any:
        """Yield what it says until it ends; a process that says nothing for long is killed."""
        assert self.process.stdout is not None  # noqa: S101
        handle = self.process.stdout.fileno()
        while select.select([handle], [], [], CASE_SECONDS)[0]:
            data = os.read(handle, 1 << 16)
            if not data:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from map(json.loads, lines)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def fuzz(minutes: float, seed: int) -> dict[str, Any]:
    """Run cases for some minutes; return how many there were and those that failed."""
    end = time.monotonic() + 60 * minutes
    results: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    peak = 0
    while (left := end - time.monotonic()) > 0:
        child, begun = Child(seed, left), None
        for message in child.messages():
            if "begin" in message:
                begun = message
            elif "peak_mib" in message:
                peak = max(peak, message["peak_mib"])
            else:
                begun, seed = None, message["seed"]
                known = message["result"] in ("read", "refused")
                results[f"{message['kind']} {message['result'] if known else 'failed'}"] += 1
                if not known:
                    failures.append(message)
        if begun is not None:
            failures.append({**begun, "result": f"ended with {child.process.returncode}"})
            seed = begun["seed"]
        seed += 1
    return {
        "minutes": minutes, "cases": results.total(), "results": dict(sorted(results.items())),
        "peak_mib": peak, "failures": failures,
    }  # fmt: skip


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one; others follow it")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"), help="run one case again")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(int(options.child[0]), float(options.child[1]))
        return 0
    if options.case:
        kind, seed = options.case
        with tempfile.TemporaryDirectory() as folder:
            result = outcome(kind, int(seed), Path(folder) / "x")
        print(result)
        return result not in ("read", "refused")
    report = fuzz(options.minutes, options.seed)
    print(json.dumps(report, indent=1))
    return bool(report["failures"])


if __name__ == "__main__":
    sys.exit(main())
