"""The pipelines in ``conf/pipeline``: each loads, its steps build, and it is what it says."""

import pytest

from data_pipeline.config.run import PipelineConfig, RunConfig
from data_pipeline.document import Document
from data_pipeline.steps import STEPS, build_step, step_settings, step_spec
from llmtrain.config.load import config_root, load, options

PIPELINES = options("pipeline")
TEXT = "The old captain remembered the long winter, and the boats that never came back."
PAGE = Document(
    id="0" * 32, source="s", text="\n".join([TEXT] * 5), url="https://example.org/winter"
)


def pipeline(name: str, *more: str) -> PipelineConfig:
    return load("data_run", [f"pipeline={name}", "out=x", *more], RunConfig).pipeline


@pytest.mark.parametrize("name", PIPELINES)
def test_every_step_of_a_pipeline_builds_and_measures(name: str) -> None:
    config = pipeline(name, "pipeline.language.method=fasttext")  # langdetect loads slowly
    for stage in (stage for stage in config.stages if stage in STEPS):
        assert step_settings(stage, config)
        spec = step_spec(stage, config)
        if spec is not None:
            rules = [finding.rule for finding in build_step(spec).findings(PAGE)]
            assert rules
            assert all(rule.startswith(f"{stage}.") for rule in rules)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_first_line_says_what_a_pipeline_is(name: str) -> None:
    first = (config_root() / "pipeline" / f"{name}.yaml").read_text(encoding="utf-8").split("\n")[0]
    assert first.startswith("# ")
    assert first.endswith(".")


def test_orders_are_the_published_ones() -> None:
    assert pipeline("c4").stages == ("url", "c4", "line_dedup", "language", "bad_words")
    assert pipeline("fineweb").stages == (
        "url_filter", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "minhash",
        "pii",
    )  # fmt: skip
    massive = pipeline("gopher")
    assert massive.gopher_repetition.reading == "massiveweb"
    assert massive.minhash.jaccard_threshold == 0.8
    assert pipeline("c4_multilingual").c4.variant == "mc4"
    assert pipeline("c4").language.threshold == 0.99
    assert pipeline("fineweb").language.threshold == 0.65


def test_norwegian_is_a_language_and_not_a_truth_value() -> None:
    languages = pipeline("c4_multilingual").language.languages
    assert "no" in languages
    assert len(set(languages)) == len(languages) > 80


def test_a_step_is_toggled_and_tuned_by_override() -> None:
    config = pipeline(
        "fineweb", "pipeline.skip=[pii]", "pipeline.gopher_quality.max_mean_word_length=12"
    )
    assert config.skip == ("pii",)
    assert config.gopher_quality.max_mean_word_length == 12
