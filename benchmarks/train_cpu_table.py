"""Tables of the training benchmark, and the facts of the machine that its results carry.

print(table(json.loads(Path("benchmarks/results/train_cpu.json").read_text())))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting import commit, host, versions

PACKAGES = ("torch", "transformers", "accelerate", "litgpt", "lightning", "numpy")
BARS: dict[str, dict[str, float]] = {
    "small": {"speed": 1.0}, "packed": {"speed": 1.1, "peak": 0.8}, "overhead": {"share": 0.02},
}  # fmt: skip
"""Ours over the best peer at least; peak memory over theirs, and overhead, at most."""


def machine(peer: Path, command: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        **host(), "commit": commit(), "packages": versions(peer, PACKAGES),
        "command": " ".join(command),
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = list(_summary(report.get("speed", {})))
    for name, found in report.get("speed", {}).items():
        lines += [
            f"\n{name}: {_describe(found['case'])}\n",
            "| side | tokens/s | per CPU second | ours is faster by | rounds | peak GiB |",
            "|---|---|---|---|---|---|",
        ]
        for side, r in sorted(found["sides"].items()):
            lines.append(
                f"| {side} | {r['tokens_per_s']:.0f} | {r['tokens_per_cpu_s']:.0f} "
                f"| {r['ours_is_faster_by']:.2f} | {r['least']:.2f} to {r['most']:.2f} "
                f"| {r['peak_bytes'] / 2**30:.2f} |"
            )
    if report.get("overhead"):
        lines += [
            "\n| case | side | step s | forward | backward | optimizer | overhead | bar |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for name, found in report.get("overhead", {}).items():
        for side, r in found["sides"].items():
            lines.append(
                f"| {name} | {side} | {r['wall_s']:.3f} | {r['forward_s']:.3f} "
                f"| {r['backward_s']:.3f} | {r['optimizer_s']:.3f} | {100 * r['overhead']:.2f} % "
                f"| {100 * found['bars']['share']:.0f} % |"
            )
    return "\n".join(lines)


def _summary(cases: Mapping[str, Any]) -> list[str]:
    compared = {name: found for name, found in cases.items() if "best_peer" in found}
    if not compared:
        return []
    lines = [
        "| case | ours | best peer | ours over it | bar | peak over its | over the least | bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in compared.items():
        lines.append(
            f"| {name} | {r['ours']} | {r['best_peer']} | {r['ours_over_best_peer']:.2f} "
            f"| {r['bars']['speed']} | {r['peak_over_best_peer']:.2f} "
            f"| {r['peak_over_smallest_peer']:.2f} | {r['bars'].get('peak', '')} |"
        )
    return lines


def _describe(case: Mapping[str, Any]) -> str:
    documents = case.get("document_tokens")
    packed = f", documents of {documents} tokens on average" if documents else ""
    return (
        f"hidden {case['hidden_size']}, {case['num_layers']} layers, vocabulary "
        f"{case['vocab_size']:,}, {case['rows']} rows of {case['sequence_length']} tokens{packed}, "
        f"{case['threads']} threads"
    )
