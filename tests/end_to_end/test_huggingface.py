"""The walk-through of docs/huggingface.md: train, export, transformers, import, go on, evaluate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtrain.cli import main
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import write_manifest
from llmtrain.data.writer import ShardWriter
from llmtrain.eval.trained import load_run
from llmtrain.tokenizer.tokenizer import Tokenizer, train
from tests.end_to_end.commands import losses, saved_steps
from tests.unit.tokenizer.test_tokenizer import TEXTS

TASKS = Path(__file__).parents[1] / "golden" / "tasks"
VOCABULARY = 340
PADDED = 352
SMALL = (
    "training.num_tokens=1280", "training.sequence_length=32", "training.global_batch_tokens=128",
    "training.micro_batch_size=4", "optimizer.lr=1e-2", "monitor.log_every_steps=1",
    "monitor.wandb=disabled",
)  # fmt: skip
MODEL = (
    "model=llama_demo", f"model.vocab_size={PADDED}", "model.num_hidden_layers=2",
    "model.hidden_size=16", "model.intermediate_size=32", "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
)  # fmt: skip


def write_store(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """A store as ``llmtrain-data tokenize`` makes it."""
    size, eos = tokenizer.vocab_size, tokenizer.eos_id
    with ShardWriter(folder, 0, vocab_size=size, eos_id=eos) as writer:
        for i, text in enumerate(texts):
            record = DocumentRecord(id=f"{i:032x}", text_bytes=len(text.encode()))
            writer.add(tokenizer.encode(text), record)
    write_manifest(
        folder, [writer.info], tokenizer_hash=tokenizer.hash, vocab_size=size, eos_id=eos
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, two stores, and a run of ten steps."""
    folder = tmp_path_factory.mktemp("huggingface")
    tokenizer = train(TEXTS, folder / "tokenizer", kind="bpe", vocab_size=VOCABULARY)
    write_store(folder / "web", tokenizer, TEXTS[20:])
    write_store(folder / "held_out", tokenizer, TEXTS[:20])
    words = (*MODEL, *SMALL, *data(folder), f"tokenizer.path={folder}/tokenizer", "name=first")
    assert main(["train", *words]) == 0
    return folder


def data(folder: Path) -> tuple[str, ...]:
    return (f"runs_dir={folder}", f"data.sources.web={folder}/web",
            f"data.validation.held_out={folder}/held_out")  # fmt: skip


