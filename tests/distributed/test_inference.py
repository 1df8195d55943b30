"""A model cut over two ranks generates and scores as on one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.weights import NewWeight, write_weights
from llmtrain.cli import main
from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.load import write_yaml
from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import TrainingConfig
from llmtrain.errors import LayoutError
from llmtrain.interop.huggingface import save_model
from llmtrain.model.adapter import LORA_B
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.place import Place
from tests.distributed.inferences import infer
from tests.world import RankPool

MODEL = ModelConfig(
    vocab_size=67, hidden_size=20, intermediate_size=31, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=9,
    initializer_range=0.4, max_position_embeddings=64,
)  # fmt: skip
"""67 rows and 31 columns are uneven over two ranks."""


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_infer_as_one(ranks: RankPool, tmp_path: Path, tied: bool) -> None:
    config = replace(MODEL, tie_word_embeddings=tied)
    model = Transformer(config)
    initialize_model(model, config, seed=5)
    save_model(model, tmp_path / "hf")
    assert main(["import", f"from={tmp_path}/hf", f"run={tmp_path}/run"]) == 0
    run = str(tmp_path / "run")
    rows, nats = infer(Place(), run, 1)
    assert len(set(rows[0][0])) > 4
    assert rows[0] != rows[1]
    for found, loss in ranks.run(infer, run, 2, size=2):
        assert found == rows
        assert loss == pytest.approx(nats, rel=1e-6)
    with pytest.raises(LayoutError, match="started were 1"):
        infer(Place(), run, 2)


def test_an_adapter_is_cut_with_its_matrices(ranks: RankPool, tmp_path: Path) -> None:
    config = replace(MODEL, adapter=AdapterConfig(rank=3))
    model = Transformer(config)
    initialize_model(model, config, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LORA_B):
                parameter.fill_(0.3)
    weights = [
        NewWeight(
            name=name, shape=tuple(p.shape), dtype=p.dtype,
            rows=lambda start, stop, p=p: p.detach()[start:stop],
        )
        for name, p in model.named_parameters()
    ]  # fmt: skip
    write_weights(tmp_path / "checkpoints", weights, carried={})
    training = TrainingConfig(num_tokens=64, sequence_length=16, global_batch_tokens=16)
    write_yaml(RunConfig(model=config, training=training), tmp_path / "config.yaml")
    rows, nats = infer(Place(), str(tmp_path), 1)
    assert len(set(rows[0][0])) > 4
    for found, loss in ranks.run(infer, str(tmp_path), 2, size=2):
        assert found == rows
        assert loss == pytest.approx(nats, rel=1e-6)
