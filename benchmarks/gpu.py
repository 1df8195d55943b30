"""Runs every GPU measurement one after the other and writes the figures and one table.

Each measurement is a process of its own, ``llmtrain bench`` or a peer, so that one that fails costs
only itself: its reason goes into the table. Figures are written after every measurement; those that
are in the files already are kept, so that several short leases add up.

    benchmarks/gpu.sh                    # sets the paths and calls this
    python benchmarks/gpu.py tiny=true out=/tmp/gpu
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_table import table
from reporting import note

from llmtrain.config.bench import BenchConfig
from llmtrain.config.load import load, to_plain

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Row = dict[str, Any]

MODELS: dict[str, tuple[list[str], int]] = {
    "3b": (["model=llama3_2_3b"], 2),
    "1b": (["model=llama3_2_1b"], 4),
    "8b-width": (["model=llama3_1_8b", "model.num_hidden_layers=8"], 2),
}
"""Settings of a model, and rows of 4,096 tokens in a micro-batch."""
ACCUMULATION = 4
LENGTHS = (4096, 8192)
PRECISIONS = {
    "bf16": ["engine.precision=bf16"],
    "fp8": ["engine.precision=bf16", "engine.fp8=tensorwise"],
}
ENGINE = ["engine.device=cuda", "engine.compile=true", "engine.loss_chunk_tokens=4096"]
TINY = [
    "model=llama_demo", "model.num_hidden_layers=2", "model.vocab_size=256",
    "engine.device=cpu", "engine.compile=false", "engine.loss_chunk_tokens=128",
    "rate_seconds=0.02", "steps=2", "warmup_steps=1", "profiled_steps=1",
]  # fmt: skip
TINY_LENGTHS = {4096: 64, 8192: 128}
PEERS = ("transformers", "litgpt")
LIMIT_S = 420


@dataclass(kw_only=True)
class Options:
    """The command line."""

    out: Path = HERE / "results"
    """Folder of gpu_step.json, gpu_kernels.json, gpu_peers.json and gpu.md."""
    only: tuple[str, ...] = ("step", "peers", "kernels")
    """What to measure."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which models."""
    budget_s: float = float("inf")
    """Nothing is started that may end later than this."""
    tiny: bool = False
    """Tiny sizes on a CPU: tries the commands, measures nothing."""
    again: bool = False
    """Measure what is in the files already once more."""
    peer_python: str = sys.executable
    """Interpreter that has the peers."""
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, words: list[str]) -> "Options":
        """Read key=value words."""
        options = cls()
        for word in words:
            name, _, value = word.partition("=")
            if name not in cls.__dataclass_fields__ or name == "started":
                raise SystemExit(
                    f"unknown option {word}; use one of {list(cls.__dataclass_fields__)}"
                )
            kind = type(getattr(options, name))
            made: Any = value
            if kind is bool:
                made = value == "true"
            elif kind is tuple:
                made = tuple(value.split(","))
            elif kind is not str:
                made = (Path if name == "out" else kind)(value)
            setattr(options, name, made)
        return options

    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.budget_s - (time.monotonic() - self.started)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process to run and where its figures go."""

    kind: str
    name: str
    words: list[str]


def settings(options: Options, model: str, length: int, precision: str) -> list[str]:
    """Overrides of ``llmtrain bench`` for one case; documents fill rows, as peers have no masks."""
    chosen, rows = MODELS[model]
    rows = max(1, rows * LENGTHS[0] // length)
    if options.tiny:
        length, rows = TINY_LENGTHS[length], 1
    return [
        *(TINY if options.tiny else [*chosen, *ENGINE]),
        *PRECISIONS[precision],
        f"training.sequence_length={length}",
        f"training.micro_batch_size={rows}",
        f"training.global_batch_tokens={rows * length * ACCUMULATION}",
    ]  # fmt: skip


def measurements(options: Options) -> Iterator[Measurement]:
    """List what to run, the most wanted first."""
    for length in LENGTHS:
        for model in options.models:
            for precision in PRECISIONS:
                case = f"{model}-{length}-{precision}"
                words = settings(options, model, length, precision)
                yield Measurement(kind="step", name=case, words=[*words, "documents=whole"])
                if precision == "bf16":
                    for peer in PEERS:
                        yield Measurement(kind="peers", name=f"{case}-{peer}", words=words)
                    for documents in ("whole", "packed"):
                        chosen = [*words, "part=kernels", f"documents={documents}"]
                        name = f"{case}-{documents}"
                        yield Measurement(kind="kernels", name=name, words=chosen)
        if length == LENGTHS[0]:
            for model in options.models:
                words = settings(options, model, length, "bf16")
                name = f"{model}-{length}-bf16-packed"
                yield Measurement(kind="step", name=name, words=[*words, "documents=packed"])


def command(options: Options, one: Measurement, folder: str) -> list[str]:
    """The command line of a measurement; it writes into ``folder`` or prints one line of JSON."""
    if one.kind != "peers":
        run = [sys.executable, "-m", "llmtrain", "bench", "name=found", f"out={folder}"]
        return [*run, *one.words]
    config = load("bench", one.words, BenchConfig)
    training = config.training
    case = {
        "model": to_plain(config.model), "micro_batch_size": training.micro_batch_size,
        "sequence_length": training.sequence_length, "accumulation": ACCUMULATION,
        "precision": config.engine.precision, "warmup_steps": config.warmup_steps,
        "steps": config.steps, "device": config.engine.device, "compile": config.engine.compile,
    }  # fmt: skip
    side = HERE / "peers" / f"gpu_{one.name.rpartition('-')[2]}.py"
    return [options.peer_python, str(side), json.dumps(case)]


def run(options: Options, one: Measurement) -> Row:
    """Run one measurement; where it fails, the figures are the reason."""
    limit = min(LIMIT_S, options.left_s())
    with tempfile.TemporaryDirectory() as folder:
        words = command(options, one, folder)
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"reason": f"not done within {limit:.0f} s", "command": shlex.join(words)}
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"reason": (lines or ["no message"])[-1][:300], "command": shlex.join(words)}
        if one.kind == "peers":
            found: Row = json.loads(done.stdout.splitlines()[-1])
            return {**found, "command": shlex.join(words)}
        print(done.stdout)
        made: Row = json.loads((Path(folder) / "found.json").read_text())
        return made


def main() -> None:
    options = Options.of(sys.argv[1:])
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; use tiny=true to try the commands on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    files = {kind: options.out / f"gpu_{kind}.json" for kind in ("step", "peers", "kernels")}
    figures: dict[str, dict[str, Row]] = {
        kind: json.loads(path.read_text()) if path.exists() else {} for kind, path in files.items()
    }
    for one in measurements(options):
        if one.kind not in options.only or (one.name in figures[one.kind] and not options.again):
            continue
        if options.left_s() < 60:
            note(f"{one.kind} {one.name}: not begun, {options.left_s():.0f} s are left")
            continue
        note(f"{one.kind} {one.name}")
        found = run(options, one)
        if "reason" in found:
            note(f"  skipped: {found['reason']}")
        figures[one.kind][one.name] = found
        files[one.kind].write_text(json.dumps(figures[one.kind], indent=1) + "\n")
        (options.out / "gpu.md").write_text(table(figures) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
