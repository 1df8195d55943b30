"""A model cut over two ranks generates and scores as on one."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.config.model import ModelConfig
from llmtrain.errors import LayoutError
from llmtrain.interop.huggingface import save_model
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
