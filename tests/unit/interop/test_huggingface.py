"""Folders that do not fit their config, and exports that cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.cli import main
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop.huggingface import load_model, save_model
from llmtrain.interop.safetensors import INDEX, SINGLE
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from tests.unit.interop.folders import SIZES, config_of, write_folder

Change = Callable[[dict[str, Tensor]], None]


def drop(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def add(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)


def reshape(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = torch.zeros(17)


def untie(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "fields", "said"),
    [
        (drop, {}, "lacks 1 of the 21 tensors"),
        (add, {}, "holds 1 tensors that the model of its config.json has no place for"),
        (reshape, {}, "model.norm.weight of shape [17], its config.json makes [16]"),
        (untie, {"tie_word_embeddings": True}, "a lm_head.weight that is not its"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, capsys: Any, change: Change, fields: dict[str, Any], said: str
) -> None:
    weights = write_folder(tmp_path / "hf", config_of("llama", **fields))
    change(weights)
    (tmp_path / "hf" / INDEX).unlink()
    save_file(weights, tmp_path / "hf" / SINGLE)
    assert main(["import", f"from={tmp_path}/hf", f"run={tmp_path}/run"]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_follows_from_the_rest_is_no_extra_tensor(tmp_path: Path) -> None:
    weights = write_folder(tmp_path, config_of("llama", tie_word_embeddings=True))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / INDEX).unlink()
    save_file(weights, tmp_path / SINGLE)
    model = load_model(tmp_path)
    assert model.head.weight.equal(weights["model.embed_tokens.weight"])


def test_cut_and_missing_shards_end_with_status_2(tmp_path: Path, capsys: Any) -> None:
    write_folder(tmp_path / "hf", config_of("glm4"))
    shard = tmp_path / "hf/model-00002-of-00002.safetensors"
    words = ["import", f"from={tmp_path}/hf", f"run={tmp_path}/run"]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(words) == 2
    assert "is cut: it has" in capsys.readouterr().err
    shard.unlink()
    assert main(words) == 2
    assert f"{shard} is missing" in capsys.readouterr().err
    (tmp_path / "hf/config.json").unlink()
    assert main(words) == 2
    assert "config.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": "2"}, {"rope_scaling": 3}, {"layer_types": 7}]
)
def test_a_config_of_other_kinds_is_a_sentence(
    tmp_path: Path, capsys: Any, fields: dict[str, Any]
) -> None:
    config = {**config_of("llama"), "head_dim": None, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["import", f"from={tmp_path}", f"run={tmp_path}/run"]) == 2
    assert "config.json" in capsys.readouterr().err


def model_of(**fields: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SIZES, **fields}))
    initialize_model(model, model.config, seed=0)
    return model


def test_muP_is_folded_into_the_final_norm(tmp_path: Path) -> None:
    model = model_of(mup_base_width=4, tie_word_embeddings=True)
    save_model(model, tmp_path / "out")
    tokens = torch.randint(0, 40, (2, 9))
    positions = torch.arange(9).expand_as(tokens)
    expected = model.logits(model(tokens, positions))
    found = load_model(tmp_path / "out")(tokens)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-6


def test_fp16_is_refused_where_it_would_be_infinite(tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.model.layers["1"].mlp.up_proj.weight[3, 4] = 70000.0
    with pytest.raises(ConfigError, match=r"dtype=fp16 ends at 65504.*up_proj.*use dtype=bf16"):
        save_model(model, tmp_path / "out", torch.float16)
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "out", torch.bfloat16)
    assert load_model(tmp_path / "out").model.layers["1"].mlp.up_proj.weight[3, 4] == 70144.0


def test_nothing_is_overwritten(tmp_path: Path, capsys: Any) -> None:
    write_folder(tmp_path / "hf", config_of("llama"))
    words = ["import", f"from={tmp_path}/hf", f"run={tmp_path}/run"]
    assert main(words) == 0
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", f"run={tmp_path}/run", f"to={tmp_path}/hf"]) == 2
    with pytest.raises(ConfigError, match="is there already"):
        save_model(model_of(), tmp_path / "hf")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step=7"], "holds no checkpoint of step 7; it holds 0"),
        (["vocab_size=65"], "vocab_size=65 is more than the 64 rows"),
        (["max_shard_size=5XB"], "max_shard_size=5XB is no size"),
        (["dtype=fp8"], "dtype=fp8 is not a choice"),
        (["chat_template=none.jinja"], "has no tokenizer to go with"),
    ],
)
def test_exports_that_cannot_be(tmp_path: Path, capsys: Any, words: list[str], said: str) -> None:
    write_folder(tmp_path / "hf", config_of("qwen3"))
    words = [f"to={tmp_path}/out", f"run={tmp_path}/run", *words]
    assert main(["import", f"from={tmp_path}/hf", f"run={tmp_path}/run", "vocab_multiple=32"]) == 0
    capsys.readouterr()
    assert main(["export", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_padding_is_zeros_and_is_cut_again(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "hf", config_of("llama"))
    assert main(["import", f"from={tmp_path}/hf", f"run={tmp_path}/run", "vocab_multiple=32"]) == 0
    for words, rows in (([], 40), (["vocab_size=37"], 37), (["vocab_size=64"], 64)):
        to = tmp_path / f"out{rows}"
        assert main(["export", f"run={tmp_path}/run", f"to={to}", "dtype=fp32", *words]) == 0
        assert json.loads((to / "config.json").read_text())["vocab_size"] == rows
        head = load_model(to).head.weight
        kept = min(rows, 40)
        assert head[:kept].equal(weights["lm_head.weight"][:kept])
        assert head[kept:].count_nonzero() == 0
