"""The rows of benchmarks/data.py: which stage of ours stands against which of datatrove, and how.

datatrove runs on a sample of the pages, ours on the same or, where a row says so, on everything:
the speed of neither depends on the amount, but some of our stages have a fixed part that a sample
would not outweigh. *Same work*: both have the same documents, words, sentences and limits, and the
same Parquet out. *As shipped*: the defaults of both; datatrove splits with spaCy and writes JSONL
through gzip, as its examples do. Documents that are dropped are written, too, on both sides.

    for row in rows(bench, {"filters"}): measure(row)
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_inputs import Inputs, Part
from data_sides import WORKERS, Measured, Side

from data_pipeline.filters.c4 import C4_VARIANTS

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
Table = Literal["same work", "as shipped", "extraction"]
COMPARED: tuple[Table, ...] = ("same work", "as shipped")
Run = Callable[[Part], Measured]
"""Run one side over a set of pages."""

REPETITION, QUALITY, C4, FINEWEB = "gopher_repetition", "gopher_quality", "c4", "fineweb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A comparison."""

    table: Table
    name: str
    """What is compared, as the table says it."""
    own: Run
    peer: Run
    bar: float | None = None
    """Least ratio of speeds."""
    own_on: Literal["sample", "whole"] = "sample"
    """What ours runs on for the ratio: everything, where something of it does not grow with the
    input. datatrove runs on the sample."""
    absolute_bar: float | None = None
    """Least MB/s per core of ours on everything; None leaves that run out."""
    per: Literal["text", "html"] = "text"
    """What the MB are of."""
    note: str = ""
    """What the reader has to know."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """Where things are; a context for the workers of one row."""

    inputs: Inputs
    scratch: Path
    peer_python: str
    language_model: str
    """fastText model for datatrove's language filter, whose own is a download."""
    sides: dict[str, Side] = field(default_factory=dict)

    def side(self, name: Literal["ours", "datatrove"]) -> Side:
        """Return the workers of a side, started on first use."""
        if name not in self.sides:
            peer = [self.peer_python, str(HERE / "peers/datatrove_stages.py")]
            log = self.scratch / "datatrove.log"
            self.sides[name] = own_side(self.scratch) if name == "ours" else Side(name, peer, log)
        return self.sides[name]

    def workers(self) -> AbstractContextManager[None]:
        """End the workers of a row when the row ends, so that the next has fresh ones."""
        return _Closing(self)

    def folder(self, name: str) -> str:
        """Return an empty folder."""
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return str(path)


def own_side(scratch: Path) -> Side:
    """Return workers that run the project's own stages."""
    command = [sys.executable, str(HERE / "peers/own_side.py")]
    return Side("ours", command, scratch / "ours.log")


class _Closing(AbstractContextManager[None]):
    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def __exit__(self, *_: object) -> None:
        for side in self._bench.sides.values():
            side.__exit__(None, None, None)
        self._bench.sides.clear()


def rows(bench: Bench, parts: set[str]) -> Iterator[Row]:
    """Yield the rows of some parts."""
    for name, make in PARTS.items():
        if name in parts:
            yield from make(bench)


def _extraction(bench: Bench) -> Iterator[Row]:
    for method in ("resiliparse", "trafilatura"):
        yield Row(
            table="extraction", name=f"{method}, WARC to text", per="html",
            own=partial(own_extract, bench, method=method),
            peer=partial(peer_extract, bench, method=method),
        )  # fmt: skip


def _filters(bench: Bench) -> Iterator[Row]:
    yield Row(
        table="same work", name="C4, limits as published, punkt sentences", bar=5.0, own_on="whole",
        own=partial(own_filters, bench, stages=(C4,), variant="c4"),
        peer=partial(peer_filters, bench, stages=("c4_published",), variant="c4", shipped=False),
    )  # fmt: skip
    groups = {
        "C4": ((C4,), 5.0),
        "Gopher + FineWeb": ((REPETITION, QUALITY, FINEWEB), 3.0),
        "C4 + Gopher + FineWeb": ((REPETITION, QUALITY, C4, FINEWEB), None),
    }
    for table in COMPARED:
        for name, (stages, bar) in groups.items():
            together = len(stages) == 4
            shipped = table == "as shipped"
            variant = "fineweb" if together else "c4" if shipped else "datatrove"
            yield Row(
                table=table, name=name, bar=10.0 if shipped else bar, own_on="whole",
                absolute_bar=10.0 if together and shipped else None,
                own=partial(own_filters, bench, stages=stages, variant=variant),
                peer=partial(
                    peer_filters, bench, stages=stages, variant=variant, shipped=shipped
                ),
            )  # fmt: skip


