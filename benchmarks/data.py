"""The data pipeline beside datatrove: speed, memory and decisions, in one run.

Both sides work in turn on the same pages with two processes each; what counts is the median of
the pairs' ratios. datatrove runs in an environment of its own, on a sample of the corpus (its speed
does not depend on how much there is); ours runs on the sample for the ratio and on everything for
the absolute figures. Results go to a JSON file, and from there into a table.

    python benchmarks/data.py corpus=/data/corpus out=/data/bench
    python benchmarks/data.py corpus=/data/corpus out=/tmp/bench part=filters limit_mb=4 sample_mb=2
    python benchmarks/data_table.py benchmarks/results/data.json
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_decisions import decisions
from data_inputs import Part, prepare
from data_rows import PARTS, Bench, Row, own_side, rows
from data_sides import WORKERS, Measured, in_turn
from data_table import markdown
from reporting import commit, host, note, rounded, versions
from worker import WorkerError

from llmtrain.errors import ConfigError, DataError

RESULTS = Path(__file__).resolve().parent / "results/data.json"
PEER = Path("/data/peer")
ALL_PARTS = [*PARTS, "decisions"]
PEER_PACKAGES = "datatrove xxhash spacy trafilatura resiliparse tokenizers numpy pyarrow".split()  # noqa: SIM905
OWN_PACKAGES = "resiliparse trafilatura tokenizers numba numpy pyarrow".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line."""

    corpus: Path
    """Folder made by benchmarks/corpus.py."""
    out: Path
    """Folder for inputs, logs and what the stages write; nothing in it is kept."""
    part: tuple[str, ...] = tuple(ALL_PARTS)
    """Parts to run."""
    limit_mb: float | None = None
    """Text of ``whole``, in MB; everything by default."""
    sample_mb: float = 16.0
    """Text of ``sample``, in MB: what both sides are compared on."""
    repeats: int = 3
    """Pairs of runs per row."""
    whole_repeats: int = 3
    """Runs of ours on everything, per row that has such a figure."""
    decide_on: str = "whole"
    """Documents that both decide about: ``sample`` or ``whole``."""
    peer: Path = PEER / ".venv/bin/python"
    """datatrove's interpreter."""
    language_model: Path = PEER / "assets/lid.176.ftz"
    """fastText model for datatrove's language filter."""
    json: Path = RESULTS
    """File of results; parts that were not run keep what stands in it."""