def scores(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return found


def test_walk_through(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, out, imported = place / "first", place / "first-hf", place / "imported"
    words = [f"run={first}", f"to={out}", "dtype=fp32", f"vocab_size={VOCABULARY}"]
    assert main(["export", *words]) == 0

    # transformers loads it: same ids, same logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = load_run(str(first))
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    for text in TEXTS[:5]:
        ids = ours.tokenizer().encode(text)
        assert their_tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    tokens = torch.tensor([ids, ids[::-1]])
    positions = torch.arange(len(ids)).expand_as(tokens)
    expected = ours.model.logits(ours.model(tokens, positions))[..., :VOCABULARY]
    found = theirs(input_ids=tokens).logits
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-5

    # it comes back with the padding it had, and scores as it did
    assert main(["import", f"from={out}", f"run={imported}", "vocab_multiple=32"]) == 0
    assert main(["eval", f"run={first}"]) == 0
    assert main(["eval", f"run={imported}", f"sources.held_out={place}/held_out"]) == 0
    # Rows of the padding are zeros now, and were trained down a little before.
    before, after = (scores(run)["held_out"]["loss"] for run in (first, imported))
    assert after == pytest.approx(before, rel=0.01)

    # training goes on from it as from the checkpoint it came from
    more = ("experiment=imported", *SMALL, *data(place), "name=more", "checkpoint.every_steps=5")
    words = ["train", "--config-dir", str(imported / "conf"), *more]
    assert main([*words, "training.stop_at_step=5"]) == 0
    assert main(words) == 0
    assert saved_steps(place / "more") == [5, 10]
    assert losses(place / "more")[1] < losses(first)[10] * 1.1 < losses(first)[1]
    assert main(["eval", f"run={place}/more"]) == 0
    assert scores(place / "more")["held_out"]["loss"] < after

    # lm-evaluation-harness scores it
    folder = place / "tasks"
    folder.mkdir()
    for path in TASKS.glob("pages.*"):
        (folder / path.name).write_text(path.read_text().replace("DATA", str(folder)))
    harness = ["tasks=[pages]", f"harness.include_path={folder}", "harness.limit=2"]
    for run in (imported, place / "more"):
        assert main(["eval", f"run={run}", *harness]) == 0
    bits = [
        json.loads((run / "harness.json").read_text())["results"]["pages"]["bits_per_byte,none"]
        for run in (imported, place / "more")
    ]
    assert bits[1] < bits[0]

    # and the export of what came of it knows what was padding
    assert main(["export", f"run={place}/more", "step=5", f"to={place}/more-hf"]) == 0
    config = json.loads((place / "more-hf/config.json").read_text())
    assert (config["vocab_size"], config["torch_dtype"]) == (VOCABULARY, "bfloat16")
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    capsys.readouterr()
    assert main(["generate", f"run={imported}", "prompt=def", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.startswith("def")


@pytest.mark.parametrize(
    "scaling",
    [
        "{kind:linear,factor:4}",
        "{kind:llama3,factor:4,original_max_position_embeddings:32}",
        "{kind:yarn,factor:4,original_max_position_embeddings:32}",
        "null",
    ],
)
def test_longer_context(place: Path, tmp_path: Path, scaling: str) -> None:
    longer = (
        f"checkpoint.start_from={place}/first", f"tokenizer.path={place}/tokenizer",
        f"runs_dir={tmp_path}", f"data.sources.web={place}/web", "name=long",
        "model.max_position_embeddings=128", f"model.rope_scaling={scaling}",
        "model.rope_theta=50000", "training.sequence_length=128", "training.num_tokens=256",
        "training.micro_batch_size=1",
    )  # fmt: skip
    assert main(["train", *MODEL, *SMALL, *longer]) == 0
    run = tmp_path / "long"
    assert main(["export", f"run={run}", f"to={tmp_path}/hf", "dtype=fp32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.max_position_embeddings == 128
    tokens = torch.randint(3, VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(0))
    ours = load_run(str(run)).model
    expected = ours.logits(ours(tokens, torch.arange(128).expand_as(tokens)))
    found = theirs(input_ids=tokens).logits
    assert ((found - expected)[:, 32:].norm() / expected[:, 32:].norm()).item() <= 1e-5


def test_a_new_tokenizer_trains_on_its_own_store(place: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "hf", tmp_path / "other"
    words = [f"run={place}/first", f"to={out}", "dtype=fp32", f"vocab_size={VOCABULARY}"]
    assert main(["export", *words]) == 0
    tokenizer = train(TEXTS, tmp_path / "tok", kind="byte_bpe", vocab_size=355)
    write_store(tmp_path / "store", tokenizer, TEXTS)
    words = [f"from={out}", f"run={run}", f"tokenizer={tmp_path}/tok", "vocab_multiple=32"]
    assert main(["import", *words]) == 0
    more = (*SMALL, f"runs_dir={tmp_path}", f"data.sources.web={tmp_path}/store", "name=more")
    words = ["train", "--config-dir", str(run / "conf"), "experiment=imported", *more]
    assert main(words) == 0
    found = losses(tmp_path / "more")
    assert found[10] < found[1]
    assert main(["export", f"run={tmp_path}/more", f"to={tmp_path}/more-hf"]) == 0
    config = json.loads((tmp_path / "more-hf/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (355, tokenizer.eos_id)


def test_wrong_starts_are_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        run = f"runs_dir={tmp_path}"
        assert main(["train", *MODEL, *SMALL, *data(place), run, *words]) == 2
        return capsys.readouterr().err

    start = f"checkpoint.start_from={place}/first"
    assert "holds no checkpoint; give a run folder" in refused(f"{start}/none", "name=a")
    message = refused(start, "model.intermediate_size=48", "name=b")
    assert "is of another model: 6 weights differ, the first is" in message
    assert main(["train", *MODEL, *SMALL, *data(place), f"runs_dir={tmp_path}", "name=c"]) == 0
    capsys.readouterr()
    assert "checkpoint.start_from: null ->" in refused(start, "name=c")
