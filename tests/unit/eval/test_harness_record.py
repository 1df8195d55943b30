"""Tasks on a run that is training leave its W&B record to the process that trains."""

from pathlib import Path
from typing import Any, cast

import pytest

from llmtrain.config.generate import EvalConfig
from llmtrain.config.training import MonitorConfig
from llmtrain.eval import harness
from llmtrain.run.directory import RunDirectory, read_json
from llmtrain.train.tracker import SUPERSEDED, wandb_sink


class Trained:
    """What a trained run has to say here."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.step = 10
        self.config = self
        self.monitor = MonitorConfig(wandb="offline")


def test_results_of_a_run_that_trains_are_not_in_its_wandb_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(harness, "to_plain", lambda config: {})
    run = RunDirectory(tmp_path / "run")
    config = EvalConfig(run=str(run.path), tasks=("capitals",))
    found: dict[str, Any] = {"results": {"capitals": {"acc,none": 0.5}}}
    with run.locked(), wandb_sink(MonitorConfig(wandb="offline"), run, {}) as tracker:
        assert tracker is not None
        (live,) = (run.path / "wandb").glob("offline-run-*")
        harness._keep(config, cast(Any, Trained(run)), found)
        assert list((run.path / "wandb").glob("offline-run-*")) == [live]
        assert not (run.path / "wandb" / SUPERSEDED).exists()
    assert read_json(run.path / "harness.json")["results"] == found["results"]
    assert "is training: results are in harness.json, not in its Weights" in caplog.text
    harness._keep(config, cast(Any, Trained(run)), found)
    wandb.teardown()
    assert (run.path / "wandb" / SUPERSEDED / live.name).exists()
