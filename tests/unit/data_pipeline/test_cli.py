"""The commands of ``llmtrain-data``: help, wrong input, and clean text to a store."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from data_pipeline.cli import COMMANDS, main
from data_pipeline.tokens.split import held_out_by_cluster
from llmtrain.data.store import TokenStore, verify
from llmtrain.errors import DataError
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
        (["run", "pipeline=demo", "out={out}", "pipeline.store.part_bytes=0"], "part_bytes=0"),
        (
            ["run", "pipeline=c4", "out={out}", "pipeline.split.validation_share=0.0004"],
            "use 0.001",
        ),
        (["run", "input.s={text}", "out={text}/x"], "a file stands where a folder has to be"),
        (["run", "input.s={text}", "out={out}", "pipeline.tokenizer.path=absent"], "no tokenizer"),
        (
            ["run", "input.s={text}", "out={out}", "pipeline.bad_words.path=absent"],
            "the list of bad words absent cannot be read",
        ),
        (
            ["run", "input.s={empty}", "out={out}"],
            "no document is left after 00-extract: 0",
        ),
        (["explain", "out=absent", "doc=123456"], "absent holds no finished stage"),
        (["verify", "store=absent"], "absent does not exist"),
        (["tokenizer", "input={text}", "out={text}"], "a file stands where a folder has to be"),
        (["tokenize", "input={text}", "tokenizer=absent", "out={out}"], "holds no tokenizer"),
        (["tokenize", "input=absent.jsonl", "tokenizer=t", "out={out}"], "error: input=absent"),
        (["tokenizer", "input=absent.jsonl", "out={out}"], "error: input=absent.jsonl matches no"),
        (["tokenizer", "input=[]", "out={out}"], "no input given; say input=PATH"),
        (["sample", "out={out}", "pages=0"], "pages=0"),
        (["run", "input.s={text}", "out={out}", "pipeline.fields.url=u"], "no field 'u'"),
    ],
)
def test_wrong_input_is_one_message_and_status_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("text", "empty")}
    Path(paths["text"]).write_text('{"text": "Hello."}\n')
    Path(paths["empty"]).write_text("")
    assert main([word.format(out=tmp_path / "out", **paths) for word in words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_what_later_stages_need_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Hello."}\n')
    given = [f"input.s={tmp_path}", f"out={tmp_path / 'out'}", "pipeline.url.against=absent"]
    assert main(["run", *given]) == 2
    assert "pipeline.url.against=absent has 0 finished stages" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["fastwarc", "resiliparse", "punkt", "pyarrow"])
def test_a_missing_package_is_one_sentence_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] in ("data_pipeline", package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert import_module("data_pipeline.cli").main(["verify", "store=absent"]) == 2
    assert capsys.readouterr().err.strip() == (
        f"error: the data pipeline needs the package {package}, which is not installed; run: "
        "pip install 'llmtrain[data]'"
    )


def test_an_unknown_id_field_is_refused(
    texts: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"input={texts}", f"tokenizer={tokenizer}", f"out={tmp_path / 'out'}", "id_field=nope"]
    assert main(["tokenize", *words]) == 2
    assert "no field 'nope'; its fields are text; name the right one" in capsys.readouterr().err


def test_a_tokenizer_is_never_overwritten(
    texts: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in tokenizer.iterdir()}
    assert main(["tokenizer", f"input={texts}", "vocab_size=300", f"out={tokenizer}"]) == 2
    assert f"out={tokenizer} holds a tokenizer already; use another" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tokenizer.iterdir()} == before


def test_failed_training_leaves_no_folder(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tokenizer", f"input={texts}", "vocab_size=90000", f"out={tmp_path / 'new' / 'out'}"]
    assert main(words) == 2
    assert "use at most" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tokenizer"
    assert main(["tokenizer", f"input={texts}/*.jsonl.gz", "vocab_size=400", f"out={out}"]) == 0
    return out


def test_clean_text_becomes_a_store(
    texts: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stores" / "mine"
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


def test_a_share_of_clean_text_is_held_out(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = ["tokenize", f"input={texts}", f"tokenizer={tokenizer}", f"out={tmp_path / 'mine'}"]
    assert main([*words, "validation_share=0.2"]) == 0
    train, held_out = (verify(tmp_path / name) for name in ("mine", "mine/validation"))
    assert train.num_documents + held_out.num_documents == 120
    assert 10 < held_out.num_documents < 40
    for store, expected in ((train, False), (held_out, True)):
        ids = [store.record(i).id for i in range(store.num_documents)]
        assert {held_out_by_cluster(id_, 0.2) for id_ in ids} == {expected}


def test_a_store_is_not_read_while_it_is_made_again(
    texts: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    words = ["tokenize", f"tokenizer={tokenizer}", f"out={out}"]
    assert main([*words, f"input={texts}/a.jsonl.gz"]) == 0
    (out / "manifest.json").unlink()
    assert main([*words, f"input={texts}/a.jsonl.gz"]) == 2
    assert "manifest.json is missing; remove" in capsys.readouterr().err
    shutil.rmtree(out / ".pipeline")
    assert main([*words, f"input={texts}/a.jsonl.gz"]) == 0
    shutil.rmtree(out / ".pipeline")
    cut = tmp_path / "b.jsonl.gz"
    cut.write_bytes((texts / "b.jsonl.gz").read_bytes()[:-20])
    assert main([*words, f"input={cut}"]) == 2
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        TokenStore.open(out)


def test_an_id_field_that_is_not_unique_is_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "Hello.", "key": 1}\n')
    out = tmp_path / "mine"
    words = ["tokenize", f"input={tmp_path}/*.jsonl", f"tokenizer={tokenizer}", f"out={out}"]
    assert main([*words, "id_field=key"]) == 2
    assert "names a field that is not unique" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()


def test_tokenizing_a_crawl_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_warc(tmp_path / "c.warc.gz", seed=0, number=2)
    words = ["tokenize", f"input={tmp_path / 'c.warc.gz'}", "tokenizer=t", f"out={tmp_path / 'o'}"]
    assert main(words) == 2
    assert (
        "is no JSONL or Parquet; make text of it with `llmtrain-data run`"
        in capsys.readouterr().err
    )


def test_a_page_given_as_text_is_refused_by_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("A page.\n")
    words = ["classifier", f"positive={page}", f"negative={page}", f"out={tmp_path / 'model'}"]
    assert main(words) == 2
    assert f"{page} is no JSONL or Parquet" in capsys.readouterr().err
