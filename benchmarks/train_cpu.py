"""Training on a CPU: the project's engine and loop beside transformers, litgpt and a plain loop.

All train the same LLaMA from the same start weights on the same batches, with fused AdamW, clipping
at 1.0 and the same precision (bf16: autocast or what does the same, fp32 master weights); that the
first losses agree is checked. Every side is a process of its own with its own loop (peers/train_*),
steps are taken in turn, and what counts is the median of the rounds' ratios of wall time to the
best peer, compiled or not. ``small``: vocabulary 16,384 and one document a row; ``packed``:
vocabulary 128,256 and many documents a row, which litgpt and the plain loop do not mask. ``part=
overhead``: the part of our step that is neither forward nor backward nor optimizer, clip and
metrics counted as overhead.

    python benchmarks/train_cpu.py out=/data/train size=25m
    python benchmarks/train_cpu.py out=/data/train size=125m precision=bf16
    python benchmarks/train_cpu.py out=/tmp/t quick=true size=25m precision=fp32 json=/tmp/t.json
    python benchmarks/train_cpu.py table

The peers: python3 -m venv /data/peer-train && /data/peer-train/bin/pip install torch==2.13.0 \\
transformers==5.23.0 accelerate==1.15.0 litgpt==0.5.9 numpy==1.26.4, with torch from
https://download.pytorch.org/whl/cpu. A run of one size and precision takes 15 to 45 minutes on 2
cores (125m packed needs 18 GB); results of earlier runs stay in the file.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reporting import note, rounded
from train_cpu_table import BARS, machine, table
from worker import Worker, WorkerError

from llmtrain.errors import ConfigError, DataError

HERE = Path(__file__).resolve().parent
PEERS = ("transformers", "litgpt", "plain")
MASKED = ("ours", "transformers")
"""Sides that keep packed documents apart."""
SIZES: dict[str, dict[str, int]] = {
    "25m": {"hidden_size": 512, "intermediate_size": 1408, "num_layers": 6, "num_heads": 8},
    "125m": {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2},
}  # fmt: skip
LOADS: dict[str, dict[str, int]] = {
    "small": {"vocab_size": 16_384, "sequence_length": 512, "rows": 2},
    "packed": {
        "vocab_size": 128_256, "sequence_length": 1024, "rows": 1, "document_tokens": 128,
    },
}  # fmt: skip
AGREE = {"fp32": 1e-3, "bf16": 5e-3}
"""Largest difference of first losses."""
UNMASKED = 0.1
"""The same of sides that see other documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    out: Path
    """Folder for logs and compiled code."""
    size: tuple[str, ...] = ("25m", "125m")
    precision: tuple[str, ...] = ("fp32", "bf16")
    load: tuple[str, ...] = ("small", "packed")
    side: tuple[str, ...] = PEERS
    """Peers to run."""
    part: tuple[str, ...] = ("speed", "overhead")
    """What to measure."""
    rounds: int = 5
    """Steps of each side that count; two more warm up."""
    threads: int = 2
    """Threads of each side."""
    quick: bool = False
    """Half the rows or tokens, one round less of warm-up, two rounds: for a trial."""
    peer: Path = Path("/data/peer-train/bin/python")
    """Interpreter that has the peers."""
    json: Path = HERE / "results/train_cpu.json"
    """File of results."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


KINDS: dict[str, Any] = {
    "out": Path, "size": _names, "precision": _names, "load": _names, "side": _names,
    "part": _names, "rounds": int, "threads": int, "quick": lambda text: text == "true",
    "peer": Path, "json": Path,
}  # fmt: skip


class Side:
    """The process of one side, with the case it trains."""

    def __init__(self, side: str, case: Mapping[str, Any], options: Options, watch: bool = False):
        """Start it and take its first step, in which it compiles where it is asked to."""
        self.name = side + (" compiled" if case["compile"] else "")
        script = HERE / "peers" / f"train_{'own' if side == 'ours' else side}.py"
        python = sys.executable if side == "ours" else str(options.peer)
        self._worker = Worker(
            self.name, [python, str(script), *(["watch"] if watch else [])],
            options.out / "log.txt", HF_HUB_OFFLINE=1, PYTHONWARNINGS="ignore",
            OMP_NUM_THREADS=case["threads"],
            TORCHINDUCTOR_CACHE_DIR=options.out.resolve() / f"code-{side}",
        )  # fmt: skip
        self.first_loss: float = self._worker.ask(case)["losses"][0]

    def step(self) -> dict[str, Any]:
        """Take a step; its seconds, loss and peak memory."""
        return self._worker.ask({"steps": 1})

    def close(self) -> None:
        """Let it end."""
        self._worker.close()


def main(arguments: Sequence[str]) -> int:
    """Measure, write the results and print the tables."""
    if list(arguments) == ["table"]:
        print(table(json.loads((HERE / "results/train_cpu.json").read_text())))
        return 0
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.json.read_text()) if options.json.is_file() else {}
    ran = machine(options.peer, ["python benchmarks/train_cpu.py", *arguments])
    for size in options.size:
        for precision in options.precision:
            for load in options.load:
                name = f"{size} {precision} {load}"
                case = case_of(size, precision, load, options)
                for part in options.part:
                    found = (speed if part == "speed" else overhead)(name, case, options)
                    report.setdefault(part, {})[name] = found | {"case": case, "ran": ran}
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
    known = {"size": SIZES, "precision": AGREE, "load": LOADS, "side": PEERS}
    for field, names in known.items():
        if unknown := sorted(set(asdict(options)[field]) - set(names)):
            raise ConfigError(f"{field}={','.join(unknown)} is not of {', '.join(names)}")
    if options.side and not options.peer.is_file():
        raise ConfigError(
            f"peer={options.peer} is no interpreter; make it: python3 -m venv /data/peer-train && "
            "/data/peer-train/bin/pip install torch==2.13.0 transformers==5.23.0 "
            "accelerate==1.15.0 litgpt==0.5.9 numpy==1.26.4"
        )
    return options


def case_of(size: str, precision: str, load: str, options: Options) -> dict[str, Any]:
    """What every side is told; ``compile`` is added for each."""
    case: dict[str, Any] = {**SIZES[size], **LOADS[load], "precision": precision}
    if size == "25m" and load == "small":
        case["rows"] *= 2
    if options.quick:
        case["sequence_length"] //= 2
    return case | {"threads": options.threads}


def speed(name: str, case: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Find the faster of ours; train with it beside the peers as they are, then compiled.

    Not all at once: memory would not do.
    """
    runs = together(name, case, options, [("ours", False), ("ours", True)])
    best = min(runs, key=lambda side: wall(runs[side]))
    tokens = case["rows"] * case["sequence_length"]
    sides = {side: summary(found, runs[best], tokens) for side, found in runs.items()}
    for compile_ in (False, True) if options.side else ():
        turns = [("ours", best != "ours"), *((side, compile_) for side in options.side)]
        runs = together(name, case, options, turns)
        sides |= {
            side: summary(found, runs[best], tokens) for side, found in runs.items() if side != best
        }
    theirs = {side: found for side, found in sides.items() if not side.startswith("ours")}
    if not theirs:
        return {"sides": sides, "ours": best}
    rival = min(theirs, key=lambda side: theirs[side]["ours_is_faster_by"])
    least = min(theirs, key=lambda side: theirs[side]["peak_bytes"])
    bars = BARS["packed" if case.get("document_tokens") else "small"]
    found = {
        "sides": sides, "ours": best, "best_peer": rival,
        "ours_over_best_peer": theirs[rival]["ours_is_faster_by"],
        "peak_over_best_peer": sides[best]["peak_bytes"] / theirs[rival]["peak_bytes"],
        "smallest_peer": least,
        "peak_over_smallest_peer": sides[best]["peak_bytes"] / theirs[least]["peak_bytes"],
        "bars": bars,
    }  # fmt: skip
    note(f"{name}: {found['ours_over_best_peer']:.3f} of {rival}")
    return found


