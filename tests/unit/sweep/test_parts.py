import builtins
import inspect
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from llmtrain.config.load import config_root
from llmtrain.errors import ConfigError
from llmtrain.sweep import plugins, slurm
from llmtrain.sweep.local import LocalTrials, shares
from llmtrain.sweep.objective import Objective
from llmtrain.sweep.on_nodes import OnNodes
from llmtrain.sweep.record import Record
from llmtrain.sweep.slurm import job_name, minutes
from llmtrain.sweep.space import Space


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=2.5,true,null,x", CategoricalDistribution([2.5, True, "null", "x"])),
        ("a=1,2", CategoricalDistribution([1, 2])),
        ("a=int(interval(1,8))", IntDistribution(1, 8)),
        ("a=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("a=range(1,9,3)", IntDistribution(1, 7, step=3)),
        ("a=range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25)),
    ],
)
def test_words_of_a_sweep_are_distributions(word: str, expected: object) -> None:
    assert Space.of([word]).distributions == {"a": expected}


def test_a_choice_comes_back_as_the_word_it_was() -> None:
    space = Space.of(["++a.b=choice('x y',[1,2],1e-3)", "c=interval(0.0,1.0)"])
    choices = list(space.choices["a.b"])
    assert [space.words({"a.b": c})[0] for c in choices] == [r"a.b=x\ y", "a.b=[1,2]", "a.b=0.001"]
    assert space.words({"c": 1 / 3}) == [f"c={1 / 3}"]


def test_a_grid_lists_what_can_be_listed() -> None:
    assert Space.of(["a=range(0,1,0.5)", "b=x,y"]).grid() == {"a": [0.0, 0.5], "b": ["x", "y"]}
    with pytest.raises(ConfigError, match=r"cannot list a; use choice"):
        Space.of(["a=interval(0.0,1.0)"]).grid()


@pytest.mark.parametrize("word", ["a=1", "a=range(3,3)"])
def test_a_word_without_values_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="a="):
        Space.of([word])


def rows(folder: Path, *fields: dict[str, object]) -> Path:
    text = "".join(json.dumps({"step": n, **each}) + "\n" for n, each in enumerate(fields, 1))
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_the_objective_is_held_out_where_there_is_any_else_the_end_of_training(
    tmp_path: Path,
) -> None:
    losses = [{"loss": float(n)} for n in range(40)]
    assert Objective().value(rows(tmp_path, *losses)) == 38.5
    held_out = {"validation_loss": {"a": 2.0, "b": 3.0}}
    assert Objective().value(rows(tmp_path, *losses, held_out, {"loss": 9.0})) == 2.5
    found = Objective("source_loss.b").value(rows(tmp_path, {"source_loss": {"a": 1.0, "b": 4.0}}))
    assert found == 4.0
    assert Objective().value(rows(tmp_path, {"loss": None})) is None
    assert Objective().value(tmp_path / "nothing") is None


def test_the_record_keeps_numbers_and_forgets_a_torn_line(tmp_path: Path) -> None:
    record = Record(tmp_path)
    first = record.change(record.trial_of(["a=1e-3", "b=x"]), "running")
    record.change(record.trial_of(["a=2", "b=x"]), "failed")
    record.change(first, "done", 1.5)
    with record.path.open("a") as file:
        file.write('{"number": 1, "fol')
    again = Record(tmp_path)
    assert [(t.number, t.state, t.value, t.failures) for t in again.trials] == [
        (0, "done", 1.5, 0), (1, "failed", None, 1),
    ]  # fmt: skip
    assert again.trial_of(["b=x", "a=0.001"]).number == 0
    again.change(again.trial_of(["a=3", "b=x"]), "running")
    assert [(t.number, t.state) for t in Record(tmp_path).trials][2] == (2, "running")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("90", 90), ("1:30", 2), ("4:00:00", 240), ("2-0", 2880), ("1-12:30", 2190), ("0:10", 1)],
)
def test_time_limits_of_slurm_in_minutes(limit: str, expected: int) -> None:
    assert minutes(limit) == expected


def test_a_job_is_named_after_its_folder() -> None:
    names = {job_name(Path(at)) for at in ("/a/lr/trial-000", "/b/lr/trial-000")}
    assert len(names) == 2
    assert all(name.startswith("lr-trial-000-") for name in names)


def test_cores_are_shared_out_where_each_trial_gets_one() -> None:
    assert shares(range(5), 2) == [(0, 1), (2, 3)]
    assert shares(range(2), 3) == []


