"""Both launchers with both engines: a run goes on under the other engine as if nothing had been."""

import os
import signal
import socket
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
    losses,
    make_store,
    saved_steps,
    status,
    steps,
)

PP2 = ("parallel.pp=2",)
DEEPSPEED = ("engine=deepspeed",)
ZERO_3 = (*DEEPSPEED, "engine.deepspeed.zero_stage=3", "parallel.dp_shard=2")
NUM_STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engines")
    make_store(place / "web", seed=0)
    return place


def train(folder: Path, name: str, *words: str, launcher: str | None = None) -> str:
    """Train alone, or on two ranks under a launcher of ``launch/``; returns what was printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ, "PYTHON": sys.executable, "RANKS": "2", "PORT": port, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    alone = [sys.executable, "-m", "llmtrain", "train"]
    run = (*TINY, "training.num_tokens=2048", f"name={name}", f"runs_dir={folder}/runs")
    process = subprocess.Popen(
        [*(["sh", f"launch/{launcher}.sh"] if launcher else alone), *run,
         f"data.sources.web={folder}/web", *words],
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
def stopped(folder: Path) -> Path:
    """Half a run of the native engine under DeepSpeed's launcher."""
    train(folder, "stopped", *PP2, "training.stop_at_step=4", launcher="deepspeed")
    run = folder / "runs/stopped"
    assert status(run) == {"code": 0, "reason": "stop_at_step", "step": 4}
    return run


@pytest.fixture(scope="module")
def straight(folder: Path, stopped: Path) -> dict[int, float]:
    """Losses of the whole run, whose second half one process did."""
    copytree(stopped, folder / "runs/straight", symlinks=True)
    train(folder, "straight")
    return losses(folder / "runs/straight")


@pytest.mark.parametrize(
    ("launcher", "words"), [("torchrun", (*DEEPSPEED, *PP2)), ("deepspeed", ZERO_3)]
)
def test_a_native_run_goes_on_under_deepspeed(
    folder: Path, stopped: Path, straight: dict[int, float], launcher: str, words: tuple[str, ...]
) -> None:
    run = folder / "runs" / launcher
    copytree(stopped, run, symlinks=True)
    said = train(folder, launcher, *words, launcher=launcher)
    assert "resumed from" in said
    assert "engine.kind" in said
    assert status(run) == {"code": 0, "reason": "done", "step": NUM_STEPS}
    assert saved_steps(run)[-1] == NUM_STEPS
    assert steps(run) == list(range(1, NUM_STEPS + 1))
    assert losses(run) == pytest.approx(straight, rel=1e-6)