def together(
    name: str, case: Mapping[str, Any], options: Options, sides: Sequence[tuple[str, bool]]
) -> dict[str, list[dict[str, Any]]]:
    """Run sides in turn, (name, whether compiled) each; returns their steps."""
    workers: list[Side] = []
    runs: dict[str, list[dict[str, Any]]] = {}
    rounds, warm = (2, 0) if options.quick else (options.rounds, 1)
    try:
        for side, compile_ in sides:
            note(f"{name}: {side}{' compiled' if compile_ else ''} starts")
            workers.append(Side(side, dict(case) | {"compile": compile_}, options))
            runs[workers[-1].name] = []
        check_losses(workers, case)
        for number in range(rounds + warm):
            note(f"{name}: round {number + 1} of {rounds + warm}")
            for worker in workers if number % 2 else reversed(workers):
                answer = worker.step()
                if number >= warm:
                    runs[worker.name].append(answer | {"first_loss": worker.first_loss})
    finally:
        for worker in workers:
            worker.close()
    return runs


def check_losses(workers: Sequence[Worker], case: Mapping[str, Any]) -> None:
    """All must begin with the same loss.

    Raises:
        DataError: a side does other work.
    """
    ours = workers[0].first_loss
    for worker in workers[1:]:
        masks = worker.name.split()[0] in MASKED or not case.get("document_tokens")
        allowed = AGREE[case["precision"]] if masks else UNMASKED
        if abs(worker.first_loss - ours) > allowed:
            raise DataError(
                f"{worker.name} begins with a loss of {worker.first_loss:.5f}, {workers[0].name} "
                f"with {ours:.5f}; expected a difference of at most {allowed}"
            )


