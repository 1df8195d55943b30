"""Presets have the published numbers of parameters."""

from pathlib import Path

import pytest
import yaml

import llmtrain
from llmtrain.config.load import build
from llmtrain.config.model import ModelConfig
from llmtrain.model.parameters import num_parameters

PRESETS = Path(llmtrain.__file__).parents[1] / "conf" / "model"

PUBLISHED = {
    "llama_demo": 1_311_872,
    "llama_tiny": 5_507_520,
    "llama_7b": 6_738_415_616,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_241_732_096,
}


def test_every_preset_has_a_published_size() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    config = build(ModelConfig, yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))
    assert num_parameters(config) == PUBLISHED[name]
