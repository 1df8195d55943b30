"""Tasks of lm-evaluation-harness on the way: results at every interval, the same training."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from llmtrain.checkpoint.weights import StoredWeights
from llmtrain.cli import main
from llmtrain.tokenizer.tokenizer import train
from tests.end_to_end.commands import losses, saved_steps
from tests.end_to_end.test_huggingface import MODEL, SMALL, write_store
from tests.unit.tokenizer.test_tokenizer import TEXTS

TASKS = Path(__file__).parents[1] / "golden" / "tasks"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a store, and the tasks."""
    root = tmp_path_factory.mktemp("tasks")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    (root / "tasks").mkdir()
    for path in TASKS.iterdir():
        content = path.read_text().replace("DATA", str(root / "tasks"))
        (root / "tasks" / path.name).write_text(content)
    tokenizer = train(TEXTS, root / "tokenizer", kind="bpe", vocab_size=340)
    write_store(root / "web", tokenizer, TEXTS)
    return root


def words(place: Path, name: str, *more: str) -> list[str]:
    return [
        "train", *MODEL, *SMALL, f"runs_dir={place}", f"name={name}",
        f"data.sources.web={place}/web", f"tokenizer.path={place}/tokenizer",
        "model.max_position_embeddings=256", *more,
    ]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    stored = StoredWeights(path)
    return {name: next(stored.pieces(name))[1] for name in stored.shapes}


def test_training_does_not_notice(place: Path) -> None:
    tasks = (
        "evaluation.tasks=[capitals,pages,copies]", "evaluation.tasks_every_steps=6",
        f"evaluation.harness.include_path={place}/tasks", "evaluation.harness.limit=4",
    )  # fmt: skip
    assert main(words(place, "plain")) == 0
    assert main(words(place, "watched", *tasks)) == 0
    plain, watched = place / "plain", place / "watched"
    assert losses(watched) == losses(plain)
    before, after = weights(plain), weights(watched)
    assert all(after[name].equal(before[name]) for name in before)

    rows = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["harness"] for row in rows if "harness" in row}
    assert list(found) == [6, 10]
    assert found[6]["pages/bits_per_byte"] > found[10]["pages/bits_per_byte"]
    # the last is what llmtrain eval says of the run's checkpoint
    only = [
        "tasks=[capitals,pages,copies]",
        f"harness.include_path={place}/tasks",
        "harness.limit=4",
    ]
    assert main(["eval", f"run={watched}", *only]) == 0
    alone = json.loads((watched / "harness.json").read_text())["results"]
    last = json.loads((watched / "harness" / "step-000000010.json").read_text())
    assert (last["step"], last["results"]) == (10, alone)


def test_a_stop_request_leaves_tasks_off_and_the_same_command_goes_on(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while the task makes its questions, after step 6."""
    capitals = (place / "tasks" / "capitals.yaml").read_text()
    (place / "signal").mkdir()
    (place / "signal" / "asking.yaml").write_text(
        capitals.replace("task: capitals", "task: asking").replace(
            'doc_to_text: "{{question}}"', "doc_to_text: !function asking.text"
        )
    )
    (place / "signal" / "asking.py").write_text(
        f"""
import os, signal
from pathlib import Path

def text(row):
    rows, asked = Path("{place}/stopped/metrics.jsonl"), Path("{place}/asked")
    if rows.exists() and rows.stat().st_size and not asked.exists():
        asked.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return row["question"]
"""
    )
    tasks = (
        "evaluation.tasks=[asking]", "evaluation.tasks_every_steps=6", "monitor.log_every_steps=2",
        f"evaluation.harness.include_path={place}/signal", "evaluation.harness.limit=4",
    )  # fmt: skip
    assert main(words(place, "straight", "monitor.log_every_steps=2")) == 0
    assert main(words(place, "stopped", *tasks)) == 3
    assert (place / "asked").exists()
    left = "step 6: tasks left off, the run stops or goes back; `llmtrain eval run="
    assert left in " ".join(capfd.readouterr().err.split())
    assert saved_steps(place / "stopped") == [6]
    assert main(words(place, "stopped", *tasks)) == 0
    assert losses(place / "stopped") == losses(place / "straight")
    assert [path.name for path in (place / "stopped" / "harness").iterdir()] == [
        "step-000000010.json"
    ]


def test_refusals(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*more: str) -> str:
        assert main(words(place, "refused", *more)) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "set both, or none of them" in refused("evaluation.tasks=[capitals]")
    wanted = ("evaluation.tasks=[capitals]", "evaluation.tasks_every_steps=4")
    assert "tasks are texts; set tokenizer.path" in refused(*wanted, "tokenizer.path=null")
    lost = (place / "tasks" / "pages.yaml").read_text().replace("pages", "lost")
    (place / "lost").mkdir()
    (place / "lost" / "lost.yaml").write_text(lost)
    wanted_lost = ("evaluation.tasks=[lost]", "evaluation.tasks_every_steps=4")
    said = refused(*wanted_lost, f"evaluation.harness.include_path={place}/lost")
    assert "the data of tasks=['lost'] cannot be had" in said
    assert saved_steps(place / "refused") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "run pip install 'lm-eval>=0.4.13'" in refused(*wanted)