def _minhash(bench: Bench) -> Iterator[Row]:
    for table in COMPARED:
        shipped = table == "as shipped"
        yield Row(
            table=table, name="MinHash, signatures to removal", bar=10.0, own_on="whole",
            absolute_bar=20.0 if shipped else None,
            own=partial(own_keyed, bench, name="minhash"),
            peer=partial(peer_minhash, bench, shipped=shipped),
        )  # fmt: skip


def _tokenize(bench: Bench) -> Iterator[Row]:
    yield Row(
        table="as shipped", name="byte-level BPE to a token store", bar=10.0, own_on="whole",
        own=partial(own_tokenize, bench),
        peer=partial(peer_tokenize, bench),
        note="the same tokenizer.json; datatrove has no default",
    )  # fmt: skip
    yield Row(
        table="same work", name="byte-level BPE encoding", absolute_bar=50.0,
        own=partial(own_encode, bench),
        peer=partial(peer_encode, bench),
    )  # fmt: skip


def _path(bench: Bench) -> Iterator[Row]:
    for method in ("resiliparse", "trafilatura"):
        yield Row(
            table="as shipped", name=f"WARC to token store, {method}",
            bar=10.0 if method == "resiliparse" else None,
            own_on="whole" if method == "resiliparse" else "sample",
            own=partial(own_path, bench, method=method),
            peer=partial(peer_path, bench, method=method),
            note="the same extractor, lists of addresses their own",
        )  # fmt: skip


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "extraction": _extraction,
    "filters": _filters,
    "minhash": _minhash,
    "tokenize": _tokenize,
    "path": _path,
}
"""Part on the command line -> its rows."""


def extractor(method: str) -> list[str]:
    """Return settings that choose an extractor; trafilatura with datatrove's preference."""
    favor = ["pipeline.extract.trafilatura.favor=precision"] if method == "trafilatura" else []
    return [f"pipeline.extract.extractor={method}", *favor]


def own_extract(bench: Bench, part: Part, method: str) -> Measured:
    """Our extraction, a task per WARC file."""
    inputs = [path for paths in part.warcs for path in paths]
    job = {"inputs": inputs, "root": bench.folder("ours"), "overrides": extractor(method)}
    return bench.side("ours").run("extract", [job], driver=True)


def peer_extract(bench: Bench, part: Part, method: str) -> Measured:
    """Datatrove's extraction on workers."""
    common = {
        "out": bench.folder("datatrove"), "method": method, "options": resiliparse_options(),
        "writer": "parquet",
    }  # fmt: skip
    jobs = [
        {**common, "input": paths[0], "out": f"{common['out']}/{i}"}
        for i, paths in enumerate(part.warcs)
    ]
    return bench.side("datatrove").run("extract", jobs)


def resiliparse_options() -> dict[str, Any]:
    """Return the options our extraction gives resiliparse."""
    from data_pipeline.read.extract import EXTRACTOR

    return dict(json.loads(EXTRACTOR.options))


def stage_overrides(stages: tuple[str, ...], variant: str) -> list[str]:
    """Return settings that name some filters."""
    return [f"pipeline.stages=[{','.join(stages)}]", f"pipeline.c4.variant={variant}"]


def own_filters(bench: Bench, part: Part, stages: tuple[str, ...], variant: str) -> Measured:
    """Our filters, one pass over the shards."""
    job = {**own_shards(bench, part), "overrides": stage_overrides(stages, variant)}
    return bench.side("ours").run("filters", [job], driver=True)


def own_shards(bench: Bench, part: Part) -> dict[str, Any]:
    """Return the arguments of every stage of ours that reads shards."""
    shards = [shard for group in part.shards for shard in group]
    return {"root": part.root, "shards": shards, "out": bench.folder("ours")}


def peer_filters(
    bench: Bench, part: Part, stages: tuple[str, ...], variant: str, *, shipped: bool
) -> Measured:
    """Datatrove's filters, one pass over the files."""
    names = ["c4_fineweb" if s == C4 and variant == "fineweb" else s for s in stages]
    common = {
        "out": bench.folder("datatrove"), "names": names,
        "splitter": "shipped" if shipped else "ours",
        "sentences": C4_VARIANTS[variant].sentences,
        "writer": "jsonl" if shipped else "parquet",
    }  # fmt: skip
    jobs = [{**common, "input": path, "rank": i} for i, path in enumerate(part.parquet)]
    for job in jobs:
        job["out"] = f"{common['out']}/{job['rank']}"
    return bench.side("datatrove").run("filters", jobs)


def own_keyed(bench: Bench, part: Part, name: str) -> Measured:
    """One of our stages that see many documents at once."""
    overrides = ["pipeline=fineweb", f"pipeline.stages=[{name}]"]
    job = {**own_shards(bench, part), "name": name, "overrides": overrides}
    return bench.side("ours").run("keyed", [job], driver=True)


