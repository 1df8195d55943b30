"""Start a real ``llmtrain train --multirun`` as a process of its own, watch it, and kill it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain import json_lines
from tests.end_to_end.commands import Command


class Sweep(Command):
    """One command of a sweep; its trials are what the product makes of them."""

    time_limit_s = 700

    def __init__(self, words: Sequence[str], log: Path) -> None:
        super().__init__(["train", "--multirun", *words], log)


def states(sweep: Path) -> dict[str, str]:
    """State of every trial by the name of its folder."""
    return {row["folder"]: row["state"] for row in json_lines.read(sweep / "trials.jsonl")}


def values(sweep: Path) -> list[Any]:
    """Overrides and objective of every trial, in order."""
    last = {row["number"]: row for row in json_lines.read(sweep / "trials.jsonl")}
    return [(last[n]["overrides"], last[n]["state"], last[n]["value"]) for n in sorted(last)]
