"""Reading training windows: the project's loader beside a bare memory map and four peers.

All read windows of the same sequence length from the same ``.bin`` files (litdata from a copy in
its own format), two sources mixed 7 to 3, one process each, in turn within one run; what counts is
the median of the rounds' ratios of processor time, at each size of batch. A token costs the project
28 bytes: inputs and targets int64, positions and document ids int32, weights float32. The bare map
(``raw``) gives 8, one int64 window; ``by_hand`` 16, inputs and targets stacked as short training
scripts have them; the peers what they return at their cheapest. Then, in fresh processes with their
files in the page cache: seconds from the first call (imports are done) to the first batch, for
stores of many sizes.

    python benchmarks/loader.py out=/data/loader
    python benchmarks/loader.py out=/tmp/loader tokens=2e7 rounds=3 batches=50 json=/tmp/loader.json
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loader_corpus import dense, sparse
from reporting import commit, host, note, rounded, versions
from worker import Worker, WorkerError

from llmtrain.data.manifest import read_manifest
from llmtrain.errors import ConfigError, DataError

HERE = Path(__file__).resolve().parent
PEER = Path("/data/peer-loader/.venv/bin/python")
PEERS = ("megatron", "grain", "litdata", "nanotron")
PACKAGES = ("megatron-core", "grain", "litdata", "datatrove", "torch", "numpy")
START_BATCH = 8
"""Windows of the first batch where starting is measured."""
SHARES = {"first": 0.7, "second": 0.3}
BARS = {"raw": 0.7, "peer": 2.0, "start": 100.0, "start_s": 1.0}
"""Speed over raw at least; over the best peer at least; start at 10^9 tokens over Megatron-Core's
at least; seconds to the first batch at most, whatever the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    out: Path
    """Folder for stores, copies and indices."""
    tokens: float = 4e8
    """Tokens of the dense stores together."""
    sequence_length: int = 2048
    """Inputs of a window; one more token is read."""
    batch: tuple[int, ...] = (64, 256)
    """Windows of a batch; every size is measured."""
    batches: int = 50
    """Batches of a round and side, of the largest size; of a smaller one as many windows."""
    rounds: int = 9
    """Rounds; the sides change their order from one to the next."""
    starts: int = 5
    """Starts per size and side."""
    part: tuple[str, ...] = ("speed", "start")
    """What to measure."""
    peer: Path = PEER
    """Interpreter that has the peers."""
    json: Path = HERE / "results/loader.json"
    """File of results."""


KINDS: dict[str, Any] = {
    "out": Path, "tokens": float, "sequence_length": int, "batches": int,
    "rounds": int, "starts": int, "peer": Path, "json": Path,
    "part": lambda names: tuple(names.split(",")),
    "batch": lambda sizes: tuple(int(size) for size in sizes.split(",")),
}  # fmt: skip
STARTS: tuple[tuple[str, dict[str, int], tuple[str, ...]], ...] = (
    ("10^9 tokens, 8 shards, 10^6 documents",
     {"num_tokens": 10**9, "num_shards": 8, "document_tokens": 1_000}, ("ours", "megatron")),
    ("10^11 tokens, 1,000 shards, 10^6 documents",
     {"num_tokens": 10**11, "num_shards": 1_000, "document_tokens": 100_000}, ("ours",)),
    ("10^12 tokens, 10,000 shards, 10^6 documents",
     {"num_tokens": 10**12, "num_shards": 10_000, "document_tokens": 1_000_000}, ("ours",)),
)  # fmt: skip
"""Sparse stores: what to call them, how to make them, who opens them."""


def started(side: str, options: Options) -> Worker:
    """Start the process of one side; a log in ``options.out`` gets what it says."""
    own = side not in PEERS
    script = HERE / "peers" / ("loader_own.py" if own else f"loader_{side}.py")
    return Worker(
        side, [sys.executable if own else str(options.peer), str(script), side],
        options.out / "log.txt", HF_HUB_OFFLINE=1, OMP_NUM_THREADS=1, PYTHONWARNINGS="ignore",
    )  # fmt: skip


def ask(worker: Worker, stage: str, **arguments: Any) -> dict[str, Any]:
    """Have a worker run a stage; what it returned."""
    result: dict[str, Any] = worker.ask({"stage": stage, **arguments})["result"]
    return result


