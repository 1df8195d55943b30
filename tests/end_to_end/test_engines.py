"""Both launchers and both engines: a run goes on under the other engine as if nothing had been."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from shutil import copytree

import pytest

from tests.end_to_end.commands import (
    REPOSITORY,
    TIME_LIMIT_S,
    TINY,
    Command,
    losses,
    make_store,
    saved_steps,
    status,
    steps,
)
from tests.ports import free_ports

PP2 = ("parallel.pp=2",)
DEEPSPEED = ("engine=deepspeed",)
ZERO_3 = (*DEEPSPEED, "engine.deepspeed.zero_stage=3", "parallel.dp_shard=2")
NUM_STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engines")
    make_store(place / "web", seed=0)
    return place


def words_of(folder: Path, name: str) -> tuple[str, ...]:
    """The words of a run that every launcher passes on."""
    return (
        *TINY, "training.num_tokens=2048", f"name={name}", f"runs_dir={folder}/runs",
        f"data.sources.web={folder}/web",
    )  # fmt: skip


def train(folder: Path, name: str, *words: str, ranks: int = 1, deepspeed: bool = False) -> str:
    """Train in forked ranks that find what a launcher sets; returns what was printed."""
    command = Command(
        ["train", *words_of(folder, name), *words], folder / f"{name}.log", ranks,
        deepspeed=deepspeed,
    )  # fmt: skip
    assert command.wait() == 0, command.output
    return command.output


def launch(
    folder: Path, name: str, *words: str, launcher: str, python: Path | str = sys.executable
) -> str:
    """Train on two ranks under a launcher of ``launch/``; returns what was printed."""
    (port,) = free_ports(1)
    environment = {
        **os.environ, "PYTHON": str(python), "RANKS": "2", "PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        ["sh", f"launch/{launcher}.sh", *words_of(folder, name), *words],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIME_LIMIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a launcher leaves its ranks behind
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def stopped(folder: Path, warm: Path) -> Path:
    """Half a run of the native engine under torchrun."""
    launch(folder, "stopped", *PP2, "training.stop_at_step=4", launcher="torchrun", python=warm)
    run = folder / "runs/stopped"
    assert status(run) == {"code": 0, "reason": "stop_at_step", "step": 4}
    return run


@pytest.fixture(scope="module")
def straight(folder: Path, stopped: Path) -> dict[int, float]:
    """Losses of the whole run, whose second half one process did."""
    copytree(stopped, folder / "runs/straight", symlinks=True)
    train(folder, "straight")
    return losses(folder / "runs/straight")


def check_it_went_on(run: Path, said: str, straight: dict[int, float]) -> None:
    """The run was resumed under another engine, and its losses are those of one process."""
    assert "resumed from" in said
    assert "engine.kind" in said
    assert status(run) == {"code": 0, "reason": "done", "step": NUM_STEPS}
    assert saved_steps(run)[-1] == NUM_STEPS
    assert steps(run) == list(range(1, NUM_STEPS + 1))
    assert losses(run) == pytest.approx(straight, rel=1e-6)


def test_a_native_run_goes_on_under_deepspeeds_pipeline(
    folder: Path, stopped: Path, straight: dict[int, float]
) -> None:
    run = folder / "runs/pipeline"
    copytree(stopped, run, symlinks=True)
    said = train(folder, "pipeline", *DEEPSPEED, *PP2, ranks=2, deepspeed=True)
    check_it_went_on(run, said, straight)


def test_a_native_run_goes_on_under_deepspeeds_launcher_and_zero_3(
    folder: Path, stopped: Path, straight: dict[int, float]
) -> None:
    run = folder / "runs/zero"
    copytree(stopped, run, symlinks=True)
    said = launch(folder, "zero", *ZERO_3, launcher="deepspeed")
    check_it_went_on(run, said, straight)
