"""Adapters in the model: names, what is trained, start values, and the same model merged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtrain.config.adapter import TARGETS, AdapterConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop.huggingface import load_model, save_model
from llmtrain.model.adapter import base_name, is_adapter
from llmtrain.model.init import initialize_, initialize_model
from llmtrain.model.parameters import parameter_table
from llmtrain.model.transformer import Transformer

PLAIN = ModelConfig(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SOME = AdapterConfig(rank=3, alpha=6.0, targets=("v_proj", "down_proj"))
TOKENS = torch.arange(20)[None] % 41
POSITIONS = torch.arange(20)[None]


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    initialize_model(model, config, seed=3)
    return model


def logits(model: Transformer) -> torch.Tensor:
    return model.logits(model(TOKENS, POSITIONS))


def test_the_table_names_adapters_and_only_they_are_trained() -> None:
    table = parameter_table(replace(PLAIN, adapter=SOME))
    trained = {info.name: info.shape for info in table if info.trainable}
    assert trained == {
        f"model.layers.{layer}.{module}.lora_{matrix}.weight": shape
        for layer in (0, 1)
        for module, inputs, outputs in (("self_attn.v_proj", 16, 8), ("mlp.down_proj", 24, 16))
        for matrix, shape in (("A", (3, inputs)), ("B", (outputs, 3)))
    }
    plain = {info.name: info.shape for info in parameter_table(PLAIN)}
    assert plain == {info.name: info.shape for info in table if not info.trainable}
    assert {base_name(name) for name in trained} <= plain.keys()


def test_a_fresh_adapter_changes_nothing() -> None:
    assert torch.equal(logits(model_of(replace(PLAIN, adapter=SOME))), logits(model_of(PLAIN)))


def test_start_values_are_the_same_in_parts() -> None:
    name, config = "model.layers.0.mlp.up_proj.lora_A.weight", replace(PLAIN, adapter=SOME)
    whole, part = torch.empty(6, 10), torch.empty(2, 5)
    initialize_(whole, name, (6, 10), (slice(0, 6), slice(0, 10)), config, seed=0)
    initialize_(part, name, (6, 10), (slice(3, 5), slice(5, 10)), config, seed=0)
    assert torch.equal(part, whole[3:5, 5:])
    assert whole.abs().max() <= 10**-0.5


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_saved_model_is_merged(use_rslora: bool, tmp_path: Path) -> None:
    config = replace(PLAIN, adapter=replace(SOME, use_rslora=use_rslora, targets=TARGETS))
    model = model_of(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0.0, 0.3, generator=generator)
    save_model(model, tmp_path / "hf")
    merged = load_model(tmp_path / "hf")
    assert merged.config.adapter is None
    expected = logits(model)
    assert torch.allclose(merged(TOKENS), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(logits(model_of(PLAIN)), expected, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": -1.0}, "alpha"),
        ({"targets": ()}, "targets=[] must name matrices"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
        ({"targets": ("lm_head",)}, "use some of q_proj"),
    ],
)
def test_what_is_no_adapter_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as found:
        AdapterConfig(**fields)  # type: ignore[arg-type]
    assert said in str(found.value)
