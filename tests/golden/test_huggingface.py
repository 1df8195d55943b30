"""Models go out to transformers and come in from it with the same logits and the same bits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from torch import Tensor

from llmtrain.checkpoint.weights import StoredWeights
from llmtrain.cli import main
from llmtrain.interop.huggingface import load_model, save_model
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from tests.golden.test_transformers import LLAMA3_SCALING, SIZES, TOLERANCE, YARN, relative

SWITCHED: Mapping[str, Any] = {
    "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0,
}  # fmt: skip
HALF: Mapping[str, Any] = {"partial_rotary_factor": 0.5}

# Family, fields, rotary parameters, saved type.
MODELS: Mapping[str, tuple[str, dict[str, Any], Mapping[str, Any], torch.dtype]] = {
    "llama1": ("Llama", {"num_key_value_heads": 4}, {}, torch.float32),
    "llama2_tied": ("Llama", {"tie_word_embeddings": True}, {}, torch.float16),
    "llama3": (
        "Llama", {"head_dim": 20}, {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING},
        torch.bfloat16,
    ),
    "llama_biased_linear": (
        "Llama", {"attention_bias": True, "pretraining_tp": 2},
        {"rope_type": "linear", "factor": 2.0}, torch.float32,
    ),
    "llama_yarn": ("Llama", {}, {"rope_type": "yarn", **YARN}, torch.float32),
    "llama_yarn_mscale": (
        "Llama", {"vocab_size": 97},
        {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.5,
         "mscale_all_dim": 0.5}, torch.float32,
    ),
    "mistral": ("Mistral", {"sliding_window": 7}, {}, torch.bfloat16),
    "mistral_full_odd_heads": (
        "Mistral", {"sliding_window": None, "hidden_size": 50, "head_dim": 12}, {}, torch.float32,
    ),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}, {"rope_theta": 1e6}, torch.bfloat16),
    "qwen2_window": ("Qwen2", {**SWITCHED}, {}, torch.float32),
    "qwen3": ("Qwen3", {"head_dim": 20}, {"rope_theta": 1e6}, torch.bfloat16),
    "qwen3_biased_tied_window": (
        "Qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8, **SWITCHED},
        {}, torch.float32,
    ),
    "glm": ("Glm", {"head_dim": 16}, HALF, torch.bfloat16),
    "glm_whole_unbiased_llama3": (
        "Glm", {"head_dim": 12, "attention_bias": False},
        {"partial_rotary_factor": 1.0, "rope_type": "llama3", **LLAMA3_SCALING}, torch.float32,
    ),
    "glm4": ("Glm4", {"head_dim": 16}, HALF, torch.float32),
    "glm4_tied_quarter_linear": (
        "Glm4", {"head_dim": 24, "tie_word_embeddings": True, "num_key_value_heads": 1},
        {"partial_rotary_factor": 0.25, "rope_type": "linear", "factor": 3.0}, torch.float32,
    ),
}  # fmt: skip


def theirs(name: str) -> Any:
    """Make transformers' model with random weights, biases and norms too."""
    kind, fields, rope, dtype = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "tie_word_embeddings": False, **fields},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, **rope},
        attn_implementation="eager", pad_token_id=None, bos_token_id=1, eos_token_id=[2, 3],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    shake(model)
    return model.to(dtype)


def shake(model: torch.nn.Module) -> None:
    """Give every parameter values that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place with a folder ``theirs`` that transformers has saved, in several shards."""
    theirs(request.param).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    return tmp_path


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, as the safetensors package reads it."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def tokens(model: Transformer) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 40))


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_logits_both_ways(folder: Path) -> None:
    our_model = load_model(folder / "theirs", torch.float32)
    batch = tokens(our_model)
    expected = loaded(folder / "theirs")(input_ids=batch).logits
    assert relative(our_model(batch), expected) <= TOLERANCE

    again = Transformer(our_model.config)
    initialize_model(again, again.config, seed=1)
    shake(again)
    save_model(again, folder / "ours", max_shard_bytes=30_000)
    assert len(list((folder / "ours").glob("*.safetensors"))) > 2
    positions = torch.arange(batch.shape[1]).expand_as(batch)
    found = loaded(folder / "ours")(input_ids=batch).logits
    assert relative(found, again.logits(again(batch, positions))) <= TOLERANCE


def test_import_export_and_import_give_the_same_bytes(folder: Path) -> None:
    assert main(["import", f"from={folder}/theirs", f"run={folder}/run", "vocab_multiple=64"]) == 0
    words = [f"run={folder}/run", f"to={folder}/back", "dtype=auto", "max_shard_size=35KB"]
    assert main(["export", *words]) == 0
    before, after = tensors(folder / "theirs"), tensors(folder / "back")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].equal(tensor), name
    config = transformers.AutoConfig.from_pretrained(folder / "back")
    assert config.vocab_size == before["model.embed_tokens.weight"].shape[0]
    assert (config.bos_token_id, config.eos_token_id) == (1, [2, 3])
    generation = json.loads((folder / "back/generation_config.json").read_text())
    assert generation == json.loads((folder / "theirs/generation_config.json").read_text())
    batch = torch.randint(0, config.vocab_size, (2, 40))
    expected = loaded(folder / "theirs")(input_ids=batch).logits
    assert loaded(folder / "back")(input_ids=batch).logits.equal(expected)

    assert main(["import", f"from={folder}/back", f"run={folder}/again", "vocab_multiple=64"]) == 0
    first, second = (whole(folder / run / "checkpoints/step-000000000") for run in ("run", "again"))
    assert second.keys() == first.keys()
    for name, tensor in first.items():
        assert second[name].equal(tensor), name
    assert model_of(folder / "again") == model_of(folder / "run")


def whole(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, put together."""
    stored = StoredWeights(checkpoint)
    found = {}
    for name, shape in stored.shapes.items():
        found[name] = torch.full(shape, torch.nan, dtype=stored.dtypes[name])
        for offsets, piece in stored.pieces(name):
            place = tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))
            found[name][place] = piece
    return found


def model_of(run: Path) -> str:
    """The architecture an import has written down."""
    return yaml.safe_dump(yaml.safe_load((run / "config.yaml").read_text())["model"])
