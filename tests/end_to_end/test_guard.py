"""Poisoned batches of real runs: skipped, rolled back, stopped; and what is left to read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain import build, json_lines
from llmtrain.cli import main
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.data.plan import plan_of
from llmtrain.data.store import TokenStore
from tests.end_to_end.commands import (
    TINY,
    Command,
    rows,
    saved_state,
    status,
    steps,
)
from tests.end_to_end.poison import spoil, write_documents

NUM_STEPS = 20
POISONED = 17
"""Step whose whole batch is of poisoned documents, in a run that leaves nothing out."""
SAVED = 15
"""Last checkpoint before it."""
NUM_DOCUMENTS = 256

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Place:
    """A folder with the stores and the runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "poisoned"
        clean = write_documents(folder / "clean", NUM_DOCUMENTS)
        plan = plan_of(self.config("clean", f"data.sources.web={clean}"), {
            "web": TokenStore.open(clean)
        })  # fmt: skip
        self.poisoned = plan.windows(POISONED - 1).windows.tolist()
        write_documents(self.store, NUM_DOCUMENTS, self.poisoned)
        self.weights = folder / "weights"

    def words(self, name: str, *overrides: str) -> list[str]:
        return [
            *TINY, f"name={name}", f"runs_dir={self.folder}/runs",
            f"data.sources.web={self.store}", "model.tie_word_embeddings=false",
            "training.num_tokens=5120", "checkpoint.every_steps=5",
            "guard.spike_window_steps=10", *overrides,
        ]  # fmt: skip

    def config(self, name: str, *overrides: str) -> RunConfig:
        return load("train", self.words(name, *overrides), RunConfig)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(self, name: str, *overrides: str) -> int:
        """Train in this process."""
        return build.train(self.config(name, *overrides))

    def end_state(self, name: str) -> dict[str, Tensor]:
        assert steps(self.run(name)) == list(range(1, NUM_STEPS + 1))
        return saved_state(self.run(name), NUM_STEPS)

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        found = json_lines.read(self.run(name) / "events.jsonl")
        return [event for event in found if not kinds or event["kind"] in kinds]

    def poisonous_weights(self) -> str:
        """An override: weights whose embedding of the poison is no number."""
        if not self.weights.exists():
            self.train("weights", "training.stop_at_step=1", f"data.sources.web={self.store}")
            spoil(self.weights, saved_state(self.run("weights"), 1))
        return f"checkpoint.start_from={self.weights}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("guard"))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit by bit, numbers that are none included."""
    assert one.keys() == other.keys()
    different = [
        name for name in one if not torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7))
    ]
    assert different == []


TOLD = f"data.skip_steps=[[{SAVED + 1},{POISONED}]]"


@pytest.fixture(scope="module")
def told(place: Place) -> dict[str, Tensor]:
    """End state of a run that was told to leave the poison out."""
    assert place.train("told", TOLD) == 0
    return place.end_state("told")


