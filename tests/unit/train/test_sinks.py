"""Places that rows go to fail, and the run does not: W&B's process killed, a disk that is full."""

import gc
import logging
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import json_lines
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import MonitorConfig
from llmtrain.run.directory import RunDirectory
from llmtrain.run.progress import Progress
from llmtrain.train.events import Events
from llmtrain.train.metrics import Sink
from llmtrain.train.monitor import JsonLines
from llmtrain.train.sinks import open_sinks
from tests.unit.train.test_monitor import row, steps


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.config_yaml.write_text("model: {}\n")
    run.environment_jsonl.write_text("{}\n")
    return run


@contextmanager
def opened(run: RunDirectory, **monitor: Any) -> Iterator[tuple[Events, list[Sink]]]:
    """The sinks of a run of 100 steps and its events."""
    progress = Progress(num_steps=100, steps=StepSchedule(8, 8))
    with ExitStack() as stack:
        events = Events(run.events_jsonl, rank=0, device=torch.device("cpu"), progress=progress)
        config = MonitorConfig(progress_bar=False, **monitor)
        yield events, open_sinks(stack, config, run, progress, {"a": 1}, events, {})


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """What happens to this process where no file can grow beyond ``num_bytes``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failures(run: RunDirectory) -> list[str]:
    return [e["text"] for e in json_lines.read(run.events_jsonl) if e["kind"] == "sink_failed"]


def test_rows_that_have_no_room_come_later_and_no_line_is_torn(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(run, wandb="disabled") as (_, sinks), caplog.at_level(logging.INFO):
        with files_up_to(2000):
            for step in range(1, 21):
                sinks[0].write(row(step))
        there = steps(run.metrics_jsonl)
        assert there == list(range(1, len(there) + 1))
        assert 0 < len(there) < 20
        assert run.metrics_jsonl.stat().st_size < 2000
        sinks[0].write(row(21))
        assert steps(run.metrics_jsonl) == list(range(1, 22))
        with files_up_to(run.metrics_jsonl.stat().st_size):
            sinks[0].write(row(22))
    assert steps(run.metrics_jsonl) == list(range(1, 23))
    told = "metrics.jsonl failed (OSError: [Errno 27] File too large); rows wait in memory until"
    assert [text.startswith(told) for text in failures(run)] == [True, True]
    assert "metrics.jsonl is written again, and lacks no row" in caplog.text


def test_rows_that_never_find_room_are_counted(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with files_up_to(2000):
        with opened(run, wandb="disabled") as (_, sinks):
            for step in range(1, 21):
                sinks[0].write(row(step))
        lost = 20 - len(steps(run.metrics_jsonl))
        assert f"metrics.jsonl lacks {lost} rows (File too large)" in caplog.text
        with JsonLines(run.metrics_jsonl, after_step=2):  # cutting needs no room
            assert steps(run.metrics_jsonl) == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of its writer
def test_tensorboard_on_a_full_disk_ends_alone(run: RunDirectory) -> None:
    before = set(threading.enumerate())
    with opened(run, wandb="disabled", tensorboard=True) as (_, sinks), files_up_to(4000):
        for step in range(1, 41):
            sinks[-1].write(row(step))
    for its_writer in set(threading.enumerate()) - before:
        its_writer.join()
    (told,) = failures(run)
    assert told.startswith("TensorBoard failed (OSError: [Errno 27] File too large")


def test_a_run_outlives_the_process_of_wandb(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed, as when memory runs out; the run goes on, and the next start has every row."""
    import wandb

    with opened(run, wandb="offline") as (events, sinks):
        for sink in sinks:
            sink.write(row(1))
        (core,) = [
            one for one in gc.get_objects()
            if type(one) is subprocess.Popen and "wandb-core" in str(one.args)
            and one.returncode is None
        ]  # fmt: skip
        core.kill()
        core.wait()
        while not failures(run):
            for sink in sinks:
                sink.write(row(steps(run.metrics_jsonl)[-1] + 1))
        events.write("spike", "its alert finds nobody")
        for sink in sinks:
            sink.write(row(steps(run.metrics_jsonl)[-1] + 1))
    (told,) = failures(run)
    assert told.startswith("Weights & Biases failed (")
    assert "this start sends no more to it, the next one what is missing" in told
    with opened(run, wandb="offline") as (_, sinks):
        sinks[-1].write(row(90))
    wandb.teardown()
    assert len(failures(run)) == 1
    assert len(list((run.path / "wandb").glob("offline-run-*"))) == 1
