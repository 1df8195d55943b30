"""The demo's own script, on a small crawl: every step runs, and a second run only looks."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = ("crawl", "pipeline", "train", "resume", "evaluate", "generate", "report")


def demo(out: Path) -> str:
    smaller = "model.hidden_size=64 model.intermediate_size=128 schedule.warmup_tokens=5e3"
    settings = {
        "DEMO_PAGES": "300", "DEMO_TOKENS": "30e3", "DEMO_STOP": "15", "DEMO_MORE": smaller,
    }  # fmt: skip
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch/demo.sh")],
        env={**os.environ, **settings, "DEMO_OUT": str(out), "PATH": search},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("demo")
    demo(folder)
    return folder


def test_every_step_is_done_and_a_second_run_only_looks(out: Path) -> None:
    assert sorted(p.name for p in (out / ".done").iterdir()) == sorted(STEPS)
    started = time.perf_counter()
    again = demo(out)
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
