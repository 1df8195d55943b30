"""The commands of ``llmtrain-data``: help, wrong input, and clean text to a store."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.cli import COMMANDS, main
from llmtrain.data.store import TokenStore
from llmtrain.tokenizer.tokenizer import load as load_tokenizer
from tests.crawl import sentence, write_warc

HEAVY = ("torch", "pyarrow", "numpy", "numba", "fastwarc", "resiliparse", "hydra")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(1)
    for name in ("a", "b"):
        rows = [{"text": "\n".join(sentence(rng) for _ in range(5))} for _ in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}])
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_names_every_command(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*([name] if name else []), "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ([name] if name else COMMANDS))


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from data_pipeline.cli import main; main(['run', '--help']); "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "unknown command rnu; did you mean run?"),
        (["run", "pipline=demo", "out=x"], "pipline"),
        (["run", "pipeline=dmeo", "out=x"], "did you mean demo"),
        (["run", "pipeline=demo", "input.web=absent/*.warc.gz", "out={out}"], "matches no file"),
        (["run", "pipeline=demo", "out={out}", "pipeline.split.validation_share=2"], "[0, 1)"),
        (["run", "pipeline=demo", "out={out}", "num_workers=0"], "num_workers=0"),
        (["run", "pipeline=demo", "out={out}", "pipeline.stages=[url,url]"], "url twice"),
        (["run", "pipeline=demo", "out={out}", "pipeline.minhash.preset=x"], "preset"),
        (["verify", "store=absent"], "absent does not exist"),
        (["tokenize", "input=absent.jsonl", "tokenizer=t", "out={out}"], "matches no file"),
    ],
)
def test_wrong_input_is_one_message_and_status_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(out=tmp_path / "out") for word in words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_clean_text_becomes_a_store(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "stores" / "mine"
    assert (
        main(["tokenizer", f"input={texts}/*.jsonl.gz", "vocab_size=400", f"out={tokenizer}"]) == 0
    )
    words = ["tokenize", f"input={texts}", f"tokenizer={tokenizer}", f"out={out}", "num_workers=2"]
    assert main(words) == 0
    assert main(["verify", f"store={out}"]) == 0
    found = json.loads(capsys.readouterr().out)
    store = TokenStore.open(out)
    assert found == {"store": str(out), "documents": 120, "tokens": store.num_tokens, "shards": 2}
    first = json.loads(gzip.decompress((texts / "a.jsonl.gz").read_bytes()).splitlines()[0])["text"]
    assert load_tokenizer(tokenizer).decode(store.document(0)[:-1].tolist()) == first
    assert store.record(0).text_bytes == len(first.encode())
    before = (out / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_tokenizing_a_crawl_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_warc(tmp_path / "c.warc.gz", seed=0, number=2)
    words = ["tokenize", f"input={tmp_path / 'c.warc.gz'}", "tokenizer=t", f"out={tmp_path / 'o'}"]
    assert main(words) == 2
    assert "is a crawl; make text of it with `llmtrain-data run`" in capsys.readouterr().err
