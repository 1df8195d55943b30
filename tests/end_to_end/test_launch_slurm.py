"""A real Slurm of two nodes: asked to stop, hung or without a node, a job ends as one run."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain import json_lines
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


def start_again(cluster: SlurmCluster, id: str, folder: Path) -> None:
    """Start a job that was queued again, without the two minutes that Slurm waits.

    They let expire what it signed for the first start; a start within the same second would be
    refused.
    """
    until(lambda: cluster.command("squeue", "-h", "-j", id, "-o", "%t") == "PD", folder)
    time.sleep(2.5)
    cluster.command("scontrol", "update", f"JobId={id}", "StartTime=now")


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

    start_again(cluster, id, run / "launch")
    until(lambda: "ended with status 0" in output.read_text(), run / "launch")
    assert commands.status(run) == {"code": 0, "reason": "done", "step": 40}
    assert commands.steps(run) == list(range(1, 41))
    assert stopped["step"] in commands.saved_steps(run)
    said = output.read_text()
    assert said.count("preempted at step") == 1
    assert "Exited with" not in said, said
    assert all(f"{node}: WARNING" in said or f"{node}: INFO ready" in said for node in ("n0", "n1"))


def test_after_a_lost_node_a_run_goes_on_on_the_rest(
    cluster: SlurmCluster, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(commands.REPOSITORY)
    words = [
        "launch", "target=slurm", "cluster=cpu", "cluster.num_nodes=2", "launch.min_nodes=1",
        "cluster.ranks_per_node=1", "launch.exclusive=false", f"cluster.python={warm}",
        "preflight=false", *commands.TINY, "checkpoint.every_steps=5",
        f"data.sources.a={commands.make_store(tmp_path / 'store', 1)}",
        f"runs_dir={tmp_path / 'runs'}", "name=lost",
    ]  # fmt: skip
    run = tmp_path / "runs" / "lost"
    assert main(words) == 0
    id = cluster.command("squeue", "-h", "-n", "lost", "-o", "%A")
    until(lambda: len(commands.saved_steps(run)) > 0, run / "launch")
    cluster.kill_node("n1")
    try:
        until(lambda: "down" in cluster.command("sinfo", "-h", "-n", "n1", "-o", "%T"), run)
        until(lambda: ended_again(cluster, id, run), run / "launch")
    finally:
        cluster.start_node("n1")
        until(lambda: cluster.command("sinfo", "-h", "-n", "n1", "-o", "%T") == "idle", run)
    assert commands.status(run) == {"code": 0, "reason": "done", "step": 40}
    assert commands.steps(run) == list(range(1, 41))
    starts = [one for one in json_lines.read(run / "events.jsonl") if "layout" in one]
    assert [one["layout"]["dp_shard"] for one in starts] == [2, 1]
    assert starts[1]["kind"] == "resumed"


def ended_again(cluster: SlurmCluster, id: str, run: Path) -> bool:
    """Whether a job has come to its end; while it waits, its start is asked for."""
    if cluster.command("squeue", "-h", "-j", id, "-o", "%t") == "PD":
        cluster.command("scontrol", "update", f"JobId={id}", "StartTime=now")
    said = "".join(path.read_text() for path in (run / "launch").glob("*.out"))
    return "ended with status 0" in said
