"""The demo's own script, on a small crawl: every step runs, and a second run only looks."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.commands import children

REPOSITORY = Path(__file__).parents[2]
STEPS = ("crawl", "pipeline", "train", "resume", "evaluate", "generate", "report")


@pytest.fixture(scope="module")
def programs(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose torchrun and llmtrain are forked from what has imported torch."""
    folder: Path = tmp_path_factory.mktemp("programs")
    for name, module in (("torchrun", "torch.distributed.run"), ("llmtrain", "llmtrain")):
        (folder / name).write_text(f'#!/bin/sh\nWARM_ALL=1 exec {warm} -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def demo(out: Path, programs: Path) -> str:
    smaller = "model.hidden_size=64 model.intermediate_size=128 schedule.warmup_tokens=5e3"
    settings = {
        "DEMO_PAGES": "300", "DEMO_TOKENS": "30e3", "DEMO_STOP": "15", "DEMO_MORE": smaller,
    }  # fmt: skip
    search = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["bash", str(REPOSITORY / "launch/demo.sh")],
        env={**os.environ, **settings, "DEMO_OUT": str(out), "PATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as script:
        try:
            printed, _ = script.communicate(timeout=280)
        except BaseException:
            end(script.pid)
            raise
    assert script.returncode == 0, printed
    return printed


def end(pid: int) -> None:
    """End a process and all that it has started."""
    for child in children(pid):
        end(child)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def out(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("demo")
    demo(folder, programs)
    return folder


def test_every_step_is_done_and_a_second_run_only_looks(out: Path, programs: Path) -> None:
    assert sorted(p.name for p in (out / ".done").iterdir()) == sorted(STEPS)
    started = time.perf_counter()
    again = demo(out, programs)
    assert time.perf_counter() - started < 5
    assert all(f"== {name}: done before" in again for name in STEPS)


def test_the_run_stopped_resumed_and_ended(out: Path) -> None:
    run = out / "runs/demo"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == rows[-1]["num_steps"] == 30
    assert 15 in steps
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert json.loads((run / "status.json").read_text())["code"] == 0
    log = (run / "logs/rank0.log").read_text()
    assert re.search(r"resumed from .*step-000000015", log)


def test_the_report_holds_scores_samples_and_the_funnel(out: Path) -> None:
    run = out / "runs/demo"
    scores = json.loads((run / "eval.json").read_text())["all"]
    assert 0 < scores["bits_per_byte"] < scores["uniform_bits_per_byte"]
    page = (run / "report.html").read_text()
    assert "Return the" in page
    assert "line_dedup" in page or "line dedup" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(json.loads((run / "samples.json").read_text())["samples"]) == 3


def test_random_spans_of_the_run_are_proven_by_the_crawl(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run={out / 'runs/demo'}", "spans=200", "pairs=100"]
    monkeypatch.setattr(sys, "argv", ["trace_proof.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(REPOSITORY / "benchmarks/trace_proof.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert left.value.code == 0, printed
    found = json.loads(printed)
    assert (found["proven"], found["agree"]) == (200, 100)
    assert found["characters_compared"] > 10_000
