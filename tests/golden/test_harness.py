"""lm-evaluation-harness gives a run's weights the same results through us and through its hf model.

Three local tasks: multiple choice (one example before each question), perplexity of texts longer
than the model's window, and answers cut at stop strings.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmtrain.cli import main
from llmtrain.config.generate import EvalConfig, HarnessConfig
from llmtrain.eval.harness import find_tasks, run_tasks
from llmtrain.eval.trained import opened_run
from tests.run_folder import make_run

TASKS = Path(__file__).parent / "tasks"
NAMES = ["capitals", "pages", "copies"]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    """Give other tests the log levels back that lm_eval sets."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, a tokenizer and the tasks beside it."""
    root = tmp_path_factory.mktemp("harness")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    (root / "tasks").mkdir()
    for path in TASKS.iterdir():
        content = path.read_text().replace("DATA", str(root / "tasks"))
        (root / "tasks" / path.name).write_text(content)
    lines = (TASKS / "pages.jsonl").read_text().splitlines()
    return make_run(root, (json.loads(line)["text"] for line in lines))


def theirs(run: Path) -> Any:
    """What the harness's own hf model gives for the export of the run."""
    folder = run.parent / "exported"
    assert main(["export", f"run={run}", f"to={folder}", "dtype=fp32"]) == 0
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), device="cpu", batch_size=2, dtype=torch.float32),
        tasks=NAMES, bootstrap_iters=1000, log_samples=True, random_seed=1234,
        numpy_random_seed=1234, torch_random_seed=1234, fewshot_random_seed=1234,
        task_manager=TaskManager(include_path=run.parent / "tasks", include_defaults=False),
    )  # fmt: skip


def test_results_are_those_of_its_own_backend(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = run.parent / "tasks"
    words = [
        f"run={run}", f"tasks=[{','.join(NAMES)}]", f"harness.include_path={tasks}",
        "harness.batch_size=3", "harness.log_samples=true",
    ]  # fmt: skip
    assert main(["eval", *words]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:]] == [
        "capitals", "capitals", "pages", "pages", "copies",
    ]  # fmt: skip
    found = json.loads((run / "harness.json").read_text())
    expected = theirs(run)
    for task in NAMES:
        for metric, value in expected["results"][task].items():
            ours = found["results"][task][metric]
            assert ours == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    answers: dict[str, list[Any]] = {name: [] for name in NAMES}
    for line in (run / "harness_samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers[row["task"]].append(row["resps"])
    assert answers["copies"] == [row["resps"] for row in expected["samples"]["copies"]]
    assert any(text for ((text,),) in answers["copies"])
    for ours, row in zip(answers["capitals"], expected["samples"]["capitals"], strict=True):
        for ((mine, likeliest),), ((other, same),) in zip(ours, row["resps"], strict=True):
            assert float(mine) == pytest.approx(float(other), rel=1e-6)
            assert str(likeliest) == str(same)


def test_it_says_that_it_moves_with_every_batch_and_token(run: Path) -> None:
    """Else a long evaluation during training would be taken for a hang."""
    told: list[str] = []
    settings = HarnessConfig(
        include_path=str(run.parent / "tasks"), batch_size=3, log_samples=True
    )  # fmt: skip
    config = EvalConfig(run=str(run), tasks=("copies",), harness=settings)
    with opened_run(config.run, None, tp=1) as opened:
        found = run_tasks(
            config, opened, find_tasks(config),
            between=lambda: told.append("batch"), moves=lambda: told.append("token"),
        )  # fmt: skip
    assert found is not None
    rows = found["samples"]["copies"]
    assert told.count("batch") == math.ceil(len(rows) / 3)
    assert told.count("token") >= len(rows)


def test_a_task_that_is_not_there(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def own_alone(include_path: str, include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", own_alone)  # its own are 13,000 files
    tasks = run.parent / "tasks"
    assert main(["eval", f"run={run}", "tasks=[capital]", f"harness.include_path={tasks}"]) == 2
    assert "does not have (it has capitals)" in " ".join(capsys.readouterr().err.split())


def test_a_missing_harness_is_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", f"run={run}", "tasks=[capitals]"]) == 2
    assert "run pip install 'lm-eval>=0.4.13'" in " ".join(capsys.readouterr().err.split())
