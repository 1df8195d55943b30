"""The pipelines in ``conf/pipeline``: each loads, its steps build, and it is what it says."""

import re

import pytest

from data_pipeline.config.report import EstimateConfig
from data_pipeline.config.run import PipelineConfig, RunConfig
from data_pipeline.document import Document
from data_pipeline.steps import STEPS, build_step, step_settings, step_spec
from llmtrain.config.load import config_root, load, options
from llmtrain.errors import ConfigError

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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline=c4", "pipeline.minhash.against=old"], "minhash.against is set, but minhash "),
        (["pipeline=fineweb", "pipeline.bad_words.path=x"], "bad_words.path is set, but bad_words"),
        (["pipeline=demo", "pipeline.decontaminate.benchmarks={a: b}"], "decontaminate.benchmarks"),
        (["pipeline=demo", "pipeline.minhash.keep=quality"], "minhash.keep=quality needs scores"),
        (["pipeline=redpajama", "pipeline.skip=[language]"], "quality.per_language=fineweb2"),
        (
            ["pipeline=demo", "pipeline.stages=[substring]",
             "pipeline.substring.block_bytes=100000000"],
            "substring.block_bytes=100000000 takes 2.98 GiB, more than memory_gib=1",
        ),
        (["pipeline=demo", "pipeline.language.languages=[en,zh-CN]"], "languages names 'zh-CN'"),
        (["pipeline=demo", "pipeline.extract.trafilatura.tables=false"], "extractor=trafilatura"),
        (["pipeline=demo", "pipeline.quality.alpha=3"], "alpha=3.0 is read with keep=pareto alone"),
        (["pipeline=gopher", "pipeline.decontaminate.window=9"], "window=9 is read with action"),
        (["pipeline=demo", "pipeline.tokenizer.pattern=gpt2"], "is read with kind=byte_bpe alone"),
        (
            ["pipeline=demo", "pipeline.store.shuffle=false", "pipeline.store.shuffle_seed=3"],
            "shuffle_seed=3 is read with shuffle=true alone",
        ),
    ],
)  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(overrides: list[str], message: str) -> None:
    for root, section in (("data_run", RunConfig), ("data_estimate", EstimateConfig)):
        more = ["out=x"] if section is RunConfig else ["input.a=b"]
        with pytest.raises(ConfigError, match=re.escape(message)):
            load(root, [*overrides, *more], section)


def test_settings_of_another_executor_are_refused() -> None:
    with pytest.raises(ConfigError, match="is read with executor=slurm alone"):
        load("data_run", ["pipeline=demo", "out=x", "slurm.partition=gpu"], RunConfig)


def test_scores_may_come_from_the_source() -> None:
    config = pipeline("demo", "pipeline.minhash.keep=quality", "pipeline.fields.metadata=[quality]")
    assert config.minhash.keep == "quality"


def test_a_step_is_toggled_and_tuned_by_override() -> None:
    config = pipeline(
        "fineweb", "pipeline.skip=[pii]", "pipeline.gopher_quality.max_mean_word_length=12"
    )
    assert config.skip == ("pii",)
    assert config.gopher_quality.max_mean_word_length == 12
