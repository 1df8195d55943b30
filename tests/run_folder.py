"""A small run folder with random weights and a tokenizer, without any training."""

from collections.abc import Iterable
from pathlib import Path

from llmtrain.checkpoint.weights import NewWeight, write_weights
from llmtrain.config.data import TokenizerConfig
from llmtrain.config.load import write_yaml
from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import MonitorConfig, TrainingConfig
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.run.directory import RunDirectory
from llmtrain.tokenizer.tokenizer import train

VOCABULARY = 290
MODEL = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
    initializer_range=0.3,
)  # fmt: skip


def make_run(root: Path, texts: Iterable[str]) -> Path:
    """Write ``root/tok``, trained on texts, and ``root/run``."""
    train(texts, root / "tok", kind="byte_bpe", vocab_size=VOCABULARY)
    run = RunDirectory(root / "run")
    model = Transformer(MODEL)
    initialize_model(model, MODEL, seed=1)
    weights = [
        NewWeight(name=name, shape=tuple(p.shape), dtype=p.dtype, rows=lambda a, b, p=p: p[a:b])
        for name, p in model.state_dict().items()
    ]
    write_weights(run.checkpoints, weights, carried={})
    config = RunConfig(
        name="run", model=MODEL, tokenizer=TokenizerConfig(path=str(root / "tok")),
        training=TrainingConfig(num_tokens=48, sequence_length=48, global_batch_tokens=48),
        monitor=MonitorConfig(wandb="disabled"),
    )  # fmt: skip
    write_yaml(config, run.config_yaml)
    return run.path