def main(arguments: Sequence[str]) -> int:
    """Measure, write the results and print the tables."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.json.read_text()) if options.json.is_file() else {}
    report |= machine(options, arguments)
    if "speed" in options.part:
        report["speed"] = {str(size): speed(options, size) for size in options.batch}
    if "start" in options.part:
        report["start"] = start(options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rounded(report), indent=1) + "\n")
    print(table(report))
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if sorted(set(given) - set(KINDS)) or "out" not in given:
        raise ConfigError(f"found {sorted(given)}; expected out=DIR and any of {', '.join(KINDS)}")
    options = Options(**{name: KINDS[name](value) for name, value in given.items()})
    if not options.peer.is_file():
        raise ConfigError(f"peer={options.peer} is no interpreter; install the peers and name it")
    return options


def request(
    stores: Mapping[str, Path],
    shares: Mapping[str, float],
    options: Options,
    batch: int,
    num_batches: int,
) -> Any:
    """Return what every side is told of its data."""
    sources = {}
    for name, store in stores.items():
        shards = [(str(store / s.name), s.num_tokens) for s in read_manifest(store).shards]
        sources[name] = {"store": str(store), "shards": shards, "share": shares[name]}
    return {
        "sources": sources, "sequence_length": options.sequence_length, "batch_size": batch,
        "num_batches": num_batches, "scratch": str(options.out),
    }  # fmt: skip


def speed(options: Options, batch: int) -> dict[str, Any]:
    """Read batches of one size in rounds; the first round warms up."""
    stores = {
        name: dense(
            options.out / f"{name}-{options.tokens:.0e}", num_tokens=int(options.tokens / 2),
            num_shards=2, seed=seed,
        )
        for seed, name in enumerate(SHARES)
    }  # fmt: skip
    sides = ("raw", "by_hand", "ours", *PEERS)
    batches = options.batches * max(options.batch) // batch
    told = request(stores, SHARES, options, batch, (options.rounds + 1) * batches + 1)
    workers = {side: started(side, options) for side in sides}
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    try:
        for side in sides:
            shape = ask(workers[side], "start", **told)["shape"]
            if shape != [batch, options.sequence_length]:
                raise DataError(f"{side} gave inputs of shape {shape}")
        for number in range(options.rounds + 1):
            note(f"batches of {batch}: round {number} of {options.rounds}")
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                answer = ask(workers[side], "read", num_batches=batches)
                if number:
                    measured[side].append(answer)
    finally:
        for worker in workers.values():
            worker.close()
    tokens = batches * batch * (options.sequence_length + 1)
    return {side: summary(runs, measured["ours"], tokens) for side, runs in measured.items()}


def summary(
    runs: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]], tokens: int
) -> dict[str, Any]:
    """Return speeds, and by how much the project is faster in the same round."""
    ratios = [run["cpu_s"] / own["cpu_s"] for run, own in zip(runs, ours, strict=True)]
    walls = [run["wall_s"] / own["wall_s"] for run, own in zip(runs, ours, strict=True)]
    return {
        "tokens_per_cpu_s": tokens / statistics.median(run["cpu_s"] for run in runs),
        "tokens_per_wall_s": tokens / statistics.median(run["wall_s"] for run in runs),
        "ours_is_faster_by": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        "by_wall": statistics.median(walls),
        "cpu_s": [run["cpu_s"] for run in runs], "wall_s": [run["wall_s"] for run in runs],
    }  # fmt: skip


def start(options: Options) -> dict[str, Any]:
    """Start fresh processes on stores of several sizes, the sides in turn."""
    results: dict[str, Any] = {}
    for name, how, sides in STARTS:
        store = sparse(options.out / f"sparse-{how['num_tokens']:.0e}", **how)
        num_batches = how["num_tokens"] // START_BATCH // options.sequence_length
        told = request({"first": store}, {"first": 1.0}, options, START_BATCH, num_batches)
        answers: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(options.starts + 1):  # the first one fills the page cache
            note(f"start {number} of {options.starts}: {name}")
            for side in sides:
                worker = started(side, options)
                answer = ask(worker, "start", **told)
                worker.close()
                if number:
                    answers[side].append(answer)
        results[name] = {
            side: {
                key: statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s")
            } | {"all_wall_s": [run["wall_s"] for run in runs]}
            for side, runs in answers.items()
        }  # fmt: skip
        if "megatron" in sides:
            ratios = [
                theirs["cpu_s"] / own["cpu_s"]
                for theirs, own in zip(answers["megatron"], answers["ours"], strict=True)
            ]
            results[name]["ours_is_faster_by"] = statistics.median(ratios)
    return results


def machine(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on and with."""
    settings = {name: str(value) for name, value in asdict(options).items()}
    return {
        "machine": host(),
        "commit": commit(), "packages": versions(options.peer, PACKAGES), "options": settings,
        "command": " ".join(["python benchmarks/loader.py", *arguments]),
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = []
    for size, sides in report.get("speed", {}).items():
        lines += [
            f"\nWindows of a batch: {size}\n",
            "| side | million tokens/s per core | on the wall | ours is faster by | rounds | bar |",
            "|---|---|---|---|---|---|",
        ]
        best = min((sides[p]["ours_is_faster_by"], p) for p in PEERS)[1]
        bars = {"raw": BARS["raw"], best: BARS["peer"]}
        for side, r in sides.items():
            lines.append(
                f"| {side} | {r['tokens_per_cpu_s'] / 1e6:.1f} | {r['tokens_per_wall_s'] / 1e6:.1f}"
                f" | {r['ours_is_faster_by']:.2f} | {r['least']:.2f} to {r['most']:.2f} "
                f"| {bars.get(side, '')} |"
            )
    if "start" in report:
        lines += ["", "| store | side | seconds to the first batch | CPU s | ours is faster by |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for name, sides in report["start"].items():
            faster = sides.get("ours_is_faster_by")
            for side in (s for s in ("ours", "megatron") if s in sides):
                r, ratio = sides[side], "" if side == "ours" else f"{faster:.0f}"
                lines.append(
                    f"| {name} | {side} | {r['wall_s']:.3f} | {r['cpu_s']:.3f} | {ratio} |"
                )
        lines.append(
            f"\nBars: {BARS['start']:.0f} times at 10^9 tokens; {BARS['start_s']:.0f} s at any size"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError, WorkerError) as error:
        sys.exit(f"error: {error}")
