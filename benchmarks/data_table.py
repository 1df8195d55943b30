"""The results of benchmarks/data.py as Markdown.

python benchmarks/data_table.py benchmarks/results/data.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TABLES = {
    "same work": "Same work: the same words, sentences, limits and tokenizer on both sides",
    "as shipped": "As shipped: the defaults of both",
    "extraction": "Extraction: the same library on both sides (MB of HTML)",
}


def markdown(report: dict[str, Any]) -> str:
    """Return every table that there are results for."""
    rows = list(report["rows"].values())
    lines = [_preface(report), ""]
    for table, title in TABLES.items():
        mine = [row for row in rows if row["table"] == table]
        if mine:
            lines += [f"**{title}**", "", *_speeds(mine), ""]
    whole = [row for row in rows if "whole" in row]
    if whole:
        lines += ["**Ours on everything**", "", *_wholes(whole), ""]
    if "decisions" in report:
        lines += ["**Decisions, document by document**", "", *_decisions(report["decisions"]), ""]
    return "\n".join(lines)


def _preface(report: dict[str, Any]) -> str:
    machine, peer = report["machine"], report["packages"]["datatrove"]
    return (
        f"{machine['cpu']}, {report['processes']} processes each, Python {machine['python']}, "
        f"datatrove {peer['datatrove']} with xxhash {peer['xxhash']}, {machine['date']}, commit "
        f"{report['commit']}. Ratios are medians of {report['repeats']} pairs of runs in turn, "
        f"on a sample of {_amount(report['inputs']['sample'])}; where ours ran on everything, that "
        f"is {_amount(report['inputs']['whole'])}. MB/s per core are MB of text (10^6 bytes of "
        "UTF-8) over seconds of wall time and processes. Memory is the largest PSS of all "
        f"processes of a side, in MB.\n\n`{report['command']}`"
    )


def _amount(part: dict[str, Any]) -> str:
    return (
        f"{part['text_mb']:.1f} MB of text ({part['documents']:,} documents, "
        f"{part['html_mb']:.0f} MB of HTML)"
    )


def _speeds(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = _header(
        "stage", "ours, MB/s/core", "datatrove, MB/s/core", "ratio (least to most)",
        "by processor time", "bar", "memory, ours", "memory, datatrove",
    )  # fmt: skip
    for row in rows:
        ours, peer = row["ours"], row["datatrove"]
        bar = row["bar"]
        met = "" if bar is None else f"{bar:g}: {'met' if row['ratio'] >= bar else 'missed'}"
        cpu = "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.1f}"
        remarks = [row["note"], "ours on everything" if row["own_on"] == "whole" else ""]
        said = "; ".join(filter(None, remarks))
        note = f" ({said})" if said else ""
        lines.append(
            f"| {row['name']}{note} | {_rate(ours)} | {_rate(peer)} | {row['ratio']:.1f} "
            f"({row['least']:.1f} to {row['most']:.1f}) | {cpu} | {met} "
            f"| {ours['pss_mb']:.0f} | {peer['pss_mb']:.0f} |"
        )
    return lines


def _wholes(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = _header("stage", "MB", "MB/s per core", "bar", "memory", "kept")
    for row in rows:
        whole = row["whole"]
        met = "met" if whole["mb_per_s_per_core"] >= whole["bar"] else "missed"
        counts = whole["counts"]
        kept = f"{counts['kept']:,} of {counts['documents']:,}" if "kept" in counts else ""
        lines.append(
            f"| {row['name']} | {whole['mb']:.1f} | {_rate(whole)} | {whole['bar']:g}: {met} "
            f"| {whole['pss_mb']:.0f} | {kept} |"
        )
    return lines


def _decisions(found: dict[str, Any]) -> list[str]:
    lines = _header("filter or rule", "documents", "dropped, ours", "dropped, datatrove", "agree")
    for name, entry in found["filters"].items():
        lines.append(_agreement(name, entry))
        if "texts" in entry:
            lines.append(_agreement(f"{name}: text of those both keep", entry["texts"]))
        lines += [
            _agreement(f"{name}: {rule}", tally)
            for rule, tally in entry["rules"].items()
            if tally["ours"] or tally["datatrove"]  # else nothing was decided
        ]
    return lines


def _agreement(name: str, entry: dict[str, Any]) -> str:
    share = 100 * entry["agree"] / max(1, entry["documents"])
    dropped = (f"{entry[side]:,}" if side in entry else "" for side in ("ours", "datatrove"))
    return f"| {name} | {entry['documents']:,} | {' | '.join(dropped)} | {share:.3f} % |"


def _header(*names: str) -> list[str]:
    rule = "|".join(["---"] + ["--:"] * (len(names) - 1))
    return [f"| {' | '.join(names)} |", f"|{rule}|"]


def _rate(side: dict[str, Any]) -> str:
    rate = side["mb_per_s_per_core"]
    return f"{rate:.2f}" if rate < 10 else f"{rate:.1f}"


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())) + "\n")
