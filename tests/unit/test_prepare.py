"""What is settled before a run starts: name, paths, stores, tokenizer, the run that is there."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain import logs
from llmtrain.config.load import load, write_yaml
from llmtrain.config.run import RunConfig
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.store import ShardWriter, write_manifest
from llmtrain.errors import ConfigError
from llmtrain.prepare import prepare, resolve
from llmtrain.tokenizer.tokenizer import Tokenizer, train_sentencepiece

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a store made with it, and one that says it was made with another."""
    root = tmp_path_factory.mktemp("made")
    texts = [f"number {i} is followed by number {i + 1}" for i in range(300)]
    tokenizer = train_sentencepiece(texts, root / "tokenizer", vocab_size=300)
    write_store(root / "good", texts, tokenizer, tokenizer.hash)
    write_store(root / "other", texts, tokenizer, "0" * 64)
    return root


def write_store(folder: Path, texts: list[str], tokenizer: Tokenizer, tokenizer_hash: str) -> None:
    folder.mkdir()
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    with ShardWriter(folder, 0, **sizes) as writer:
        for i, text in enumerate(texts):
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            writer.add(ids, DocumentRecord(id=f"{i:032x}", text_bytes=len(text)))
    write_manifest(folder, [writer.info], tokenizer_hash=tokenizer_hash, **sizes)


@pytest.fixture
def make(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.chdir(tmp_path)

    def config(*overrides: str) -> RunConfig:
        base = ["experiment=demo", "parallel=fsdp", f"tokenizer.path={made / 'tokenizer'}"]
        return load("train", [*base, f"data.sources.a={made / 'good'}", *overrides], RunConfig)

    yield config
    logs.close()


def problems(config: RunConfig, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(config, world_size)
    return caught.value.problems


def test_a_run_is_named_by_what_may_not_change(make: Make) -> None:
    name = resolve(make()).name
    assert name is not None
    assert name.startswith("4x128-")
    assert resolve(make("optimizer.lr=1e-4", "parallel=pp2")).name == name
    assert resolve(make("training.seed=1")).name != name
    assert resolve(make("name=mine")).name == "mine"


def test_paths_are_absolute_wherever_the_command_ran(make: Make, tmp_path: Path) -> None:
    config = resolve(make("data.validation.a=stores/a", "tokenizer.path=tok"))
    assert config.data.validation == {"a": str(tmp_path / "stores" / "a")}
    assert config.tokenizer.path == str(tmp_path / "tok")


def test_a_good_configuration_leaves_run_json_and_a_log(make: Make, tmp_path: Path) -> None:
    config = prepare(make("name=mine"), 1)
    assert config.name == "mine"
    names = sorted(p.name for p in (tmp_path / "runs" / "mine").iterdir())
    assert names == ["logs", "run.json"]


def test_everything_wrong_is_said_at_once_and_nothing_is_written(
    make: Make, made: Path, tmp_path: Path
) -> None:
    found = problems(
        make(
            f"data.sources.b={made / 'other'}", "data.sources.c=/nowhere",
            "data.sources.d=/data/x.jsonl.zst", "model.vocab_size=256", "parallel.pp=3",
        )
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 6
    assert "parallel.pp=3 does not divide" in text
    assert "set model.vocab_size to at least 300" in text
    assert "data.sources.b: " in text
    assert "was made with tokenizer 0000" in text
    assert "data.sources.c: /nowhere does not exist" in text
    assert "llmtrain-data tokenize input=/data/x.jsonl.zst" in text
    assert list(tmp_path.iterdir()) == []


def test_sources_must_be_named(make: Make) -> None:
    assert "set data.sources.NAME=DIR" in problems(make("~data.sources.a"))[0]


def test_going_on_with_other_settings(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints" / "step-000000010").mkdir(parents=True)
    write_yaml(resolve(make("name=mine")), run / "config.yaml")
    (fatal,) = problems(make("name=mine", "training.seed=1", "optimizer.lr=1e-4"))
    assert "training.seed: 0 -> 1 cannot change in the run" in fatal
    assert "name=NEW" in fatal
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        prepare(make("name=mine", "optimizer.lr=1e-4"), 1)
    assert "goes on with optimizer.lr: 0.003 -> 0.0001" in caplog.text


def test_a_run_that_saved_nothing_may_still_change(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    write_yaml(resolve(make("name=mine")), run / "config.yaml")
    assert prepare(make("name=mine", "training.seed=1"), 1).training.seed == 1