KINDS: dict[str, Callable[[str], Any]] = {
    "corpus": Path, "out": Path, "peer": Path, "language_model": Path, "json": Path,
    "limit_mb": float, "sample_mb": float, "repeats": int, "whole_repeats": int,
    "decide_on": str, "part": lambda names: tuple(names.split(",")),
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run the parts that were asked for; write the results and print the tables."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = options.out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with own_side(scratch) as ours:
        inputs = prepare(
            options.corpus, options.out / "inputs", sample_mb=options.sample_mb,
            limit_mb=options.limit_mb, side=ours,
        )  # fmt: skip
    bench = Bench(
        inputs=inputs, scratch=scratch, peer_python=str(options.peer),
        language_model=str(options.language_model),
    )  # fmt: skip
    report = earlier(options.json)
    report |= machine(options, arguments) | {"inputs": describe(bench)}
    failed: list[str] = []
    for row in rows(bench, set(options.part)):
        key = f"{row.table}: {row.name}"
        note(key)
        try:
            report["rows"][key] = measure(bench, row, options) | {
                "measured": {"commit": report["commit"], "command": report["command"]}
            }
        except WorkerError as error:
            note(str(error))
            failed.append(key)
        save(options.json, report)
    if "decisions" in options.part:
        note(f"decisions on {options.decide_on}")
        part = getattr(bench.inputs, options.decide_on)
        report["decisions"] = decisions(bench, part, options.out / "decisions")
        save(options.json, report)
    print(markdown(report))
    note(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = sorted(set(given) - set(KINDS))
    if unknown or not {"corpus", "out"} <= set(given):
        raise ConfigError(
            f"found {sorted(given)}; expected corpus=DIR out=DIR and any of {', '.join(KINDS)}"
        )
    options = Options(**{name: KINDS[name](value) for name, value in given.items()})
    wrong = sorted(set(options.part) - set(ALL_PARTS))
    if wrong:
        raise ConfigError(f"part={wrong[0]} is none; use some of {', '.join(ALL_PARTS)}")
    if options.decide_on not in ("sample", "whole"):
        raise ConfigError(f"decide_on={options.decide_on} is neither sample nor whole")
    if not options.peer.is_file():
        raise ConfigError(f"peer={options.peer} is no interpreter; install datatrove and name it")
    return options


def measure(bench: Bench, row: Row, options: Options) -> dict[str, Any]:
    """Run a row: warm up, the pairs, then ours on everything."""
    inputs = bench.inputs
    own_part = inputs.whole if row.own_on == "whole" else inputs.sample
    with bench.workers():
        for work in (row.own, row.peer, row.own):
            work(inputs.tiny)
        pairs = in_turn(lambda: row.own(own_part), lambda: row.peer(inputs.sample), options.repeats)
    scale = amount(own_part, row) / amount(inputs.sample, row)
    ratios = [scale * peer.seconds / own.seconds for own, peer in zip(*pairs, strict=True)]
    known = [(own, peer) for own, peer in zip(*pairs, strict=True) if own.cpu_seconds]
    cpu_ratios = [scale * peer.cpu_seconds / own.cpu_seconds for own, peer in known]
    result: dict[str, Any] = {
        "table": row.table, "name": row.name, "bar": row.bar, "per": row.per, "note": row.note,
        "own_on": row.own_on, "ratio": statistics.median(ratios),
        "least": min(ratios), "most": max(ratios),
        "cpu_ratio": statistics.median(cpu_ratios) if cpu_ratios else None,
        "ours": side(pairs[0], amount(own_part, row)),
        "datatrove": side(pairs[1], amount(inputs.sample, row)),
    }  # fmt: skip
    if row.absolute_bar is not None:
        result["whole"] = absolute(bench, row, options, result)
    return result


def absolute(bench: Bench, row: Row, options: Options, result: dict[str, Any]) -> dict[str, Any]:
    """Return what ours does on everything, from a run of its own unless there has been one."""
    size = amount(bench.inputs.whole, row)
    if row.own_on == "whole":
        whole = result["ours"]
    else:
        with bench.workers():
            for part in (bench.inputs.tiny, bench.inputs.tiny):
                row.own(part)
            runs = [row.own(bench.inputs.whole) for _ in range(options.whole_repeats)]
        whole = side(runs, size)
    return whole | {"bar": row.absolute_bar, "mb": size / 1e6}


def amount(part: Part, row: Row) -> int:
    """Bytes a row's speeds are counted in."""
    return part.html_bytes if row.per == "html" else part.text_bytes


def side(runs: Sequence[Measured], size: int) -> dict[str, Any]:
    """What some runs over ``size`` bytes took, by the median."""
    seconds = [run.seconds for run in runs]
    return {
        "mb_per_s_per_core": size / 1e6 / WORKERS / statistics.median(seconds),
        "seconds": [round(value, 3) for value in seconds],
        "cpu_seconds": [round(run.cpu_seconds, 3) for run in runs],
        "pss_mb": max(run.pss_mb for run in runs),
        "uss_mb": max(run.uss_mb for run in runs),
        "counts": counts(runs[-1]),
    }


def counts(run: Measured) -> dict[str, int]:
    """Numbers the workers returned, added up."""
    sums: dict[str, int] = {}
    for result in run.results:
        for name, value in (result or {}).items():
            if isinstance(value, int):
                sums[name] = sums.get(name, 0) + value
    return sums


def describe(bench: Bench) -> dict[str, dict[str, float]]:
    """How much was read."""
    return {
        name: {
            "documents": part.documents,
            "text_mb": part.text_bytes / 1e6,
            "html_mb": part.html_bytes / 1e6,
        }
        for name, part in (("sample", bench.inputs.sample), ("whole", bench.inputs.whole))
    }


def machine(options: Options, arguments: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "machine": host(),
        "commit": commit(),
        "command": " ".join(["python benchmarks/data.py", *arguments]),
        "processes": WORKERS,
        "repeats": options.repeats,
        "packages": {"ours": own_versions(), "datatrove": versions(options.peer, PEER_PACKAGES)},
    }  # fmt: skip


def own_versions() -> dict[str, str]:
    """Versions of what decides our speed, where installed."""
    found = {}
    for name in OWN_PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def earlier(path: Path) -> dict[str, Any]:
    """Return the results that stand in a file."""
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return report if "rows" in report else {"rows": {}}


def save(path: Path, report: dict[str, Any]) -> None:
    """Write the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(report), indent=1) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
