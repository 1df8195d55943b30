import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from llmtrain import json_lines
from llmtrain.cli import main
from tests.end_to_end.sweeps import Sweep, states, values

Words = Callable[..., list[str]]
OPTUNA = (
    "hydra/sweeper=optuna", "hydra.sweeper.num_trials=6", "hydra.sweeper.startup_trials=2",
    "hydra.launcher.jobs=2", "optimizer.lr=tag(log,interval(1e-4,1e-1))",
)  # fmt: skip


def sweep(*words: str) -> int:
    return main(["train", "--multirun", *words])


def starts(trial: Path) -> int:
    return len((trial / "starts").read_text().splitlines())


def num_rows(trial: Path) -> int:
    return len(json_lines.read(trial / "metrics.jsonl"))


def journal(folder: Path) -> list[tuple[object, ...]]:
    """What a study knows of its trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name=folder.name, storage=storage)
    return [(t.number, t.params, t.state, t.value, t.intermediate_values) for t in study.trials]


def test_every_point_is_a_run_in_the_folder_of_the_sweep(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "lr"
    given = words("optimizer.lr=1e-3,1e-2,1", "hydra.launcher.jobs=2")
    assert sweep(*given) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[:4]] == [
        "trial", "trial-001", "trial-000", "trial-002",
    ]  # fmt: skip
    assert said.out.endswith(f"llmtrain report run={folder}\n")
    assert [(v[0], v[1]) for v in values(folder)] == [
        ({"optimizer.lr": 0.001}, "done"), ({"optimizer.lr": 0.01}, "done"),
        ({"optimizer.lr": 1}, "done"),
    ]  # fmt: skip
    assert values(folder)[2][2] is None
    about = json.loads((folder / "sweep.json").read_text())
    assert about["parameters"] == ["optimizer.lr"]
    assert (about["sweeper"], about["launcher"]) == ("basic", "local")
    assert about["objective"] == {"metric": None, "direction": "minimize"}

    assert sweep(*given) == 0  # nothing is run again
    assert [starts(folder / f"trial-{n:03d}") for n in range(3)] == [1, 1, 1]
    assert "starts" not in capsys.readouterr().err


def test_trials_at_the_same_time_have_cores_of_their_own(words: Words, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert sweep(*words("optimizer.lr=1e-3,1e-2", f"hydra.launcher.jobs={len(cores)}")) == 0
    places = [json.loads(p.read_text()) for p in (tmp_path / "runs" / "lr").glob("*/place")]
    assert sorted(places) == sorted([[cores[0]], [cores[1]]]) if len(cores) > 1 else [cores] * 2


@pytest.mark.parametrize(
    ("more", "status", "state"), [((), 1, "failed"), (("hydra.launcher.retries=1",), 0, "done")]
)
def test_a_fault_is_tried_again_where_that_is_asked_for(
    more: tuple[str, ...], status: int, state: str, words: Words, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "lr"
    assert sweep(*words("optimizer.lr=0.5,1e-2", *more)) == status
    assert list(states(folder).values()) == [state, "done"]
    assert sweep(*words("optimizer.lr=0.5,1e-2", "hydra.launcher.retries=1")) == 0
    assert starts(folder / "trial-000") == 2


def test_a_killed_trial_is_started_again(words: Words, tmp_path: Path) -> None:
    assert sweep(*words("optimizer.lr=0.25")) == 0
    assert starts(tmp_path / "runs" / "lr" / "trial-000") == 2


def test_another_sweep_in_the_folder_is_refused(
    words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(*words("optimizer.lr=1e-3,1e-2")) == 0
    assert sweep(*words("optimizer.lr=1e-3,1e-2", "hydra.launcher.jobs=3", "cluster=cpu")) == 0
    capsys.readouterr()
    assert sweep(*words("optimizer.lr=1e-3,2e-2")) == 2
    said = capsys.readouterr().err
    assert "optimizer.lr=1e-3,1e-2 -> optimizer.lr=1e-3,2e-2" in said
    assert said.count("\n") == 1
    assert sweep(*words("optimizer.lr=1e-3,1e-2", "training.seed=1")) == 2
    assert "nothing -> training.seed=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("optimizer.lr=0,-1",), "lr=0.0 must be above 0"),
        (
            ("optimizer.lr=1,2", "hydra.launcher.jobs=0"),
            "error: hydra.launcher.jobs=0 must be at least 1\n",
        ),
        (("optimizer.lr=1,2", "target=slurm"), "target=slurm: the trials of a sweep run where"),
        (("optimizer.lr=1,2", "hydra/launcher=joblib"), "use hydra/launcher=local"),
        (("optimizer.lr=1,2", "hydra/sweeper=optun"), "hydra/sweeper/optun"),
        (("hydra/sweeper=optuna",), "has nothing to choose"),
        (
            ("hydra/sweeper=optuna", "hydra.sweeper.sampler=bo", "optimizer.lr=1,2"),
            "error: hydra.sweeper.sampler=bo is none of tpe, random",
        ),
        (("hydra/launcher=slurm", "optimizer.lr=1,2"), "this machine; start the sweep on a login"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said_before_anything_starts(
    more: tuple[str, ...],
    told: str,
    words: Words,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmtrain.sweep.slurm._PROGRAMS", ("no-such-program",))
    assert sweep(*words(*more)) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/lr/trial-*"))


def test_a_bad_point_among_good_ones_fails_alone(words: Words, tmp_path: Path) -> None:
    assert sweep(*words("optimizer.lr=-1,1e-2")) == 1
    assert list(states(tmp_path / "runs" / "lr").values()) == ["failed", "done"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)])
def test_a_sweep_that_is_asked_to_stop_lets_its_trials_save(
    number: int, status: int, words: Words, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "lr"
    given = words("optimizer.lr=1e-3,1e-2,1e-1", "hydra.launcher.jobs=2", pause=0.05)
    first = Sweep(given, tmp_path / "first.log")
    first.until(lambda: all((folder / f"trial-00{n}" / "metrics.jsonl").exists() for n in (0, 1)))
    first.send(number)
    assert first.wait() == status, first.output
    assert "the same command goes on: llmtrain train --multirun" in first.output
    assert states(folder) == {"trial-000": "stopped", "trial-001": "stopped"}
    second = Sweep(given, tmp_path / "second.log")
    assert second.wait() == 0, second.output
    assert [num_rows(folder / f"trial-00{n}") for n in range(3)] == [40] * 3


def test_a_killed_sweep_takes_its_trials_along_and_another_waits_for_them(
    words: Words, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "lr"
    given = words("optimizer.lr=1e-3,1e-2", "hydra.launcher.jobs=2", pause=0.05)
    first = Sweep(given, tmp_path / "first.log")
    first.until(lambda: all((folder / f"trial-00{n}" / "metrics.jsonl").exists() for n in (0, 1)))
    first.kill()
    second = Sweep(given, tmp_path / "second.log")
    assert second.wait() == 0, second.output
    assert [starts(folder / f"trial-00{n}") for n in (0, 1)] == [2, 2]
    assert [num_rows(folder / f"trial-00{n}") for n in (0, 1)] == [40, 40]


def test_two_commands_do_not_work_on_one_sweep(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words("optimizer.lr=1e-3,1e-2", pause=0.05)
    first = Sweep(given, tmp_path / "first.log")
    first.until(lambda: (tmp_path / "runs" / "lr" / "trials.jsonl").exists())
    assert sweep(*given) == 2
    assert f"is in use by process {first.pid}" in capsys.readouterr().err
    first.send(signal.SIGTERM)
    assert first.wait() == 3


def test_a_study_that_is_killed_again_and_again_is_that_of_one_that_was_not(
    words: Words, tmp_path: Path
) -> None:
    given = words(*OPTUNA, "hydra.sweeper.pruner=median", pause=0.01)
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    assert sweep(*given, "name=whole") == 0
    assert {state for _, state, _ in values(whole)} == {"done", "pruned"}
    for moment in (1, 4, 7):
        command = Sweep([*given, "name=broken"], tmp_path / f"{moment}.log")
        path = broken / "trials.jsonl"
        command.until(lambda m=moment, p=path: len(json_lines.read(p)) >= m)  # type: ignore[misc]
        time.sleep(0.1)
        command.kill()
    assert sweep(*given, "name=broken") == 0
    assert values(broken) == values(whole)
    assert journal(broken) == journal(whole)


def test_a_study_goes_on_when_more_trials_are_asked_for(words: Words, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "lr"
    assert sweep(*words(*OPTUNA, "hydra.sweeper.num_trials=2")) == 0
    assert sweep(*words(*OPTUNA, "hydra.sweeper.num_trials=4")) == 0
    assert list(states(folder).values()) == ["done"] * 4
    assert [starts(folder / f"trial-00{n}") for n in range(4)] == [1] * 4


def test_optuna_is_told_of_failures_and_ends_a_grid(words: Words, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "lr"
    grid = ("hydra/sweeper=optuna", "hydra.sweeper.sampler=grid", "hydra.launcher.jobs=2")
    assert sweep(*words(*grid, "optimizer.lr=choice(0.5,1,1e-2,1e-3)")) == 1
    states_by_lr = {row[1]["optimizer.lr"]: row[2].name for row in journal(folder)}
    assert states_by_lr == {0.5: "FAIL", 1: "FAIL", 0.01: "COMPLETE", 0.001: "COMPLETE"}


def test_a_field_of_the_rows_is_the_objective(words: Words, tmp_path: Path) -> None:
    more = ("hydra.launcher.metric=step", "hydra.launcher.direction=maximize")
    assert sweep(*words("optimizer.lr=1e-3,1e-2", *more)) == 0
    assert [value for *_, value in values(tmp_path / "runs" / "lr")] == [40.0, 40.0]


def test_a_sweep_without_a_name_is_found_again_by_its_words(words: Words, tmp_path: Path) -> None:
    given = [word for word in words("optimizer.lr=1e-3,1e-2") if word != "name=lr"]
    assert sweep(*given) == 0
    assert sweep(*given, "hydra.launcher.jobs=2") == 0
    assert sweep(*given, "training.seed=3") == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("sweep-") for name in names)
