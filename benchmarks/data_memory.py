"""Memory of the workers of a data pipeline over more text than they may hold.

Makes a corpus of ``megabytes`` of text in which half of the documents share one key (a line, an
address, the whole text), runs the pipeline under a budget of 150 MB for each worker, and samples
what is theirs alone (USS: RSS less shared pages) every 20 ms. The driver and the daemons of Ray are
aside. Fails if a worker ever had more than the budget.

    python -m benchmarks.data_memory out=/data/memory
    python -m benchmarks.data_memory out=/data/memory megabytes=80 share=text executor=ray
"""

import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.processes import MemoryWatch, workers_of
from llmtrain.errors import ConfigError

BUDGET_MB = 150
STAGES = "[url,c4,line_dedup,exact,minhash]"
DEFAULTS = {
    "out": "", "megabytes": "750", "share": "line", "executor": "local", "num_workers": "2",
    "stages": STAGES, "pipeline": "c4_fast", "json": "",
}  # fmt: skip
SHARED = "Every second page of this site carries the same notice, word for word, at its end."
FILE_BYTES = 48_000_000
_WORDS = 40_000


def main(arguments: list[str]) -> int:
    """Make the corpus if it is not there, run, and print the peaks."""
    overrides = [a for a in arguments if "." in a.partition("=")[0]]
    given = dict(a.partition("=")[::2] for a in arguments if a not in overrides)
    unknown = given.keys() - DEFAULTS.keys()
    options = {**DEFAULTS, **given}
    if unknown or not options["out"] or options["share"] not in ("line", "url", "text"):
        raise ConfigError(
            f"found {sorted(given)}, expected out=DIR [megabytes=750] [share=line|url|text] "
            "[executor=local|ray|slurm] [num_workers=2] [stages=[...]] [pipeline=NAME] "
            "[json=FILE] [pipeline.key=value ...]"
        )
    folder = Path(options["out"]).resolve() / f"{options['share']}-{options['megabytes']}"
    text_bytes = make_corpus(folder / "corpus", int(options["megabytes"]), options["share"])
    result = run(folder, options, overrides)
    result |= {"text_mb": round(text_bytes / 1e6, 1), "share": options["share"]}
    print(json.dumps(result, indent=1))
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["peak_uss_mb"] <= result["budget_mb"] else 1


def make_corpus(folder: Path, megabytes: int, share: str) -> int:
    """Write JSONL files of about that much text; returns its bytes."""
    done = folder / "corpus.json"
    if done.is_file():
        return int(json.loads(done.read_text())["text_bytes"])
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(megabytes)
    words = [
        "".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 11))) for _ in range(_WORDS)
    ]
    number = total = 0
    while total < megabytes * 1_000_000:
        path = folder / f"part-{number // 1_000_000:05d}-{total // FILE_BYTES:05d}.jsonl"
        with path.open("a") as file:
            size = 0
            while size < FILE_BYTES and total + size < megabytes * 1_000_000:
                row = page(rng, words, number, share)
                file.write(json.dumps(row) + "\n")
                size += len(row["text"])
                number += 1
        total += size
    done.write_text(json.dumps({"text_bytes": total, "documents": number}))
    return total


def page(rng: random.Random, words: list[str], number: int, share: str) -> dict[str, str]:
    """One document; every second one has the shared key."""
    shares = number % 2 == 0
    lines = [
        " ".join(rng.choices(words, k=rng.randint(8, 40))).capitalize() + "."
        for _ in range(rng.randint(8, 40))
    ]
    text = "\n".join([*lines, SHARED] if shares and share == "line" else lines)
    if shares and share == "text":
        text = "\n".join([SHARED] * 4 + ["It is as long as a short page has to be to stay."] * 3)
    url = "https://example.org/shared" if shares and share == "url" else ""
    return {"text": text, "url": url or f"https://example.org/{number}", "timestamp": ""}


def run(folder: Path, options: dict[str, str], overrides: list[str]) -> dict[str, object]:
    """Run the pipeline under the budget; returns what was measured."""
    out = folder / f"out-{options['executor']}-{time.time_ns()}"
    memory_gib = BUDGET_MB * 1e6 / 2**30
    command = [
        sys.executable, "-m", "data_pipeline", "run", f"pipeline={options['pipeline']}",
        f"pipeline.memory_gib={memory_gib:.4f}", f"pipeline.stages={options['stages']}",
        f"input.memory={folder / 'corpus'}/*.jsonl", f"out={out}",
        f"executor={options['executor']}", f"num_workers={options['num_workers']}", *overrides,
    ]  # fmt: skip
    started = time.monotonic()
    driver = subprocess.Popen(command)

    def phase() -> str:
        """The stage that is at work: the last one begun."""
        return max((path.name for path in (out / "stages").glob("*")), default="start")

    watch = MemoryWatch(lambda: workers_of(driver.pid, options["executor"]), phase)
    with watch:
        status = driver.wait()
    if status:
        raise SystemExit(f"{out}: the pipeline ended with status {status}")
    peaks = {name: round(peak / 1e6, 1) for name, peak in sorted(watch.peaks.items())}
    return {
        "executor": options["executor"], "num_workers": int(options["num_workers"]),
        "budget_mb": BUDGET_MB, "peak_uss_mb": max(peaks.values()),
        "peak_uss_mb_by_stage": peaks, "peak_rss_mb": round(watch.peak_rss / 1e6, 1),
        "samples": watch.samples, "seconds": round(time.monotonic() - started, 1),
        "machine": platform.platform(), "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"error: {error}")
