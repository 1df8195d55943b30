"""What is settled before a run starts: name, paths, stores, tokenizer, the run that is there."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmtrain import logs
from llmtrain.checkpoint import archive
from llmtrain.config.load import load, write_yaml
from llmtrain.config.run import RunConfig
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.store import ShardWriter, write_manifest
from llmtrain.errors import ConfigError
from llmtrain.prepare import prepare, resolve
from llmtrain.run.directory import ExitReason, RunDirectory
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


def prepared(config: RunConfig) -> RunConfig | None:
    with ExitStack() as held:
        return prepare(config, 1, held)


def problems(config: RunConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepared(config)
    return caught.value.problems


def test_a_run_is_named_by_what_may_not_change(make: Make) -> None:
    name = resolve(make()).name
    assert name is not None
    assert name.startswith("3x128-")
    assert resolve(make("optimizer.lr=1e-4", "parallel=pp2")).name == name
    assert resolve(make("training.seed=1")).name != name
    assert resolve(make("name=mine")).name == "mine"


def test_paths_are_absolute_wherever_the_command_ran(make: Make, tmp_path: Path) -> None:
    config = resolve(make("data.validation.a=stores/a", "tokenizer.path=tok"))
    assert config.data.validation == {"a": str(tmp_path / "stores" / "a")}
    assert config.tokenizer.path == str(tmp_path / "tok")


def test_a_good_configuration_leaves_run_json_and_a_log(make: Make, tmp_path: Path) -> None:
    config = prepared(make("name=mine"))
    assert config is not None
    assert config.name == "mine"
    names = sorted(p.name for p in (tmp_path / "runs" / "mine").iterdir())
    assert names == [".lock", "logs", "run.json"]


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
        prepared(make("name=mine", "optimizer.lr=1e-4"))
    assert "goes on with optimizer.lr: 0.003 -> 0.0001" in caplog.text


def test_a_run_that_saved_nothing_may_still_change(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    write_yaml(resolve(make("name=mine")), run / "config.yaml")
    config = prepared(make("name=mine", "training.seed=1"))
    assert config is not None
    assert config.training.seed == 1


HOLD = """
import sys
from pathlib import Path
from llmtrain.run.directory import RunDirectory

with RunDirectory(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_kept_off_a_run_until_the_first_is_gone(
    make: Make, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "mine"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"locked\n"
        (refused,) = problems(make("name=mine"))
        assert f"runs/mine is in use by process {first.pid} on " in refused
        assert "name=NEW" in refused
        assert [p.name for p in run.iterdir()] == [".lock"]
        first.kill()
    assert prepared(make("name=mine")) is not None


def ended_at(run: RunDirectory, step: int, reason: ExitReason = ExitReason.DONE) -> Path:
    """A run that wrote a checkpoint of ``step`` and ended there; gives a file of it."""
    aside = archive.fresh_aside(run.checkpoints, step)
    (aside / "data").write_bytes(b"tensors")
    archive.commit(aside, {"step": step}, archive.digests(aside, ["data"]))
    run.write_status(reason, step)
    return run.checkpoints / archive.folder_name(step) / "data"


def test_a_run_that_is_done_ends_here_in_one_line(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, config = RunDirectory(tmp_path / "runs" / "mine"), make("name=mine")
    data = ended_at(run, config.training.num_steps)
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        assert prepared(config) is None
    assert [r.getMessage() for r in caplog.records] == [
        f"the run runs/mine is done, all {config.training.num_steps} steps of it: nothing to do; "
        "a larger training.num_tokens goes on with it"
    ]
    assert sorted(tmp_path.rglob("*")) == before

    assert prepared(make("name=mine", "training.num_tokens=2e6")) is not None
    assert prepared(make("name=mine", "training.stop_at_step=3")) is not None
    data.write_bytes(b"tensorz")
    assert prepared(config) is not None, "a damaged checkpoint is for the restore to speak of"


@pytest.mark.parametrize(
    ("step", "reason"), [(0, ExitReason.FAILED), (-1, ExitReason.DONE), (0, ExitReason.PREEMPTED)]
)
def test_a_run_that_ended_otherwise_goes_on(
    make: Make, tmp_path: Path, step: int, reason: ExitReason
) -> None:
    config = make("name=mine")
    run = RunDirectory(tmp_path / "runs" / "mine")
    ended_at(run, config.training.num_steps + step, reason)
    assert prepared(config) is not None


def test_a_damaged_config_of_the_run_is_named(make: Make, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "mine")
    ended_at(run, 3)
    run.config_yaml.write_text("model: {")
    (refused,) = problems(make("name=mine"))
    assert refused.startswith("runs/mine/config.yaml: not YAML")


def test_a_folder_that_cannot_be_made_is_one_sentence(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (refused,) = problems(make("runs_dir=file"))
    assert refused.startswith("the run folder file/")
    assert "use another runs_dir" in refused


def test_stores_that_cannot_be_mixed_are_refused_here(make: Make, made: Path) -> None:
    other = f"data.validation.a={made / 'other'}"
    (refused,) = problems(make("tokenizer.path=null", other))
    assert "made with different tokenizers (data.sources.a with " in refused
    (refused,) = problems(make("model.max_position_embeddings=8192",
                               "training.sequence_length=8192",
                               "training.global_batch_tokens=8192"))  # fmt: skip
    assert "source a holds " in refused
    (refused,) = problems(
        make(f"data.sources.b={made / 'good'}", "mixture.weights={a: 1, b: 1e-6}")
    )
    assert "mixture.weights.b is 1e-06 of the sum" in refused


def test_a_damaged_store_is_found_before_there_is_a_run(
    make: Make, made: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(made / "good", copied)
    tokens = copied / "part-00000.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (refused,) = problems(make(f"data.sources.a={copied}"))
    assert f"{tokens} is not the file its manifest lists" in refused
    assert not (tmp_path / "runs").exists()


def test_what_is_trained_on_is_not_held_out(make: Make, made: Path) -> None:
    (refused,) = problems(make(f"data.validation.b={made / 'good'}"))
    assert refused == (
        f"data.validation.b: {made / 'good'} holds the same tokens as data.sources.a, which is "
        "trained on; use a store that was held out, or leave it out"
    )


def test_a_cache_that_cannot_be_made_is_found_before_there_is_a_run(
    make: Make, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    remote = f"data.sources.a='file://{made / 'good'}'"
    (refused,) = problems(make(remote, f"data.cache_dir={tmp_path / 'file' / 'cache'}"))
    assert f"cache cannot be made: {tmp_path / 'file'} is no folder" in refused
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_of_nothing_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    prepared(make("name=mine"))
    assert "evaluation.every_steps=100 evaluates nothing" in caplog.text
