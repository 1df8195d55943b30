"""A real Slurm of two nodes: a job that is asked to stop is queued again and ends as one run."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.cli import main
from tests.end_to_end import commands
from tests.slurm_cluster import PACKAGES, SlurmCluster, missing_programs

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}: {PACKAGES}"
    ),
]

TIME_LIMIT_S = 180


def until(condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(path.read_text() for path in folder.glob("*.out"))
            raise AssertionError(f"not in {TIME_LIMIT_S} s:\n{said}")
        time.sleep(0.2)


def test_two_nodes_train_stop_when_asked_and_go_on(
    cluster: SlurmCluster, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(commands.REPOSITORY)
    words = [
        "launch", "target=slurm", "cluster=cpu", "cluster.num_nodes=2", "launch.exclusive=false",
        f"cluster.python={warm}",
        *commands.TINY, f"data.sources.a={commands.make_store(tmp_path / 'store', 1)}",
        f"runs_dir={tmp_path / 'runs'}", "name=two", "parallel.pp=2",
    ]  # fmt: skip
    run = tmp_path / "runs" / "two"
    assert main(words) == 0
    id = cluster.command("squeue", "-h", "-n", "two", "-o", "%A")
    output = run / "launch" / f"two-{id}.out"
    until(lambda: len(commands.steps(run)) > 1, run / "launch")
    cluster.command("scancel", "--batch", "--signal=USR1", id)
    until(lambda: output.read_text().count("ended with status 3") == 1, run / "launch")
    stopped = commands.status(run)
    assert (stopped["code"], stopped["reason"]) == (3, "preempted")

    # Slurm lets a job that was queued again wait for two minutes, until what it signed for the
    # first start has expired; a start within the same second would be refused.
    until(lambda: cluster.command("squeue", "-h", "-j", id, "-o", "%t") == "PD", run / "launch")
    time.sleep(2.5)
    cluster.command("scontrol", "update", f"JobId={id}", "StartTime=now")
    until(lambda: "ended with status 0" in output.read_text(), run / "launch")
    assert commands.status(run) == {"code": 0, "reason": "done", "step": 40}
    assert commands.steps(run) == list(range(1, 41))
    assert stopped["step"] in commands.saved_steps(run)
    said = output.read_text()
    assert said.count("preempted at step") == 1
    assert "Exited with" not in said, said
    assert all(f"{node}: WARNING" in said or f"{node}: INFO ready" in said for node in ("n0", "n1"))
