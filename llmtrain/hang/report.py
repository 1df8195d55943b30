"""What a hang leaves in the folder of the run: an event, stacks, states, flight records.

Invariant: a full disk or a missing right loses a file, never the verdict: that is on the console.

    folder = write_event(job, sights, verdict, ends=True)    # RUN/hang/attempt-1-step-12
    write_ranks(folder, sights, stacks)                      # rank0.txt, rank1.txt, ...
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from llmtrain import json_lines
from llmtrain.hang.job import Job, record_path
from llmtrain.hang.stacks import py_spy
from llmtrain.hang.verdict import Sight, Verdict


def write_event(job: Job, sights: Sequence[Sight], verdict: Verdict, ends: bool) -> Path:
    """Say it on the console, to rank 0 and in events.jsonl; gives the folder for the rest."""
    step = max(0, min((sight.step for sight in sights), default=1) - 1)
    path = job.run / "events.jsonl"
    attempt = 1
    with suppress(OSError):
        attempt = max((event["attempt"] for event in json_lines.read(path)), default=1)
    folder = job.run / "hang" / f"attempt-{attempt}-step-{step}"
    then = "the run is ended" if ends else "the run is left as it is"
    text = f"{verdict.sentence}; {then}; stacks in {folder}"
    event = {"time": time.time(), "step": step, "attempt": attempt, "kind": "hang", "text": text}
    with suppress(OSError):
        json_lines.append(path, {**event, "ranks": list(verdict.guilty)})
    with suppress(OSError):
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
    with suppress(OSError):
        os.write(1, f"{text}\n".encode())
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        plain = {"guilty": verdict.guilty, "sentence": text, "ranks": [asdict(s) for s in sights]}
        (folder / "verdict.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return folder


def write_status(job: Job, step: int) -> None:
    """Say in status.json, in place of rank 0, how the run ended: code 1, hung."""
    path = job.run / "status.json"
    beside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    status = {"code": 1, "reason": "hung", "step": max(0, step)}
    with suppress(OSError):
        beside.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)


def write_ranks(folder: Path, sights: Sequence[Sight], stacks: Mapping[int, str]) -> None:
    """One file per rank: what was seen of it, its stacks, and py-spy's where that is installed."""
    for sight in sights:
        parts = [
            f"rank {sight.rank}, process {sight.pid} on {sight.host}, {sight.where}, "
            f"still for {sight.still_s:.1f} s",
            *_proc(sight.pid),
            stacks.get(sight.rank, "no stacks: the process did not answer"),
        ]
        native = py_spy(sight.pid)
        if native is not None:
            parts.append(f"py-spy:\n{native}")
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            text = "\n\n".join(parts) + "\n"
            (folder / f"rank{sight.rank}.txt").write_text(text, encoding="utf-8")


def has_records(beats: Path, ranks: Iterable[int]) -> bool:
    """Whether these ranks have all written their flight records."""
    return all(record_path(beats, rank).exists() for rank in ranks)


def move_records(beats: Path, folder: Path, ranks: Iterable[int]) -> None:
    """Put the flight records beside the stacks."""
    for rank in ranks:
        with suppress(OSError):
            shutil.move(record_path(beats, rank), folder / f"rank{rank}.flight.json")


def _proc(pid: int) -> list[str]:
    """State, and what the kernel waits for, of a process."""
    lines = []
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        lines += [line for line in status if line.startswith(("State", "Threads", "VmRSS"))]
    with suppress(OSError):
        lines.append(f"wchan\t{Path(f'/proc/{pid}/wchan').read_text(encoding='utf-8')}")
    return ["\n".join(lines)] if lines else []
