"""The same bytes from every executor, any number of workers, and after random kills.

Runs one pipeline with one local worker, then with 2 and 4, on a local Ray cluster and on a Slurm of
its own (tests/slurm_cluster.py), and compares the digests of all files that do not tell the time.
Then each executor runs it again while processes chosen at random, workers and drivers, are killed
with signal 9 at random moments; a dead driver is followed by the same command.

    python -m benchmarks.data_faults out=/data/faults 'input=/data/corpus/warc/git-doc*.warc.gz'
    python -m benchmarks.data_faults out=/data/faults input=crawl kills=20 executors=local,ray
"""

import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import workers_of
from llmtrain.errors import ConfigError
from tests.slurm_cluster import SlurmCluster

DEFAULTS = {
    "out": "", "input": "", "kills": "20", "executors": "local,ray,slurm", "pipeline": "c4_fast",
    "seed": "0", "json": "",
}  # fmt: skip
ASIDE = {"timing.json", "funnel.json", "inputs.json", "report.html", ".lock"}
"""Files that tell the time, or say where things are."""
WAITS = {
    "local": ["executor=local"],
    "ray": ["executor=ray"],
    "slurm": ["executor=slurm", "slurm.poll_s=1"],
}


@dataclass
class Trial:
    """Runs of one pipeline in one place."""

    folder: Path
    common: list[str]
    environment: dict[str, str] | None
    """Of the commands; None is that of this process."""

    def command(self, out: Path, executor: str, num_workers: int) -> list[str]:
        """Return the command line of a run."""
        words = [sys.executable, "-m", "data_pipeline", "run", *self.common, *WAITS[executor]]
        return [*words, f"out={out}", f"num_workers={num_workers}"]

    def start(self, out: Path, executor: str, num_workers: int) -> "subprocess.Popen[bytes]":
        """Start a driver; what it says goes to a file."""
        with out.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                self.command(out, executor, num_workers), env=self.environment, stderr=log,
                stdout=log,
            )  # fmt: skip

    def whole(self, executor: str, num_workers: int) -> tuple[dict[str, str], float]:
        """Run without faults; returns the digests and the seconds."""
        out = self.fresh(f"{executor}-{num_workers}")
        started = time.monotonic()
        status = self.start(out, executor, num_workers).wait()
        if status:
            raise SystemExit(f"{out}: status {status}, see {out.with_suffix('.log')}")
        return digests(out), time.monotonic() - started

    def fresh(self, name: str) -> Path:
        """Return a folder that is not there."""
        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".log").unlink(missing_ok=True)
        return out

    def killed(
        self, executor: str, kills: int, seconds: float, rng: random.Random
    ) -> tuple[list[dict[str, str]], Counter[str]]:
        """Run until that many processes were killed and a run is finished; digests of every run.

        The moments are spread over the time of a run without faults; a run that ends before all
        kills were done is followed by another in a fresh folder.
        """
        found: list[dict[str, str]] = []
        done: Counter[str] = Counter()
        while done["workers"] + done["drivers"] < kills or not found:
            out = self.fresh(f"{executor}-kills-{len(found)}")
            while True:
                driver, before = self.start(out, executor, 2), done["workers"]
                self._harass(driver, executor, kills, 1.5 * seconds / kills, rng, done)
                status = driver.wait()
                if status == 0:
                    break
                done["third attempts"] += 0 if status == -signal.SIGKILL else 1
                # a driver that gave up has tried a task as often as its workers were killed
                gave_up = status == 2 and done["workers"] - before >= 3
                if status not in (-signal.SIGKILL, 1) and not gave_up:
                    raise SystemExit(f"{out}: status {status}, see {out.with_suffix('.log')}")
            found.append(digests(out))
        return found, done

    def _harass(
        self, driver: "subprocess.Popen[bytes]", executor: str, kills: int, mean_s: float,
        rng: random.Random, done: Counter[str],
    ) -> None:  # fmt: skip
        """Kill workers of a driver until it ends, or kill the driver."""
        while driver.poll() is None and done["workers"] + done["drivers"] < kills:
            deadline = time.monotonic() + rng.expovariate(1 / mean_s)
            while time.monotonic() < deadline and driver.poll() is None:
                time.sleep(0.01)
            workers = workers_of(driver.pid, executor)
            if not workers or driver.poll() is not None:
                continue
            if rng.random() < 0.3:
                driver.kill()
                done["drivers"] += 1
                driver.wait()
                return
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                done["workers"] += 1


def digests(out: Path) -> dict[str, str]:
    """Digest of every file below a pipeline's folder that does not tell the time."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in ASIDE]
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if ".slurm" not in p.parts
    }


def main(arguments: list[str]) -> int:
    """Run all trials; returns 1 if any bytes differ."""
    overrides = [a for a in arguments if "." in a.partition("=")[0]]
    given = dict(a.partition("=")[::2] for a in arguments if a not in overrides)
    options = {**DEFAULTS, **given}
    executors = options["executors"].split(",")
    if given.keys() - DEFAULTS.keys() or not options["out"] or not options["input"]:
        raise ConfigError(
            f"found {sorted(given)}, expected out=DIR input=PATH, and of {DEFAULTS} and "
            "pipeline.key=value what is to be otherwise"
        )
    folder = Path(options["out"]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    common = [f"pipeline={options['pipeline']}", f"input.crawl={options['input']}", *overrides]
    with ExitStack() as stack:
        environment = None
        if "slurm" in executors:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-"))
            environment = stack.enter_context(SlurmCluster(Path(place))).environment
        result = compare(Trial(folder, common, environment), executors, options)
    print(json.dumps(result, indent=1))
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["all_equal"] else 1


def compare(trial: Trial, executors: list[str], options: dict[str, str]) -> dict[str, object]:
    """Run everything; returns what was found."""
    reference, alone_s = trial.whole("local", 1)
    rows: list[dict[str, object]] = []
    print(f"local, 1 worker: {len(reference)} files, {alone_s:.1f} s", flush=True)
    for executor in executors:
        seconds = alone_s
        for workers in (2, 4) if executor == "local" else (2,):
            found, seconds = trial.whole(executor, workers)
            rows.append({"executor": executor, "workers": workers, "equal": found == reference})
            print(
                f"{executor}, {workers} workers: {rows[-1]['equal']}, {seconds:.1f} s", flush=True
            )
        rng = random.Random(f"{options['seed']} {executor}")
        runs, done = trial.killed(executor, int(options["kills"]), seconds, rng)
        equal = all(found == reference for found in runs)
        rows.append({"executor": executor, "runs": len(runs), "killed": dict(done), "equal": equal})
        print(f"{executor}, killed {dict(done)} in {len(runs)} runs: {equal}", flush=True)
    return {
        "input": options["input"], "pipeline": options["pipeline"], "files": len(reference),
        "seconds_alone": round(alone_s, 1), "trials": rows,
        "all_equal": all(row["equal"] for row in rows), "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"error: {error}")
