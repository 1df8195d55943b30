"""The walk-through of docs/post_training.md: conversations to a store, SFT on it, resume, trace."""

import re
from pathlib import Path

import pytest

from data_pipeline.cli import main as data_main
from llmtrain.cli import main
from llmtrain.data.pack_blocks import read_packing
from llmtrain.data.roles import ANSWER
from llmtrain.data.store import TokenStore
from tests.chats import CHATS, TEMPLATE, chat_tokenizer
from tests.end_to_end.commands import losses, rows

SMALL = (
    "model=llama_demo", "model.vocab_size=416", "model.num_hidden_layers=2",
    "model.hidden_size=16", "model.intermediate_size=32", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "training.sequence_length=384", "training.num_tokens=12288",
    "training.global_batch_tokens=1536", "training.micro_batch_size=2", "optimizer.lr=1e-2",
    "monitor.log_every_steps=1", "monitor.wandb=disabled", "data.packing=best_fit",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, its chat store and a store of plain text."""
    folder = tmp_path_factory.mktemp("chat")
    chat_tokenizer(folder / "tokenizer", TEMPLATE.read_text())
    given = [f"input={CHATS}", f"tokenizer={folder / 'tokenizer'}", "validation_share=0.1"]
    assert data_main(["chat", *given, "sequence_length=384", f"out={folder / 'chat'}"]) == 0
    lines = (f'{{"text": "Plain text number {i} of a store, {i * i}."}}' for i in range(200))
    (folder / "plain.jsonl").write_text("\n".join(lines))
    given = [f"input={folder / 'plain.jsonl'}", f"tokenizer={folder / 'tokenizer'}"]
    assert data_main(["tokenize", *given, f"out={folder / 'plain'}"]) == 0
    assert data_main(["pack", f"store={folder / 'plain'}", "sequence_length=384"]) == 0
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    return ["train", *SMALL, f"runs_dir={place}", f"name={name}",
            f"tokenizer.path={place / 'tokenizer'}", f"data.sources.chat={place / 'chat'}",
            f"data.validation.chat={place / 'chat' / 'validation'}",
            "evaluation.every_steps=4", *more]  # fmt: skip


def test_answers_are_learned_resumed_and_traced(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(place, "base", "training.stop_at_step=1")) == 0
    started = (f"checkpoint.start_from={place / 'base'}",)
    mixed = (*started, f"data.sources.plain={place / 'plain'}")
    weights = ("mixture.weights.chat=0.5", "mixture.weights.plain=0.5")
    assert main(words(place, "whole", *mixed, *weights)) == 0
    assert main(words(place, "parts", *mixed, *weights, "training.stop_at_step=3")) == 0
    assert main(words(place, "parts", *mixed, *weights)) == 0
    assert losses(place / "whole") == losses(place / "parts")
    found = losses(place / "whole")
    assert found[max(found)] < 0.9 * found[1]

    capsys.readouterr()
    traced = [f"run={place / 'whole'}", "step=2", "verify=true"]
    assert main(["trace", *traced]) == 0
    said = capsys.readouterr().out
    assert "NOT PROVEN" not in said
    assert re.search(r"(\d+) of \1 spans proven", said)


def test_a_step_of_every_window_counts_every_answer_once(place: Path) -> None:
    store = TokenStore.open(place / "chat")
    windows = read_packing(store, "chat", 384).num_windows
    tokens = windows * 384
    whole = (f"training.global_batch_tokens={tokens}", f"training.num_tokens={tokens}")
    assert main(words(place, "alone", *whole, "training.micro_batch_size=1")) == 0
    (step,) = rows(place / "alone")
    answered = int((store.roles(0, store.num_tokens) & ANSWER).sum())
    assert step["source_tokens"] == {"chat": answered}
    assert 0 < answered < 0.6 * store.num_tokens
