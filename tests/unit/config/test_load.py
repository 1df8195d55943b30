"""Composition from conf/: overrides, groups, folders of the user, and what is written back."""

from pathlib import Path

import pytest

from llmtrain.config.commands import ReportConfig
from llmtrain.config.load import (
    compose,
    config_hash,
    config_root,
    from_yaml,
    load,
    to_yaml,
    write_yaml,
)
from llmtrain.config.run import RunConfig
from llmtrain.config.strict import build
from llmtrain.errors import ConfigError

TOKENS = "training.num_tokens=1e6"


def train(*overrides: str) -> RunConfig:
    return load("train", [TOKENS, *overrides], RunConfig)


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        train(*overrides)
    return caught.value.problems


def test_an_override_beats_the_experiment_and_the_experiment_beats_the_root() -> None:
    assert train().training.sequence_length == 2048
    assert train("experiment=demo").training.sequence_length == 256
    chosen = train("experiment=demo", "training.sequence_length=128", "parallel=fsdp")
    assert chosen.training.sequence_length == 128
    assert chosen.parallel.pp == 1


def test_keys_the_yaml_does_not_spell_out_can_be_set_without_a_plus() -> None:
    config = train(
        "data.sources.mine=stores/mine",
        "mixture.weights.mine=1",
        "engine.deterministic=true",
        "model.rope_scaling.kind=linear",
        "+model.rope_scaling.factor=2",
    )
    assert config.data.sources == {"mine": "stores/mine"}
    assert config.mixture.weights == {"mine": 1.0}
    assert config.engine.deterministic
    assert config.model.rope_scaling is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.hidden_size=3", "unknown key modle.hidden_size; did you mean model.hidden_size?"),
        ("hidden_size=3", "unknown key hidden_size; did you mean model.hidden_size?"),
        ("model.hiden_size=3", "unknown key model.hiden_size; did you mean model.hidden_size?"),
        ("experiment=dmeo", "experiment=dmeo is not an option of experiment; did you mean demo?"),
        ("parallel=pp3", "parallel=pp3 is not an option of parallel; did you mean pp2?"),
    ],
)
def test_a_typo_names_the_nearest_match(override: str, message: str) -> None:
    assert problems(override) == [message]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0", "optimizer.lr=0.0 must be above 0 and finite"),
        ("model.head_dim=0", "model.head_dim=0 must be at least 1"),
        ("model.sliding_window=0", "model.sliding_window=0 must be at least 1"),
        ("model.rope_theta=-1", "model.rope_theta=-1.0 must be above 0 and finite"),
        (
            "model.rope_scaling={kind: linear, factor: 2, beta_fast: 3}",
            "model.rope_scaling.beta_fast has no meaning for kind=linear; use one of kind, factor",
        ),
        (
            "model.rope_scaling={kind: yarn, factor: 2, original_max_position_embeddings: 9, "
            "beta_slow: 64}",
            "model.rope_scaling.beta_slow=64.0 must be below beta_fast=32.0",
        ),
        (
            "model.rope_scaling={kind: llama3, factor: 2, original_max_position_embeddings: 9, "
            "low_freq_factor: 4}",
            "model.rope_scaling.low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
    ],
)
def test_a_value_that_means_nothing_is_refused(override: str, message: str) -> None:
    assert problems(override) == [message]


def test_an_end_that_a_constant_rate_has_not_is_refused() -> None:
    assert train("schedule.kind=constant").schedule.final_lr_ratio is None
    assert problems("schedule.kind=constant", "schedule.final_lr_ratio=0.5") == [
        "schedule.final_lr_ratio=0.5 has no meaning for kind=constant; use another kind or "
        "final_lr_ratio=null"
    ]


def test_an_override_that_cannot_be_read_says_how_to_write_it() -> None:
    assert "write key=value" in problems("model.hidden_size")[0]
    (message,) = problems("name=${nothing}")
    assert "nothing" in message


def test_problems_of_groups_and_values_come_together() -> None:
    found = problems("schedule=cosin", "training.seed=x", "a b", "foo=1")
    assert len(found) == 4


def test_several_values_without_multirun_say_so() -> None:
    (message,) = problems("optimizer.lr=1e-3,1e-4")
    assert "--multirun" in message
    assert "++" not in message


def test_a_tilde_takes_a_key_out_and_says_when_there_is_none() -> None:
    assert train("experiment=demo", "~optimizer.lr").optimizer.lr == 3e-4
    assert train("data.sources.a=x", "data.sources.b=y", "~data.sources.a").data.sources == {
        "b": "y"
    }
    (message,) = problems("~optimizer.rate")
    assert message.startswith("~optimizer.rate deletes nothing")


def test_a_field_may_have_the_name_of_a_group_of_another_command() -> None:
    assert load("report", ["run=x", "data=demo/corpus"], ReportConfig).data == "demo/corpus"


def test_a_config_dir_adds_groups(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: llama_demo\ntraining:\n  seed: 7\n"
    )
    config = load("train", [TOKENS, "experiment=mine"], RunConfig, [tmp_path])
    assert config.training.seed == 7
    with pytest.raises(ConfigError, match="not a folder"):
        load("train", [TOKENS], RunConfig, [tmp_path / "none"])


def test_a_composition_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    """The shipped files are read once in a process, those of a user every time."""
    before = compose("train", [TOKENS])
    compose("train", [TOKENS, "model.vocab_size=7", "+optimizer.mine=1", "~checkpoint.every_steps"])
    assert compose("train", [TOKENS]) == before
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    for seed in (1, 2):
        mine.write_text(f"# @package _global_\ntraining:\n  seed: {seed}\n")
        config = load("train", [TOKENS, "experiment=mine"], RunConfig, [tmp_path])
        assert config.training.seed == seed


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    config = train("experiment=demo", "optimizer.grad_clip_norm=inf", "optimizer.eps=1e-9")
    assert to_yaml(config) == to_yaml(build(RunConfig, from_yaml(to_yaml(config))))
    write_yaml(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith(f"# config {config_hash(config)}\n")
    assert build(RunConfig, from_yaml(text)) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_the_hash_follows_content_not_order() -> None:
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 16


def test_roots_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="no root config"):
        compose("trian", [])


def test_yaml_that_is_no_tree_is_refused() -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        from_yaml("a: [1")
    with pytest.raises(ConfigError, match="expected keys"):
        from_yaml("- 1")


def test_conf_is_beside_the_package() -> None:
    assert (config_root() / "train.yaml").is_file()