def own_path(bench: Bench, part: Part, method: str) -> Measured:
    """Our pipeline from WARC files to token stores, in FineWeb's order."""
    job = {
        "inputs": [path for paths in part.warcs for path in paths], "out": bench.folder("ours"),
        "overrides": ["pipeline=fineweb", *extractor(method), tokenizer(bench)],
    }  # fmt: skip
    return bench.side("ours").run("run", [job], driver=True)


def own_tokenize(bench: Bench, part: Part) -> Measured:
    """The last stage of our pipeline over documents as they are: token stores, shuffled."""
    overrides = ["pipeline=custom", "pipeline.stages=[]", "pipeline.fields.id=id"]
    job = {
        "inputs": part.parquet, "out": bench.folder("ours"),
        "overrides": [*overrides, tokenizer(bench)],
    }  # fmt: skip
    measured = bench.side("ours").run("run", [job], driver=True)
    stages = measured.results[0]["stages"]
    measured.seconds = next(took for name, took in stages.items() if name.endswith("tokenize"))
    measured.cpu_seconds = 0.0  # what is known is that of all stages
    return measured


def tokenizer(bench: Bench) -> str:
    """Return the setting that names the tokenizer of both sides."""
    return f"pipeline.tokenizer.path={bench.inputs.tokenizer}"


def own_encode(bench: Bench, part: Part) -> Measured:
    """Our encoder over the texts of shards."""
    common = {"root": part.root, "tokenizer": bench.inputs.tokenizer}
    jobs = [{**common, "shards": shards} for shards in part.shards]
    return bench.side("ours").run("encode", jobs)


def peer_encode(bench: Bench, part: Part) -> Measured:
    """Datatrove's encoder over the texts of its files."""
    common = {"tokenizer": f"{bench.inputs.tokenizer}/tokenizer.json"}
    jobs = [{**common, "input": path} for path in part.parquet]
    return bench.side("datatrove").run("encode", jobs)


def peer_tokenize(bench: Bench, part: Part) -> Measured:
    """Datatrove's files of tokens, shuffled and merged."""
    out = bench.folder("datatrove")
    common = {
        "out": f"{out}/tokens", "tokenizer": f"{bench.inputs.tokenizer}/tokenizer.json",
        "eos": END_OF_TEXT,
    }  # fmt: skip
    side = bench.side("datatrove")
    measured = side.run(
        "tokenize", [{**common, "input": path, "rank": i} for i, path in enumerate(part.parquet)]
    )
    results = measured.results
    measured.add(side.run("merge", [{"out": f"{out}/tokens", "merged": f"{out}/merged"}]))
    measured.results = results
    return measured


def peer_minhash(bench: Bench, part: Part, *, shipped: bool) -> Measured:
    """Datatrove's four phases of MinHash; every parallel one on both workers."""
    side, out = bench.side("datatrove"), bench.folder("datatrove")
    splitter = {"splitter": "shipped" if shipped else "ours"}
    files = [{"input": path, "out": out, "rank": i} for i, path in enumerate(part.parquet)]
    measured = side.run("signatures", [{**file, **splitter} for file in files])
    measured.add(side.run("buckets", [{"out": out, "rank": i} for i in range(WORKERS)]))
    measured.add(side.run("cluster", [{"out": out}]))
    writer = {"writer": "jsonl" if shipped else "parquet"}
    measured.add(side.run("remove", [{**file, **writer} for file in files]))
    return measured


def peer_path(bench: Bench, part: Part, method: str) -> Measured:
    """Datatrove from WARC files to merged tokens, in FineWeb's order."""
    side, out = bench.side("datatrove"), bench.folder("datatrove")
    common = {
        "out": out, "method": method, "options": resiliparse_options(),
        "model": bench.language_model,
    }  # fmt: skip
    warcs = [{**common, "input": paths[0], "rank": i} for i, paths in enumerate(part.warcs)]
    measured = side.run("path_filters", warcs)
    files = [
        {"input": f"{out}/filtered/{i:05d}.jsonl.gz", "out": out, "rank": i}
        for i in range(WORKERS)
        if measured.results[i]["kept"]
    ]
    measured.add(side.run("signatures", [{**file, "splitter": "shipped"} for file in files]))
    measured.add(side.run("buckets", [{"out": out, "rank": i} for i in range(WORKERS)]))
    measured.add(side.run("cluster", [{"out": out}]))
    tokens = {"tokenizer": f"{bench.inputs.tokenizer}/tokenizer.json", "eos": END_OF_TEXT}
    measured.add(side.run("path_tokens", [{**file, **tokens} for file in files]))
    results = measured.results
    measured.add(side.run("merge", [{"out": f"{out}/tokens", "merged": f"{out}/merged"}]))
    measured.results = results
    return measured
