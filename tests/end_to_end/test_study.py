"""A ready study from the command line: trials, fit, a held-out run, and the same again at once."""

import json
from pathlib import Path

import pytest

from llmtrain.cli import main
from tests.end_to_end import commands
from tests.end_to_end.sweeps import Sweep, values


def test_a_study_trains_fits_foretells_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = commands.make_store(tmp_path / "store", 1)
    held_out = commands.make_store(tmp_path / "held_out", 2)
    # the ends of the grid learn next to nothing
    settings = "{kind: lr_batch, learning_rates: [0.0003, 0.01, 3.0], batch_tokens: [256]}"
    words = [
        "experiment=lr_batch", *commands.TINY, "training.num_tokens=2560", "name=study",
        f"data.sources.a={store}", f"data.validation.a={held_out}", f"runs_dir={tmp_path}",
        "schedule.warmup_tokens=0", "evaluation.windows_per_source=4", "hydra.launcher.jobs=2",
        f"hydra.sweeper.study={settings}",
    ]  # fmt: skip
    first = Sweep(words, tmp_path / "first.log")
    assert first.wait() == 0, first.output
    assert "predicted against measured:" in first.output
    assert [state for _, state, _ in values(tmp_path / "study")] == ["done"] * 4
    written = json.loads((tmp_path / "study" / "study.json").read_text())
    assert written["table"]["head"][-3:] == ["predicted", "measured", "error"]
    assert json.loads((tmp_path / "study" / "sweep.json").read_text())["parameters"] == [
        "training.global_batch_tokens", "optimizer.lr"
    ]  # fmt: skip

    capsys.readouterr()
    assert main(["train", "--multirun", *words]) == 0
    captured = capsys.readouterr()
    assert "predicted against measured:" in captured.out
    assert "starts:" not in captured.err
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == written

    assert main(["train", "--multirun", *words, "training.seed=1,2"]) == 2
    assert "a study chooses its points itself" in capsys.readouterr().err
