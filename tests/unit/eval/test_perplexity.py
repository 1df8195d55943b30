"""Bits per byte: every token once, packed rows as documents alone, a run read from its folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.config.data import DataConfig, TokenizerConfig
from llmtrain.config.generate import EvalConfig, GenerateConfig
from llmtrain.config.load import to_yaml
from llmtrain.config.model import ModelConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.run import RunConfig
from llmtrain.config.training import CheckpointConfig, TrainingConfig
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.store import ShardWriter, TokenStore, write_manifest
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.eval import generate, perplexity
from llmtrain.eval.perplexity import nats_of, pack, segments, unigram
from llmtrain.eval.trained import load_run
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.run.progress import Progress
from llmtrain.tokenizer.tokenizer import train_sentencepiece

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
TEXTS = [
    "A store holds the tokens of a source.\nIt is written once.",
    "Short.",
    "def read(path):\n    return path.read_text()\n" * 4,
    "Each document ends with one token that stands for its end, and begins with none.",
]


def made() -> Transformer:
    model = Transformer(CONFIG)
    initialize_model(model, CONFIG, seed=0)
    return model


def documents(*lengths: int) -> list[perplexity.Tokens]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n) for n in lengths]


@pytest.mark.parametrize("sequence_length", [1, 2, 5, 8])
def test_each_target_is_scored_once_with_enough_context(sequence_length: int) -> None:
    for length in range(1, 40):
        document = np.arange(length)
        scored = []
        for part in segments(document, sequence_length):
            assert 2 <= len(part.tokens) <= sequence_length + 1
            for i in range(part.first_scored, len(part.tokens) - 1):
                scored.append(part.tokens[i + 1])
                context = i + 1
                assert context >= min(part.tokens[i] + 1, sequence_length - sequence_length // 2)
        assert scored == list(range(1, length))


def test_rows_hold_every_segment_and_are_nearly_full() -> None:
    parts = [p for d in documents(*range(1, 60)) for p in segments(d, 16)]
    rows = list(pack(iter(parts), 16))
    sizes = [sum(len(p.tokens) - 1 for p in row) for row in rows]
    assert max(sizes) <= 16
    assert sorted(id(p) for row in rows for p in row) == sorted(id(p) for p in parts)
    assert sum(sizes) / (16 * len(rows)) > 0.85


def test_packed_rows_equal_documents_alone() -> None:
    model = made().double()
    held_out = documents(9, 1, 2, 16, 17, 5, 5, 3)

    def alone(document: perplexity.Tokens) -> Tensor:
        tokens = torch.from_numpy(document)[None]
        logits = model.logits(model(tokens[:, :-1], torch.arange(len(document) - 1)[None]))
        return torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")

    with torch.no_grad():
        expected = sum(alone(d).item() for d in held_out if len(d) > 1)
    for batch_tokens in (1, 32, 1000):
        assert math.isclose(nats_of(model, held_out, 16, batch_tokens), expected, rel_tol=1e-12)


class Weights:
    """What a checkpoint asks of an engine."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tokenizer, stores, a config and a checkpoint."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = train_sentencepiece(TEXTS, root / "tokenizer", vocab_size=300)
    for store, texts in (("train", TEXTS), ("held", TEXTS[2:])):
        with ShardWriter(root / store, 0, vocab_size=300, eos_id=tokenizer.eos_id) as writer:
            for i, text in enumerate(texts):
                record = DocumentRecord(id=str(i), text_bytes=len(text.encode()))
                writer.add(tokenizer.encode(text), record)
        write_manifest(
            root / store, [writer.info], tokenizer_hash=tokenizer.hash, vocab_size=300,
            eos_id=tokenizer.eos_id,
        )  # fmt: skip
    config = RunConfig(
        model=CONFIG,
        training=TrainingConfig(num_tokens=64, sequence_length=32, global_batch_tokens=64),
        data=DataConfig(sources={"a": str(root / "train")}, validation={"a": str(root / "held")}),
        tokenizer=TokenizerConfig(path=str(root / "tokenizer")),
    )
    (root / "config.yaml").write_text(to_yaml(config))
    checkpoints = Checkpoints(root / "checkpoints", CheckpointConfig(), Weights(made()), facts={})
    assert checkpoints.save(Progress(num_steps=7, steps=StepSchedule(64, 64), step=7))
    assert checkpoints.wait()
    return root


def test_scores_of_a_run_add_up(run: Path) -> None:
    scores = perplexity.evaluate(EvalConfig(run=str(run)))
    store = TokenStore.open(run / "held")
    found = scores["a"]
    assert scores["all"] == found
    assert found.documents == 2
    assert found.tokens == store.num_tokens
    assert found.bytes == sum(len(text.encode()) for text in TEXTS[2:])
    bits = 1 / math.log(2) / found.bytes
    assert math.isclose(found.uniform_bits_per_byte, found.tokens * math.log(320) * bits)
    training = TokenStore.open(run / "train")
    counts = np.bincount(training.tokens(0, training.num_tokens), minlength=320) + 1
    nats = -np.log(counts / counts.sum())
    tokens = [store.document(i) for i in range(2)]
    total = sum(nats[t].sum() for t in tokens)
    assert math.isclose(found.unigram_bits_per_byte, total * bits)
    model_nats = nats_of(made(), [t.astype(np.int64) for t in tokens], 32, 4096)
    assert math.isclose(found.loss, model_nats / (found.tokens - 2), rel_tol=1e-6)
    first = sum(nats[t[0]] for t in tokens)
    assert math.isclose(found.bits_per_byte, (model_nats + first) * bits, rel_tol=1e-6)
    written = json.loads((run / "eval.json").read_text())
    assert written["step"] == 7
    assert written["a"]["bits_per_byte"] == found.bits_per_byte


def test_the_command_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert perplexity.main(EvalConfig(run=str(run), max_documents=1)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["source", "a", "all"]
    assert json.loads((run / "eval.json").read_text())["a"]["documents"] == 1


def test_generate_prints_prompt_and_continuations(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GenerateConfig(
        run=str(run), prompt="A store", num_samples=2, max_new_tokens=5, save=True
    )
    assert generate.main(config) == 0
    first, second = capsys.readouterr().out.removesuffix("\n").split("\n\n", 1)
    assert first.startswith("A store")
    assert second.startswith("A store")
    kept = json.loads((run / "samples.json").read_text())
    assert kept["step"] == 7
    assert [s["prompt"] + s["completion"] for s in kept["samples"]] == [first, second]
    assert generate.main(GenerateConfig(run=str(run), max_new_tokens=3)) == 0
    with pytest.raises(
        ConfigError, match="the model is meant for 4096; shorten the prompt or lower"
    ):
        generate.main(GenerateConfig(run=str(run), max_new_tokens=5000))


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        load_run(str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; it holds 7"):
        load_run(str(run), step=9)
    text = (run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("hidden_size: 32", "hidden_size: 64"))
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"does not hold the model of its config\.yaml"):
        load_run(str(tmp_path))


def test_names_of_the_record_are_no_source_names(run: Path) -> None:
    with pytest.raises(ConfigError, match="a source is named all"):
        perplexity.evaluate(EvalConfig(run=str(run), sources={"all": str(run / "held")}))


def test_unigram_counts_the_first_tokens(run: Path) -> None:
    store = TokenStore.open(run / "train")
    nats = unigram([store], 320, max_tokens=10)
    assert math.isclose(np.exp(-nats).sum(), 1)
    counts = np.bincount(store.tokens(0, 10), minlength=320) + 1
    np.testing.assert_allclose(nats, -np.log(counts / counts.sum()))
