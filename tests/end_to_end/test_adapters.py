"""An adapter on the weights of a run: trained, resumed bit by bit, evaluated, exported."""

import json
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
import transformers

from llmtrain.cli import main
from llmtrain.eval.trained import load_run
from llmtrain.tokenizer.tokenizer import train as train_tokenizer
from tests.end_to_end.commands import losses, saved_state
from tests.end_to_end.test_huggingface import MODEL, SMALL, VOCABULARY, data, write_store
from tests.golden.test_transformers import relative
from tests.unit.tokenizer.test_tokenizer import TEXTS

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ADAPTER = ("model.adapter.rank=3", "optimizer.weight_decay=0", "checkpoint.every_steps=5")
KINDS = {"lora": (), "nf4": ("model.adapter.quantize_base=nf4",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, two stores, and a base run of ten steps."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = train_tokenizer(TEXTS, folder / "tokenizer", kind="bpe", vocab_size=VOCABULARY)
    write_store(folder / "web", tokenizer, TEXTS[20:])
    write_store(folder / "held_out", tokenizer, TEXTS[:20])
    assert train(folder, "base") == 0
    return folder


def train(folder: Path, name: str, *words: str) -> int:
    places = (*data(folder), f"tokenizer.path={folder}/tokenizer", f"name={name}")
    return main(["train", *MODEL, *SMALL, *places, *words])


def held_out_loss(run: Path) -> float:
    assert main(["eval", f"run={run}"]) == 0
    found = json.loads((run / "eval.json").read_text())
    return float(found["held_out"]["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_resumed(place: Path, kind: str) -> None:
    words = (*ADAPTER, *KINDS[kind], f"checkpoint.start_from={place}/base")
    assert train(place, kind, *words) == 0
    copytree(place / kind, place / f"{kind}-again")
    rmtree(place / f"{kind}-again/checkpoints/step-000000010")
    assert train(place, f"{kind}-again", *words) == 0
    whole, resumed = (saved_state(place / name, 10) for name in (kind, f"{kind}-again"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    base = saved_state(place / "base", 10)
    for name in (name for name in base if name.startswith("model.")):
        packed = kind == "nf4" and name.endswith("_proj.weight")
        assert torch.equal(whole[name], base[name]) != packed, name
    states = {name for name in whole if name.startswith("optim.") and name != "optim.step"}
    assert states
    assert all(".lora_" in name for name in states)
    found, from_nothing = losses(place / kind), losses(place / "base")
    assert all(found[step] < from_nothing[step] for step in found)  # of the same batches


def test_read_and_exported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the runs of the test above."""
    run = place / "lora"
    assert held_out_loss(run) < held_out_loss(place / "base")
    assert main(["generate", f"run={run}", "prompt=the", "max_new_tokens=4"]) == 0
    ours = load_run(str(run)).model
    batch = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(batch.shape[1]).expand_as(batch)
    expected = ours.logits(ours(batch, positions))
    words = ["dtype=fp32", f"vocab_size={VOCABULARY}"]
    assert main(["export", f"run={place}/base", f"to={place}/base-hf", *words]) == 0
    assert main(["export", f"run={run}", f"to={place}/merged", *words]) == 0
    assert main(["export", f"run={run}", f"to={place}/peft", "adapter=true", *words]) == 0

    def theirs(folder: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(place / folder).eval()

    wanted = expected[..., :VOCABULARY]
    base = theirs("base-hf")
    assert relative(base(input_ids=batch).logits, wanted) > 1e-3
    assert relative(theirs("merged")(input_ids=batch).logits, wanted) <= 1e-5
    assert json.loads((place / "peft/adapter_config.json").read_text())["r"] == 3
    assert (place / "peft/adapter_model.safetensors").stat().st_size > 0

    capsys.readouterr()
    for name, words in {  # from its weights, and on a new disk, where no config.yaml is left
        "other": (f"checkpoint.start_from={run}", "model.adapter.alpha=64"),
        "moved": (f"checkpoint.start_from={place}/base", "model.adapter.use_rslora=true"),
    }.items():
        if name == "moved":
            copytree(run / "checkpoints", place / name / "checkpoints")
        assert train(place, name, *ADAPTER, *words) == 2
        assert "holds an adapter of alpha=32 and use_rslora=false (scale 10.6667), the " in (
            capsys.readouterr().err
        )
    assert train(place, "no", f"checkpoint.start_from={run}") == 2
    assert "holds an adapter of rank 3, the configuration has model.adapter=null" in (
        capsys.readouterr().err
    )
    assert main(["export", f"run={place}/base", f"to={place}/none", "adapter=true"]) == 2
    assert "adapter=true found for a run with model.adapter=null" in capsys.readouterr().err