def wall(runs: Sequence[Mapping[str, Any]]) -> float:
    """Median seconds of a step."""
    return statistics.median(run["wall_s"] for run in runs)


def summary(
    runs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]], tokens: int
) -> dict[str, Any]:
    """Speeds of a side, and by how much ours is faster in the same rounds."""
    ratios = [run["wall_s"] / own["wall_s"] for run, own in zip(runs, ours, strict=True)]
    cpu = [run["cpu_s"] / own["cpu_s"] for run, own in zip(runs, ours, strict=True)]
    return {
        "tokens_per_s": tokens / wall(runs),
        "tokens_per_cpu_s": tokens / statistics.median(run["cpu_s"] for run in runs),
        "ours_is_faster_by": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        "by_cpu": statistics.median(cpu),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "first_loss": runs[0]["first_loss"], "wall_s": [run["wall_s"] for run in runs],
    }  # fmt: skip


def overhead(name: str, case: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Seconds of our step, by part; timers stand around the engine's own calls."""
    found = {}
    for compile_ in (False, True):
        worker = Side("ours", dict(case) | {"compile": compile_}, options, watch=True)
        steps = [worker.step() for _ in range(options.rounds + 1)][1:]
        worker.close()
        shares = []
        for step in steps:
            inside = step["forward_s"] + step["backward_s"] + step["optimizer_s"]
            shares.append(1 - inside / step["wall_s"])
        parts = ("wall_s", "forward_s", "backward_s", "optimizer_s")
        found[worker.name] = {
            part: statistics.median(step[part] for step in steps) for part in parts
        } | {"overhead": statistics.median(shares), "all": shares}
        note(f"{name}: {worker.name}: overhead {found[worker.name]['overhead']:.4f}")
    return {"sides": found, "bars": BARS["overhead"]}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError, WorkerError) as error:
        sys.exit(f"error: {error}")
