"""The profiler hook: which steps its trace holds, and that a scope costs nothing without it."""

import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import MonitorConfig
from llmtrain.engine.protocol import StepResult
from llmtrain.errors import ConfigError
from llmtrain.parallel.scopes import FORWARD, scope
from llmtrain.run.progress import Progress
from llmtrain.train.profiler import Profiler

NOTHING = cast(StepResult, None)


def run(folder: Path, steps: tuple[int, int], resumed_at: int, until: int) -> list[Any] | None:
    progress = Progress(num_steps=99, steps=StepSchedule(8, 8, (), ()), step=resumed_at)
    with Profiler(folder, 3, steps, progress) as profiler:
        while progress.step < until:
            with scope(FORWARD):
                torch.full((progress.step + 2,), 1.0)
            progress.advance()
            profiler.after_step(progress, NOTHING)
    if not profiler.path.exists():
        return None
    with gzip.open(profiler.path, "rt") as file:
        events: list[Any] = json.load(file)["traceEvents"]
    return events


@pytest.mark.parametrize("resumed_at", [0, 2, 3])
def test_the_trace_holds_the_steps_asked_for(tmp_path: Path, resumed_at: int) -> None:
    events = run(tmp_path / "traces", (4, 5), resumed_at, until=8)
    assert events is not None
    for event in events:
        assert {"ph", "name"} <= set(event)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert {"ts", "pid", "tid"} <= set(event)
    filled = [e["args"]["Input Dims"][0] for e in events if e["name"] == "aten::fill_"]
    assert filled == [[5], [6]]  # the tensors of steps 4 and 5
    assert [e["name"] for e in events].count(FORWARD) == 2
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank3.json.gz"]


def test_a_run_that_ends_inside_leaves_what_it_saw(tmp_path: Path) -> None:
    events = run(tmp_path, (2, 9), 0, until=3)
    assert events is not None
    assert [e["name"] for e in events].count(FORWARD) == 2


def test_steps_that_never_come_leave_no_trace(tmp_path: Path) -> None:
    assert run(tmp_path, (2, 3), 5, until=7) is None


def test_a_scope_does_nothing_without_a_profiler() -> None:
    assert isinstance(scope(FORWARD), nullcontext)


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_steps_out_of_order_are_refused(steps: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="profile_steps"):
        MonitorConfig(profile_steps=steps)
