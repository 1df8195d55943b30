"""What is left to look at of a real run that was killed twice: one run, one history, everywhere."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain import json_lines
from tests.end_to_end.commands import REPOSITORY, TINY, Command, make_store, saved_steps, steps
from tests.wandb_server import WandbServer

WANDB = Path(sys.executable).with_name("wandb")
NUM_STEPS = 40


def start(folder: Path, number: int) -> Command:
    words = (
        "train", *TINY, "name=watched", f"runs_dir={folder}/runs",
        f"data.sources.web={folder}/web", "checkpoint.every_steps=10",
        "monitor.wandb=offline", "monitor.tensorboard=true",
    )  # fmt: skip
    return Command(words, folder / f"{number}.log")


def wandb(*words: str, **environment: str) -> str:
    """What a command of wandb prints."""
    done = subprocess.run(
        [WANDB, *words], env=os.environ | environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server() -> Any:
    with WandbServer() as running:
        yield running


AGENT = """
import os, sys, wandb
wandb.init(mode="offline", dir=sys.argv[1])
print(os.environ["WANDB_SERVICE"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process with a service of W&B, which runs find in their environment, as a sweep agent."""
    words = [sys.executable, "-c", AGENT, tmp_path_factory.mktemp("agent")]
    with (
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert process.stdout is not None
        patch.setenv("WANDB_SERVICE", process.stdout.readline().strip())
        yield
        process.communicate()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, server: WandbServer, agent: None) -> Path:
    """Killed after steps 12 and 24, done at the third start; synced after the second and third."""
    folder = tmp_path_factory.mktemp("watch")
    make_store(folder / "web", seed=0)
    run = folder / "runs" / "watched"
    for number, (saved, seen) in enumerate([(10, 12), (20, 24)], start=1):
        command = start(folder, number)
        command.until(lambda s=saved, n=seen: s in saved_steps(run) and steps(run)[-1] >= n)
        command.kill()
    subprocess.run([WANDB, "sync", run / "wandb"], env=os.environ | server.environment)
    command = start(folder, 3)
    assert command.wait() == 0, command.output
    wandb("sync", str(run / "wandb"), **server.environment)
    return run


def test_the_list_of_events_goes_on_over_the_kills(run: Path) -> None:
    events = json_lines.read(run / "events.jsonl")
    assert [(event["attempt"], event["kind"], event["step"]) for event in events] == [
        (1, "start", 0), (2, "resumed", 10), (3, "resumed", 20), (3, "done", NUM_STEPS),
    ]  # fmt: skip
    starts = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert [one["attempt"] for one in starts] == [1, 2, 3]
    assert len({one["data"]["web"]["fingerprint"] for one in starts}) == 1


def test_rows_say_in_which_start_they_were_made(run: Path) -> None:
    rows = json_lines.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["attempt"] for row in rows] == [1] * 10 + [2] * 10 + [3] * 20
    assert [row["checkpoint_s"] > 0 for row in rows] == [n == 31 for n in range(1, 41)]


def test_every_field_of_a_row_is_documented(run: Path) -> None:
    page = (REPOSITORY / "docs" / "monitoring.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert {name for row in json_lines.read(run / "metrics.jsonl") for name in row} <= documented


def test_the_offline_record_is_one_run_with_one_history(run: Path) -> None:
    """Read with wandb's own reader."""
    name = json.loads((run / "run.json").read_text())["wandb_id"]
    (record,) = (run / "wandb").glob("offline-run-*")
    aside = sorted((run / "wandb" / "superseded").glob("offline-run-*"))
    assert [path.name.rsplit("-", 1)[1] for path in (*aside, record)] == [name] * 3
    lines = wandb("leet", "inspect", "--json", str(record)).splitlines()
    found = [json.loads(line) for line in lines]
    assert {one["run"]["run_id"] for one in found if one["type"] == "run"} == {name}
    assert_history(run, [one["history"]["item"] for one in found if one["type"] == "history"])


def test_synced_it_is_one_run_with_one_history(run: Path, server: WandbServer) -> None:
    """Also where an earlier start had been synced, as W&B keeps the lines it was sent last."""
    name = json.loads((run / "run.json").read_text())["wandb_id"]
    assert list(server.runs) == list(server.lines) == [name]
    assert_history(run, server.history(name))
    told = server.runs[name]
    assert (told["displayName"], told["project"]) == ("watched", "llmtrain")
    provenance = json.loads(told["config"])["provenance"]["value"]
    assert provenance["attempt"] == 3
    assert provenance["data"].keys() == {"web"}
    for file in ("config.yaml", "environment.jsonl"):
        assert server.files[f"{name}/llmtrain/{file}"] == (run / file).read_bytes()
    assert server.unknown == []


def assert_history(run: Path, history: list[dict[str, Any]]) -> None:
    rows = json_lines.read(run / "metrics.jsonl")
    for key, field in (("train_step", "step"), ("attempt", "attempt"), ("loss", "loss")):
        assert [row[key] for row in history] == [row[field] for row in rows]
    assert [row["_step"] for row in history] == list(range(1, NUM_STEPS + 1))
    assert [row["_timestamp"] for row in history] == pytest.approx([row["time"] for row in rows])
    assert history[-1]["layer_grad_norm/0"] == rows[-1]["layer_grad_norm"]["0"]


def test_tensorboard_shows_one_curve(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    losses = {row["step"]: row["loss"] for row in json_lines.read(run / "metrics.jsonl")}
    seen = {scalar.step: scalar.value for scalar in shown.Scalars("loss")}
    assert len(shown.Scalars("loss")) == NUM_STEPS
    assert seen == pytest.approx(losses)
