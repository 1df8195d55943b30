"""A real Slurm of two nodes: a sweep through submitit is killed, loses a job, and goes on."""

from pathlib import Path

import optuna
import pytest

from llmtrain import json_lines
from llmtrain.sweep.slurm import job_name
from tests.end_to_end import commands
from tests.end_to_end.sweeps import Sweep, states
from tests.slurm_cluster import PACKAGES, SlurmCluster, missing_programs

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs {', '.join(missing_programs())}: {PACKAGES}"
    ),
]

STEPS = 40


def test_a_killed_sweep_finds_its_jobs_and_goes_on(
    cluster: SlurmCluster, warm: Path, tmp_path: Path
) -> None:
    words = [
        "hydra/sweeper=optuna", "hydra.sweeper.num_trials=6",
        "hydra.sweeper.seed=1",
        "hydra/launcher=slurm", "hydra.launcher.jobs=2", "hydra.launcher.poll_s=0.5",
        "cluster=cpu", "cluster.ranks_per_node=1", "launch.time_limit=30",
        "launch.exclusive=false", "preflight=false", *commands.TINY, f"cluster.python={warm}",
        "checkpoint.every_steps=10",
        f"data.sources.a={commands.make_store(tmp_path / 'store', 1)}",
        f"runs_dir={tmp_path / 'runs'}", "name=six",
        "optimizer.lr=tag(log,interval(1e-4,1e-1))", "cluster.num_nodes=choice(1,2)",
    ]  # fmt: skip
    sweep = tmp_path / "runs" / "six"
    first = Sweep(words, tmp_path / "first.log")

    def half_way() -> bool:
        found = states(sweep)
        running = [name for name, state in found.items() if state == "running"]
        return len(found) >= 3 and any(commands.saved_steps(sweep / name) for name in running)

    first.until(half_way)
    first.kill()
    before = states(sweep)
    at_work = [n for n in before if not (sweep / n / "status.json").exists()]
    job = job_name(sweep / at_work[0])
    number = cluster.command("squeue", "-h", "-n", job, "-o", "%A")
    cluster.command("scancel", "--signal=KILL", "--full", number)

    second = Sweep(words, tmp_path / "second.log")
    assert second.wait() == 0, second.output
    assert f"{at_work[0]} goes on" in second.output
    assert list(states(sweep).values()) == ["done"] * 6
    rows = json_lines.read(sweep / "trials.jsonl")
    nodes = {row["folder"]: row["overrides"]["cluster.num_nodes"] for row in rows}
    assert sorted(nodes.values()) == [1, 1, 1, 1, 1, 2]
    for name in nodes:
        assert commands.steps(sweep / name) == list(range(1, STEPS + 1))
    for name, state in before.items():
        if state == "done":
            assert f"{name} starts" not in second.output
            assert f"{name} goes on" not in second.output
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(sweep / "optuna.journal"))
    )
    study = optuna.load_study(study_name="six", storage=storage)
    ended = {row["folder"]: row["value"] for row in rows if row["state"] == "done"}
    assert [t.value for t in study.trials] == [ended[f"trial-{n:03d}"] for n in range(6)]
    assert f"llmtrain report run={sweep}" in second.output