def test_gpus_are_shared_out_evenly_or_as_asked() -> None:
    assert LocalTrials(jobs=2, visible="4,5,6,7").words == ("cluster.gpus_per_node=2",)
    assert LocalTrials(("cluster.gpus_per_node=1",), visible="4,5,6,7").size == 4
    assert LocalTrials(visible="0,1").size == 1
    with pytest.raises(ConfigError, match="3 trials at a time, this machine has 2 GPUs"):
        LocalTrials(jobs=3, visible="0,1")


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.partition(".")[0] == "optuna":
            raise ModuleNotFoundError(f"No module named '{name}'", name="optuna")
        return real(name, *rest)  # type: ignore[arg-type]

    for name in ("llmtrain.sweep.optuna_sweeper", "llmtrain.sweep.space", "llmtrain.sweep.pruning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs optuna, .*pip install 'llmtrain\[sweep\]'"):
        plugins.register("hydra_plugins.llmtrain.OptunaSweeper")


def test_files_for_hydra_hold_the_fields_of_their_classes() -> None:
    files = sorted((config_root() / "hydra").rglob("*.yaml"))
    assert {"local", "slurm", "optuna"} <= {path.stem for path in files}
    for path in files:
        tree = yaml.safe_load(path.read_text())
        module, _, name = plugins.PLUGINS[tree.pop("_target_").rpartition(".")[2]].partition(":")
        kind = getattr(import_module(module), name)
        made = [c for c in kind.__mro__ if "__init__" in vars(c) and c.__module__ != "builtins"]
        fields = {n for c in made for n in inspect.signature(c.__init__).parameters}
        assert set(tree) == fields - {"self", "fields"}, path


def test_a_plain_run_imports_nothing_of_sweeps() -> None:
    code = (
        "import sys; from llmtrain.cli import main\n"
        "main(['train', 'experiment=demo', '--cfg=job'])\n"
        "names = {'optuna', 'submitit', 'sqlalchemy', 'hydra_plugins', 'llmtrain.sweep'}\n"
        "sys.exit(' '.join(names & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_job_is_submitted_or_ended_while_slurm_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "srun", "squeue", "scancel"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n[ -e {tmp_path}/up ] && cat {tmp_path}/up\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    submitted = list[str]()
    monkeypatch.setattr(slurm, "submit", lambda _, name: submitted.append(name))
    launch = slurm.SlurmTrials(poll_s=0)
    trial = SimpleNamespace(job=SimpleNamespace(run=tmp_path / "trial-000"))
    assert launch.start(trial) is None
    (tmp_path / "up").write_text(f"7|PENDING|{job_name(trial.job.run)}\n")
    job = launch.start(trial)
    assert job is not None
    assert submitted == []
    (tmp_path / "up").write_text("")
    other = launch.start(SimpleNamespace(job=SimpleNamespace(run=tmp_path / "trial-001")))
    assert len(submitted) == 1
    (tmp_path / "up").unlink()
    assert other.ended() is None
    (tmp_path / "up").write_text("")
    assert other.ended() == 1


def test_a_node_lets_its_run_save_before_the_job_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks see Slurm's signal as a request, and what does not come further is not queued.

    It comes while the run is being started.
    """
    status = tmp_path / "status.json"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "try:\n    time.sleep(60)\nfinally:\n"
        f"    json.dump({{'code': 3, 'step': 7}}, open({str(status)!r}, 'w'))\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("python", str(python))
    monkeypatch.setenv("train", 'exec "$python"')
    body, found = OnNodes(str(tmp_path), 1, ("a=1",)), []

    def preempt(*_: object) -> None:
        while not (tmp_path / "ready").exists():
            signal.sigtimedwait([], 0.05)
        found.append(body.checkpoint())

    popen = subprocess.Popen

    def start(*command: Any, **options: Any) -> "subprocess.Popen[bytes]":
        child = popen(*command, **options)
        os.kill(os.getpid(), signal.SIGUSR2)
        return child

    def ask() -> None:
        while not (body._pid and (tmp_path / "ready").exists()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = {signal.SIGUSR2: signal.signal(signal.SIGUSR2, preempt)}
    before[signal.SIGUSR1] = signal.getsignal(signal.SIGUSR1)
    try:
        with monkeypatch.context() as starting:
            starting.setattr(subprocess, "Popen", start)
            assert body() == 3
        assert found[0].function.words == ("a=1",)
        (tmp_path / "ready").unlink()
        body._pid = 0
        asking = threading.Thread(target=ask)
        asking.start()
        assert body() == 3  # stops at the step it began with
        asking.join()
        assert found[1] is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
