"""Decisions of both sides compared, document by document, under same work.

Every filter judges the texts as they were extracted, so that no filter hides what another would
say; every rule is asked alone. What differs goes to ``differences.jsonl``, with what ours measured.

    found = decisions(bench, inputs.sample, Path("/data/bench/decisions"))
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_inputs import Part
from data_rows import C4, FINEWEB, QUALITY, REPETITION, Bench, stage_overrides

from data_pipeline.filters.c4 import C4_VARIANTS

NAMES = (C4, QUALITY, REPETITION, FINEWEB)
VARIANT = "datatrove"
"""Our C4 with datatrove's semantics."""
TOGETHER = {"hashes": "hashes or ellipses", "ellipses": "hashes or ellipses"}
"""Rules that datatrove has one limit for."""
BAR = 0.999
"""Least share of documents on which both agree."""


def decisions(bench: Bench, part: Part, out: Path) -> dict[str, Any]:
    """Let both sides decide about ``part``; return how far they agree."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    overrides = {name: stage_overrides((name,), VARIANT) for name in NAMES}
    own_jobs = [
        {
            "root": part.root, "shards": shards, "out": str(out / f"ours-{i}.jsonl"),
            "steps": overrides,
        }
        for i, shards in enumerate(part.shards)
    ]  # fmt: skip
    peer_jobs = [
        {
            "input": path, "out": str(out / f"datatrove-{i}.jsonl"), "names": list(NAMES),
            "splitter": "ours", "sentences": C4_VARIANTS[VARIANT].sentences,
        }
        for i, path in enumerate(part.parquet)
    ]  # fmt: skip
    with bench.workers():
        bench.side("ours").run("decide", own_jobs)
        bench.side("datatrove").run("decide", peer_jobs)
    return {"bar": BAR, "text_mb": part.text_bytes / 1e6, "filters": compare(out)}


def compare(out: Path) -> dict[str, dict[str, Any]]:
    """Compare the files of both sides; write the documents they disagree on."""
    found: dict[str, dict[str, Any]] = {}
    with (out / "differences.jsonl").open("w", encoding="utf-8") as file:
        for own, peer in _pairs(out):
            entry = found.setdefault(
                own["filter"], {**_tally(), "texts": {"documents": 0, "agree": 0}, "rules": {}}
            )
            differing = _count(entry, own, peer)
            if differing:
                line = {
                    "id": own["id"], "filter": own["filter"], "differ": differing,
                    "ours": own["reason"], "datatrove": peer["reason"], "values": own["values"],
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
    for name, entry in found.items():
        if name != C4:  # the others never change a text
            del entry["texts"]
    return found


def _tally() -> dict[str, int]:
    return {"documents": 0, "ours": 0, "datatrove": 0, "agree": 0}


def _pairs(out: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield what both said of the same document, filter by filter."""
    peers: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(out.glob("datatrove-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            peers[entry["id"], entry["filter"]] = entry
    for path in sorted(out.glob("ours-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            entry["failed"] = [TOGETHER.get(rule, rule) for rule in entry["failed"]]
            yield entry, peers.pop((entry["id"], entry["filter"]))
    if peers:
        raise ValueError(f"{len(peers)} decisions of datatrove are about documents ours never saw")


def _count(entry: dict[str, Any], own: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    """Add a document to the tallies; return what differs."""
    differing = ["decision"] if _add(entry, own["kept"], peer["kept"]) else []
    if own["kept"] and peer["kept"]:
        entry["texts"]["documents"] += 1
        entry["texts"]["agree"] += own["text"] == peer["text"]
        differing += ["text"] if own["text"] != peer["text"] else []
    rules = {TOGETHER.get(rule, rule) for rule in own["values"]} | set(peer["failed"])
    for rule in sorted(rules):
        tally = entry["rules"].setdefault(rule, _tally())
        if _add(tally, rule not in own["failed"], rule not in peer["failed"]):
            differing.append(rule)
    return differing


def _add(tally: dict[str, int], own_kept: bool, peer_kept: bool) -> bool:
    """Count a pair of decisions; return whether they differ."""
    tally["documents"] += 1
    tally["ours"] += not own_kept
    tally["datatrove"] += not peer_kept
    tally["agree"] += own_kept == peer_kept
    return own_kept != peer_kept
