"""Ready studies over run folders whose losses follow a known landscape."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from llmtrain.config.load import load, write_yaml
from llmtrain.config.run import RunConfig
from llmtrain.config.strict import build
from llmtrain.config.study import (
    LrBatchStudy,
    MixtureSearchStudy,
    ScalingLadderStudy,
    StudyConfig,
    WidthTransferStudy,
)
from llmtrain.errors import ConfigError, DataError
from llmtrain.model.parameters import num_parameters
from llmtrain.study.grid import lr_batch, parabola
from llmtrain.study.ladder import RunPoints, scaling_ladder
from llmtrain.study.mixture_search import mixture_search
from llmtrain.study.transfer import width_transfer
from llmtrain.sweep.record import Record, Trial
from tests.stores import write_store

REPOSITORY = Path(__file__).parents[3]
Landscape = Callable[[RunConfig], dict[str, float]]
"""Held-out loss by source of a run."""

SIZES = tuple(
    (f"model.hidden_size={w}", f"model.num_attention_heads={w // 16}",
     f"model.num_key_value_heads={w // 16}")
    for w in (32, 64, 96)
)  # fmt: skip
WIDE = ("model.hidden_size=128", "model.num_attention_heads=8", "model.num_key_value_heads=8")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lr_batch", LrBatchStudy),
        ("width_transfer", WidthTransferStudy),
        ("scaling_ladder", ScalingLadderStudy),
        ("mixture_search", MixtureSearchStudy),
    ],
)
def test_every_field_of_a_study_can_be_given_on_the_command_line(name: str, kind: type) -> None:
    """Hydra lets a word change only what the file names."""
    tree = yaml.safe_load((REPOSITORY / f"conf/experiment/{name}.yaml").read_text())
    study = tree["hydra"]["sweeper"]["study"]
    assert set(study) == {field.name for field in fields(kind)}
    assert isinstance(build(StudyConfig, {"study": study}).study, kind)


@functools.cache
def composed(*point: str) -> RunConfig:
    """The run of a point; several tests train the same ones."""
    return load("train", ["experiment=proxy", *point], RunConfig)


def runs_on(folder: Path, landscape: Landscape, failed: Sequence[str] = ()) -> RunPoints:
    """Run folders as training leaves them, with losses of ``landscape``."""
    record = Record(folder)

    def run(points: Sequence[Sequence[str]]) -> list[Trial]:
        found = []
        for point in points:
            trial = record.trial_of(point)
            trial.folder.mkdir(exist_ok=True)
            config = composed(*point)
            write_yaml(config, trial.folder / "config.yaml")
            losses = landscape(config)
            row = json.dumps({"step": 1, "validation_loss": losses})
            (trial.folder / "metrics.jsonl").write_text(row + "\n")
            if any(word in point for word in failed):
                found.append(record.change(trial, "failed"))
            else:
                found.append(record.change(trial, "done", float(np.mean([*losses.values()]))))
        return found

    return run


def by_size(config: RunConfig) -> dict[str, float]:
    n, d = num_parameters(config.model, embedding=False), config.training.num_tokens
    noise = np.random.default_rng([n, d, config.training.seed]).normal(0.0, 0.002)
    return {"a": float((1.5 + 300 * n**-0.45 + 500 * d**-0.5) * np.exp(noise))}


LADDER = ScalingLadderStudy(
    sizes=SIZES,
    tokens=(102400, 204800, 409600),
    held_out=WIDE,
    held_out_tokens=1024000,
    num_resamples=12,
)


def test_scaling_ladder_foretells_the_held_out_run(tmp_path: Path) -> None:
    findings = scaling_ladder(LADDER, runs_on(tmp_path, by_size))
    runs, _, constants, held_out = findings.tables
    assert len(runs.rows) == 9
    assert [row[0] for row in constants.rows] == ["E", "A", "B", "alpha", "beta"]
    assert held_out.rows[0][-1] == "yes"
    assert abs(float(held_out.rows[0][-2].removesuffix(" %"))) < 3.0
    assert "3 seeds of the first run scatter by 0." in findings.sentences[1]
    findings.write(tmp_path / "study.json")
    written = json.loads((tmp_path / "study.json").read_text())
    assert set(written) == {"kind", "title", "text", "table", "curves", "x", "y", "log"}
    assert written["table"]["rows"] == held_out.rows
    assert all(len(pair) == 2 for curve in written["curves"] for pair in curve["points"])


def test_a_failed_trial_is_left_out_and_a_failed_held_out_run_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = runs_on(tmp_path / "one", by_size, failed=["training.seed=1000"])
    findings = scaling_ladder(LADDER, lost)
    assert "trial-009 (failed) has no loss and is left out of the fit" in caplog.text
    assert len(findings.tables[0].rows) == 9
    with pytest.raises(DataError, match=r"the held-out run, .*, ended as failed without a loss"):
        scaling_ladder(LADDER, runs_on(tmp_path / "two", by_size, failed=[WIDE[0]]))


def by_rate(config: RunConfig) -> dict[str, float]:
    """Best at 0.008 with muP or at width 32; without, at a rate that falls with the width."""
    best = 0.008 * (config.training.global_batch_tokens / 1024) ** 0.5
    if config.model.mup_base_width is None:
        best *= 32 / config.model.hidden_size
    return {"a": 4.0 + 0.1 * float(np.log(config.optimizer.lr / best)) ** 2}


def test_lr_batch_finds_the_bottom_and_trains_there(tmp_path: Path) -> None:
    study = LrBatchStudy(learning_rates=(0.004, 0.01, 0.02), batch_tokens=(1024, 2048))
    findings = lr_batch(study, runs_on(tmp_path, by_rate))
    _, bottoms, held_out = findings.tables
    assert float(bottoms.rows[0][1]) == pytest.approx(0.008, rel=0.01)
    assert float(bottoms.rows[1][1]) == pytest.approx(0.0113, rel=0.01)
    assert abs(float(held_out.rows[0][-1].removesuffix(" %"))) < 0.01
    assert findings.sentences == ["The best rate grows with the batch to the power 0.50."]


def test_lr_batch_foretells_nothing_from_the_end_of_its_grid(tmp_path: Path) -> None:
    study = LrBatchStudy(learning_rates=(0.001, 0.002, 0.004), batch_tokens=(1024,))
    findings = lr_batch(study, runs_on(tmp_path, by_rate))
    assert findings.tables[-1].rows == [["1.02 k", "0.004", "4.0480", "no, at its end"]]
    assert "the true one is beyond it" in findings.sentences[-1]


def test_width_transfer_shows_what_stays_and_what_moves(tmp_path: Path) -> None:
    study = WidthTransferStudy(
        learning_rates=(0.0015, 0.003, 0.006, 0.012), base_width=32, sizes=SIZES[:2], held_out=WIDE
    )
    findings = width_transfer(study, runs_on(tmp_path, by_rate))
    mup, standard = findings.tables[-1].rows
    assert mup[1:3] == ["0.00566", "0.00566"]
    assert standard[2] == "at most 0.00283"
    assert float(mup[-1].removesuffix(" %")) == 0.0
    assert float(standard[-1].removesuffix(" %")) > 1.0
    assert "muP: from 32 to 64 the best rate changes by a factor of 1.00." in findings.sentences
    assert findings.sentences[1].endswith("by a factor of 0.50.")


def test_parabola_refuses_what_shows_no_curve() -> None:
    with pytest.raises(DataError, match="at least 3 rates with a finite loss"):
        parabola([1.0, 2.0], [3.0, 4.0])


def by_shares(config: RunConfig) -> dict[str, float]:
    weights = getattr(config.mixture, "weights", None) or {}
    shares = {name: part / sum(weights.values()) for name, part in weights.items()}
    noise = np.random.default_rng([round(1000 * s) for s in shares.values()]).normal(0, 0.002)
    return {n: float((3.0 + np.exp(0.5 - 2.0 * s)) * np.exp(noise)) for n, s in shares.items()}


def test_mixture_search_finds_better_shares_and_foretells_them(tmp_path: Path) -> None:
    stores = {"web": 600, "code": 300, "law": 100}
    for name, length in stores.items():
        write_store(tmp_path / name, [list(range(5, 5 + length))])
    study = MixtureSearchStudy(num_mixtures=9, num_resamples=12, repeats=0)
    found = mixture_search(
        study, runs_on(tmp_path / "sweep", by_shares), {n: str(tmp_path / n) for n in stores}
    )
    _, forms, shares, held_out = found.tables
    assert forms.rows[0][2] == "kept"
    best = {row[0]: float(row[1]) for row in shares.rows}
    assert best == pytest.approx({"web": 1 / 3, "code": 1 / 3, "law": 1 / 3}, abs=0.06)
    assert [float(row[2]) for row in shares.rows] == pytest.approx([0.6, 0.3, 0.1], abs=0.002)
    assert len(held_out.rows) == 8
    assert all(abs(float(row[4].removesuffix(" %"))) < 1.5 for row in held_out.rows)
    assert sum(row[-1] == "yes" for row in held_out.rows) >= 6


def test_mixture_search_refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    for name in ("web", "code"):
        write_store(tmp_path / name, [list(range(5, 400))])
    both = {name: str(tmp_path / name) for name in ("web", "code")}
    run = runs_on(tmp_path / "sweep", by_shares)
    with pytest.raises(ConfigError, match=r"needs at least 2 sources, data\.sources names 1"):
        mixture_search(MixtureSearchStudy(), run, {"web": both["web"]})
    with pytest.raises(ConfigError, match="the objective names books, held-out losses are of"):
        mixture_search(
            MixtureSearchStudy(objective={"books": 1.0}, num_mixtures=5, repeats=0), run, both
        )


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"kind": "lr_batch", "learning_rates": [1e-3], "batch_tokens": [64]}, "at least 3"),
        ({"kind": "scaling_ladder", "sizes": [["a=1"]], "tokens": [1, 2, 3], "held_out": [],
          "held_out_tokens": 1}, "sizes holds 1 values; the law needs at least 3"),
        ({"kind": "mixture_search", "confidence": 1.5}, "must be between 0 and 1"),
        ({"kind": "mixture_search", "objective": {"a": -1.0}}, "weights of at least 0"),
        ({"kind": "width_transfer", "learning_rates": [1, 2, 3], "base_width": 0,
          "sizes": [["a=1"]], "held_out": []}, "name at least 2"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(study: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(StudyConfig, {"study": study})


@pytest.mark.parametrize("name", ["lr_batch", "width_transfer", "scaling_ladder", "mixture_search"])
def test_ready_files_compose_for_trials(name: str) -> None:
    assert load("train", [f"experiment={name}"], RunConfig).model.mup_base_width == 64
