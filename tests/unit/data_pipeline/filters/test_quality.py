"""Quality: scores become labels and decisions; programs that score are watched."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.content import QualityConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.classifier_training import train
from data_pipeline.filters.command_scorer import CommandScorer
from data_pipeline.filters.quality import QUALITY, SCORE, Quality, pareto_draw
from data_pipeline.filters.text_classifier import ClassifierSettings
from data_pipeline.step import Dropped, Kept
from llmtrain.errors import ConfigError, DataError

ECHO = """
import json, sys
for line in sys.stdin:
    texts = json.loads(line)["texts"]
    print(json.dumps({"scores": [float(text) for text in texts]}), flush=True)
"""
DIES_ONCE = """
import json, os, sys
if not os.path.exists(MARK):
    open(MARK, "w").close()
    sys.stdin.readline()
    print("out of memory", file=sys.stderr)
    sys.exit(9)
for line in sys.stdin:
    print(json.dumps({"scores": [0.5] * len(json.loads(line)["texts"])}), flush=True)
"""
SLEEPS = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"


def program(tmp_path: Path, source: str) -> tuple[str, ...]:
    path = tmp_path / "score.py"
    path.write_text(source.replace("MARK", repr(str(tmp_path / "mark"))))
    return (sys.executable, str(path))


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[CommandScorer]:
    scorer = CommandScorer(program(tmp_path, ECHO), 20.0)
    yield scorer
    scorer.close()


def page(text: str, number: int = 0) -> Document:
    return Document(id=f"{number:032x}", source="s", text=text, metadata={"title": "t"})


def built(section: QualityConfig) -> Quality:
    options = QUALITY.options(PipelineConfig(stages=(), quality=section))
    assert options is not None
    assert hash(tuple(options.items()))
    step = QUALITY.build(**options)
    assert isinstance(step, Quality)
    return step


def test_a_program_scores_batches_of_any_size(echo: CommandScorer) -> None:
    assert echo.score(["0.25", "1"]) == [0.25, 1.0]
    many = [f"{i / 7:.3f}" + " " * 3000 for i in range(256)]
    assert echo.score(many) == [float(text) for text in many]
    assert echo.score([]) == []


def test_a_program_that_dies_is_started_once_more(tmp_path: Path) -> None:
    scorer = CommandScorer(program(tmp_path, DIES_ONCE), 20.0)
    assert scorer.score(["a", "b"]) == [0.5, 0.5]
    scorer.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; print('no GPU', file=sys.stderr); sys.exit(3)", r"status 3 \(no GPU\), 2 ti"),
        ("print('ready', flush=True); input()", "answered 'ready'"),
        ("input(); print('{\"scores\": [1]}', flush=True); input()", "1 scores to 2 texts"),
        ("input(); print('{\"scores\": [1, NaN]}', flush=True); input()", "2 scores to 2 texts"),
    ],
)
def test_programs_that_fail_are_told_of(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CommandScorer(program(tmp_path, source), 20.0).score(["a", "b"])


def test_a_silent_program_is_killed_with_all_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    scorer = CommandScorer(program(tmp_path, SLEEPS), 0.3)
    with pytest.raises(DataError, match=r"no answer within 0\.3 s"):
        scorer.score(["a"])
    assert time.monotonic() - start < 10.0


def test_a_program_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be started"):
        CommandScorer(("/no/such/program",), 1.0).score(["a"])


def test_scores_become_labels_and_low_ones_drop(tmp_path: Path) -> None:
    section = QualityConfig(
        scorer="command", command=program(tmp_path, ECHO), threshold=0.3, command_time_limit_s=20.0
    )
    step = built(section)
    low, high, edge = page("0.1234567", 1), page("0.9", 2), page("0.29999996", 3)
    verdicts = step.judge_batch([low, high, edge])
    assert verdicts == [
        Dropped("quality.low", ((SCORE, "0.123457"),)),
        Kept(replace(high, metadata={"title": "t", SCORE: "0.900000"})),
        Kept(replace(edge, metadata={"title": "t", SCORE: "0.300000"})),
    ]
    assert [step(document) for document in (low, high, edge)] == verdicts
    finding = step.findings(low)[0]
    assert (finding.value, finding.limit, finding.passed) == (0.123457, "at least 0.300000", False)
    settings = QUALITY.settings(PipelineConfig(stages=(), quality=section))
    program(tmp_path, ECHO + "\n")
    assert QUALITY.settings(PipelineConfig(stages=(), quality=section)) != settings


def test_all_may_stay_or_a_choice_that_favours_high_scores(tmp_path: Path) -> None:
    command = program(tmp_path, ECHO)
    documents = [page("0.1" if i % 2 else "0.9", i) for i in range(2000)]
    everything = built(QualityConfig(scorer="command", command=command, keep="all"))
    assert all(isinstance(v, Kept) for v in everything.judge_batch(documents[:4]))
    chosen = built(QualityConfig(scorer="command", command=command, keep="pareto"))
    kept = [isinstance(verdict, Kept) for verdict in chosen.judge_batch(documents)]
    assert kept == [pareto_draw(d.id, 9.0) > 1 - float(d.text) for d in documents]
    low, high = np.mean(kept[1::2]), np.mean(kept[0::2])
    assert low == pytest.approx(1.9**-9.0, abs=0.01)  # P(draw > x) = (1 + x) ** -alpha
    assert high == pytest.approx(1.1**-9.0, abs=0.05)


def test_draws_are_those_of_a_pareto_distribution() -> None:
    draws = np.sort([pareto_draw(f"{i:032x}", 3.0) for i in range(4000)])
    theory = 1 - (1 + draws) ** -3.0
    assert np.abs(theory - np.arange(4000) / 4000).max() < 0.03  # Kolmogorov-Smirnov, 5 sigma


def test_the_linear_model_of_a_file_scores(tmp_path: Path) -> None:
    good = [f"wise words of old {i}" for i in range(20)]
    bad = [f"click here now buy {i}" for i in range(20)]
    path = tmp_path / "model.bin"
    train(good, bad, ClassifierSettings(bucket_bits=12)).save(path)
    section = QualityConfig(model=str(path))
    step = built(section)
    assert isinstance(step(page(good[0])), Kept)
    assert isinstance(step(page(bad[0])), Dropped)
    options = QUALITY.options(PipelineConfig(stages=(), quality=section))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match="has changed since the run began"):
        QUALITY.build(**(options or {}))


def test_without_a_model_the_rule_is_left_out_and_the_manifest_says_so() -> None:
    for section in (QualityConfig(), QualityConfig(scorer="command")):
        config = PipelineConfig(stages=(), quality=section)
        assert QUALITY.options(config) is None
        assert "no page was scored" in QUALITY.settings(config)["scorer"]
    with pytest.raises(ConfigError, match="does not exist"):
        QUALITY.options(PipelineConfig(stages=(), quality=QualityConfig(model="/absent")))
