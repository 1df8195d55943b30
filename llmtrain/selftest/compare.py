"""What two runs have come to, bit by bit.

for finding in compare(straight, killed, first=6, last=12): print(finding.same)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain import json_lines
from llmtrain.checkpoint import archive
from llmtrain.checkpoint.restore import MODEL_PREFIX, load_tensors
from llmtrain.errors import CheckpointError
from llmtrain.run.directory import RunDirectory

_COMPARED = ("loss", "grad_norm", "lr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How one kind of numbers differs."""

    what: str
    """Parameters, a state of the optimizer, or a number of every step."""
    count: int
    """Numbers compared."""
    different: int
    """How many of them differ in any bit."""
    worst: float
    """Largest absolute difference."""
    first: str = ""
    """Name of the first tensor, or step, that differs."""

    @property
    def same(self) -> bool:
        """Whether every bit is the same."""
        return not self.different


def compare(one: RunDirectory, other: RunDirectory, first: int, last: int) -> list[Finding]:
    """Compare the states after step ``last`` and what every step after ``first`` reported.

    Raises:
        CheckpointError: a run has no whole checkpoint of that step, or other tensors.
    """
    want, got = (
        load_tensors(archive.locate(run.checkpoints / archive.folder_name(last)).path)
        for run in (one, other)
    )
    if odd := sorted(want.keys() ^ got.keys()):
        raise CheckpointError(f"{len(odd)} tensors are in one run only, the first is {odd[0]}")
    kinds: dict[str, list[str]] = {}
    for name in sorted(want):
        kinds.setdefault(_kind(name), []).append(name)
    findings = [_tensors(kind, names, want, got) for kind, names in kinds.items()]
    return [*findings, *_steps(one, other, first)]


def table(findings: list[Finding]) -> str:
    """The findings as lines of text."""
    width = max(len(finding.what) for finding in findings)
    lines = [f"{'compared':<{width}}  {'numbers':>12}  {'different':>12}  largest difference"]
    for f in findings:
        note = f"  first in {f.first}" if f.first else ""
        lines.append(f"{f.what:<{width}}  {f.count:>12,}  {f.different:>12,}  {f.worst:.3e}{note}")
    return "\n".join(lines) + "\n"


def _kind(name: str) -> str:
    """Group of a tensor: parameters together, optimizer states by their last word."""
    return "parameters" if name.startswith(MODEL_PREFIX) else f"optimizer {name.split('.')[-1]}"


def _tensors(
    what: str, names: list[str], want: Mapping[str, Tensor], got: Mapping[str, Tensor]
) -> Finding:
    different, worst, first = 0, 0.0, ""
    for name in names:
        a, b = want[name].reshape(-1), got[name].reshape(-1)
        size = a.element_size()
        odd = (a.view(torch.uint8) != b.view(torch.uint8)).view(-1, size).any(dim=1)
        if odd.any():
            first = first or name
            different += int(odd.sum())
            worst = max(worst, (a[odd].double() - b[odd].double()).abs().max().item())
    count = sum(want[name].numel() for name in names)
    return Finding(what=what, count=count, different=different, worst=worst, first=first)


def _steps(one: RunDirectory, other: RunDirectory, first: int) -> list[Finding]:
    """Compare what both runs reported of the steps after ``first``."""
    rows = [
        {row["step"]: row for row in json_lines.read(run.metrics_jsonl) if row["step"] > first}
        for run in (one, other)
    ]
    if rows[0].keys() != rows[1].keys():
        raise CheckpointError(
            f"the runs report other steps: {sorted(rows[0])} and {sorted(rows[1])}"
        )
    findings = []
    for name in _COMPARED:
        pairs = {step: (rows[0][step][name], rows[1][step][name]) for step in rows[0]}
        odd = {step: abs(a - b) for step, (a, b) in pairs.items() if a != b}
        findings.append(Finding(
            what=f"{name} of each step", count=len(pairs), different=len(odd),
            worst=max(odd.values(), default=0.0), first=f"step {min(odd)}" if odd else "",
        ))  # fmt: skip
    return findings
