"""Every field of a Hugging Face config is translated, without effect, or refused by name."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from llmtrain.cli import main
from llmtrain.config.load import config_root, options
from llmtrain.config.model import ModelConfig
from llmtrain.config.strict import build
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interop.families import (
    FAMILIES,
    FIXED,
    WITHOUT_EFFECT,
    choose_family,
    read_config,
    write_config,
)
from tests.unit.interop.folders import SIZES, config_of


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("mixtral", {}, "model_type=mixtral"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"sliding_window": 64}, "sliding_window=64"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"a_new_field": 1}, "a_new_field=1"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type=longrope"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "ramp": 1}}, "ramp=1"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is required"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "of their own"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate=false",
        ),
        ("qwen2", {"attention_bias": False}, "attention_bias=false"),
        ("qwen2", {"use_mrope": True}, "use_mrope=true"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "max_window_layers",
        ),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias=true"),
        ("mistral", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        (
            "glm4",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "partial_rotary_factor=0.5",
        ),
        ("glm", {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4"),
    ],
)
def test_refused_by_name(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as found:
        read_config({**config_of(kind), **fields})
    assert said in str(found.value)
    assert len(str(found.value).splitlines()) == 1


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as found:
        read_config({**config_of("llama"), "mlp_bias": True, "new": 1, "num_key_value_heads": 3})
    assert len(found.value.problems) == 3


def test_the_command_says_it_in_a_sentence(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config_of("llama"), "mlp_bias": True}))
    assert main(["import", f"from={tmp_path}", f"run={tmp_path}/run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Glm", "Glm4")


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_transformers_is_unknown(kind: str) -> None:
    """What transformers writes for a model as it comes is understood, defaults included."""
    config = getattr(transformers, f"{kind}Config")()
    whole = read_config(config.to_dict())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")  # fmt: skip
    bare = {"model_type": config.model_type, **{name: getattr(config, name) for name in sizes}}
    assert read_config(bare) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        ),
    ],
)
def test_fields_of_transformers_4_and_5_mean_the_same(
    kind: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    plain = config_of(kind.lower())
    assert read_config({**plain, **old}) == read_config({**plain, "rope_parameters": new})
    theirs = getattr(transformers, f"{kind}Config")(**{**plain, **old})
    kept = {k: v for k, v in theirs.rope_parameters.items() if k in new}
    assert kept == new


@pytest.mark.parametrize("name", options("model"))
def test_every_preset_has_a_family(name: str) -> None:
    text = (config_root() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    model = build(ModelConfig, yaml.safe_load(text), "model")
    family = choose_family(model)
    found, back = read_config(write_config(model, family))
    assert found is family
    assert back == replace(model, head_dim=model.head_size)


def model_of(**fields: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "llama"),
        ({"sliding_window": 8}, "mistral"),
        ({"attention_bias": True}, "qwen2"),
        ({"attention_bias": True, "attention_output_bias": True}, "llama"),
        ({"qk_norm": True}, "qwen3"),
        ({"partial_rotary_factor": 0.5}, "glm"),
        ({"post_norms": True}, "glm4"),
        ({"hidden_size": 31, "head_dim": 8}, "mistral"),
    ],
)
def test_family_follows_from_the_fields(fields: dict[str, Any], kind: str) -> None:
    assert choose_family(model_of(**fields)).model_type == kind


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attn_logit_softcapping": 50.0}, "model.attn_logit_softcapping=50.0"),
        ({"attention_output_bias": True}, "model.attention_output_bias=true"),
        ({"qk_norm": True, "post_norms": True}, "model."),
        ({"partial_rotary_factor": 0.5, "sliding_window": 4}, "model.partial_rotary_factor=0.5"),
    ],
)
def test_no_family_is_one_sentence(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="no Hugging Face model type has") as found:
        choose_family(model_of(**fields))
    assert said in str(found.value)


def test_preferred_family_is_kept_where_it_can_be() -> None:
    assert choose_family(model_of(), "mistral").model_type == "mistral"
    assert choose_family(model_of(qk_norm=True), "mistral").model_type == "qwen3"


def test_no_field_is_in_two_lists() -> None:
    assert not WITHOUT_EFFECT & FIXED.keys()
    assert len({family.model_type for family in FAMILIES}) == len(FAMILIES)