def test_a_spike_is_rolled_back_to_a_run_that_was_told_to_leave_it_out(
    place: Place, told: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.train("back", "guard.on_spike=[rollback]") == 0
    assert_same(place.end_state("back"), told)
    assert [row["attempt"] for row in rows(place.run("back"))] == [1] * SAVED + [2] * 5
    assert [(one["attempt"], one["kind"], one["step"]) for one in place.events("back")] == [
        (1, "start", 0), (1, "spike", POISONED), (1, "rollback", POISONED), (2, "resumed", SAVED),
        (2, "done", NUM_STEPS),
    ]  # fmt: skip
    (event,) = place.events("back", "rollback")
    assert (event["to_step"], event["reached"]) == (SAVED, POISONED)
    assert event["text"].endswith(f"a new run does the same with {TOLD}")
    words = event["text"].partition("; llmtrain ")[2].partition(" names the documents")[0].split()
    documents = traced(words, capsys)
    assert documents == set(place.poisoned)
    counted = [word for word in words if not word.startswith("attempt=")]
    assert traced(counted, capsys).isdisjoint(documents)


def traced(words: list[str], capsys: pytest.CaptureFixture[str]) -> set[int]:
    """Numbers of the documents that ``llmtrain trace`` names."""
    capsys.readouterr()
    assert main([*words, "json=-"]) == 0
    return {json.loads(line)["document"] for line in capsys.readouterr().out.splitlines()}


def test_killed_after_a_rollback_it_leaves_out_the_same_and_is_one_run(
    place: Place, told: dict[str, Tensor]
) -> None:
    """Killed before the next checkpoint: the window is known from the one it went back to."""
    words = ("train", *place.words("killed", "guard.on_spike=[rollback]", "monitor.wandb=offline"))
    first, run = Command(words, place.folder / "first.log"), place.run("killed")
    first.until(lambda: bool(place.events("killed", "resumed")))
    first.kill()
    second = Command(words, place.folder / "second.log")
    assert second.wait() == 0, second.output
    assert_same(place.end_state("killed"), told)
    assert [one["attempt"] for one in place.events("killed", "rollback")] == [1]
    name = json.loads((run / "run.json").read_text())["wandb_id"]
    (record,) = (run / "wandb").glob("offline-run-*")
    aside = sorted((run / "wandb" / "superseded").glob("offline-run-*"))
    assert {path.name.rsplit("-", 1)[1] for path in (*aside, record)} == {name}
    assert len(aside) == 2


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pp=2",),
        ("engine=deepspeed", "engine.deepspeed.zero_stage=2", "parallel.dp_shard=2"),
    ],
    ids=["pp2", "zero2"],
)
def test_ranks_go_back_together(place: Place, layout: tuple[str, ...]) -> None:
    for name, word in (("back", "guard.on_spike=[rollback]"), ("told", TOLD)):
        words = (
            "train",
            *place.words(f"{layout[0]}-{name}".replace("=", "-").replace(".", "-"), *layout, word),
        )
        command = Command(words, place.folder / "ranks.log", ranks=2)
        assert command.wait() == 0, command.output
    start = layout[0].replace("=", "-").replace(".", "-")
    assert_same(place.end_state(f"{start}-back"), place.end_state(f"{start}-told"))
    assert len(place.events(f"{start}-back", "rollback")) == 1


def test_a_batch_that_is_not_finite_is_skipped_or_rolled_back(place: Place) -> None:
    """Poisoned documents hold a token whose embedding is no number."""
    poisonous = place.poisonous_weights()
    assert place.train("poison", poisonous, "guard.on_spike=[skip]") == 0
    assert [row["step"] for row in rows(place.run("poison")) if row["skipped_steps"]] == [POISONED]
    (event,) = place.events("poison", "skipped_step")
    assert event["step"] == POISONED
    assert place.train("poison-back", poisonous, "guard.on_spike=[rollback]") == 0
    assert place.train("poison-told", poisonous, TOLD) == 0
    assert_same(place.end_state("poison-back"), place.end_state("poison-told"))


def test_a_spiking_update_is_not_made(place: Place) -> None:
    assert place.train("skip", "guard.on_spike=[skip]") == 0
    assert [row["step"] for row in rows(place.run("skip")) if row["skipped_steps"]] == [POISONED]
    assert [one["step"] for one in place.events("skip", "spike", "skipped_step")] == [POISONED] * 2
    assert place.train("observed") == 0
    assert [one["step"] for one in place.events("observed", "spike")] == [POISONED]
    assert not any(row["skipped_steps"] for row in rows(place.run("observed")))
    before = place.run("observed"), place.run("skip")
    assert saved_state(before[0], SAVED).keys() == saved_state(before[1], SAVED).keys()
    assert_same(saved_state(before[0], SAVED), saved_state(before[1], SAVED))


def test_after_too_many_rollbacks_the_run_stops(place: Place) -> None:
    """From the poisoned weights every batch of poisoned documents is no number."""
    store = write_documents(place.folder / "spoilt", NUM_DOCUMENTS, range(64, NUM_DOCUMENTS))
    code = place.train(
        "stopped", place.poisonous_weights(), "guard.on_spike=[rollback]", "guard.max_rollbacks=2",
        f"data.sources.web={store}",
    )  # fmt: skip
    assert code == 4
    assert status(place.run("stopped"))["reason"] == "diverged"
    events = place.events("stopped", "rollback", "failed")
    assert [one["kind"] for one in events] == ["rollback", "rollback", "failed"]
    assert "guard.max_rollbacks=2 allows no more" in events[-1]["text"]
