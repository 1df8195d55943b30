"""How the published rules come out of the configuration, and what manifests say of them."""

import json
import pickle
from collections.abc import Sequence

import pytest

from data_pipeline.config.run import RunConfig
from data_pipeline.document import Document
from data_pipeline.steps import build_step, step_settings, step_spec
from llmtrain.config.load import load

STAGES = ["language", "c4", "gopher_repetition", "gopher_quality", "fineweb"]


def configured(overrides: Sequence[str] = ()) -> RunConfig:
    return load("data_run", ["pipeline=demo", "input.a=b", "out=c", *overrides], RunConfig)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_hashable_picklable_and_written_down(stage: str) -> None:
    config = configured().pipeline
    spec = step_spec(stage, config)
    assert spec is not None
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    step = build_step(spec)
    document = Document(id="0", source="s", text="Some words. " * 3)
    assert step(document) == build_step(pickle.loads(pickle.dumps(spec)))(document)
    assert {each.rule.partition(".")[0] for each in step.findings(document)} == {stage}
    json.dumps(step_settings(stage, config))


def test_overrides_reach_the_rules() -> None:
    config = configured(
        [
            "pipeline.gopher_quality.min_words=1",
            "pipeline.gopher_repetition.reading=massiveweb",
            "pipeline.gopher_repetition.max_duplicate_lines=null",
            "pipeline.fineweb.short_line_characters=7",
            "pipeline.fineweb.per_language=fineweb2",
            "pipeline.c4.variant=fineweb",
            "pipeline.language.languages=[de]",
            "+pipeline.language.thresholds.de=0.5",
        ]
    ).pipeline
    steps = {stage: build_step(step_spec(stage, config)) for stage in STAGES}
    assert steps["gopher_quality"].limits.min_words == 1
    assert steps["gopher_repetition"].limits.reading == "massiveweb"
    assert steps["gopher_repetition"].limits.max_duplicate_lines is None
    assert dict(steps["fineweb"].by_language)["de"].short_line_characters == 7
    assert steps["c4"].options.end_marks == ""
    assert steps["language"].thresholds == (("de", 0.5),)
    assert step_settings("fineweb", config)["per_language"].startswith("fineweb2 ")
    assert step_settings("fineweb", configured().pipeline)["per_language"] is None
