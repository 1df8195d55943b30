"""``llmtrain trace`` on runs that were never trained: a configuration, stores and raw files."""

import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from data_pipeline.cli import main as data_main
from data_pipeline.config.run import RunConfig as DataRun
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.pipeline import run_pipeline
from data_pipeline.stages import Context
from llmtrain.checkpoint.facts import data_facts
from llmtrain.cli import main
from llmtrain.config.data import DataConfig, TokenizerConfig
from llmtrain.config.load import build, write_yaml
from llmtrain.config.load import load as load_config
from llmtrain.config.mixture import AdaptiveMixture
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.trace import TraceConfig
from llmtrain.config.training import TrainingConfig
from llmtrain.data.document_loss import DocumentLoss, write_document_losses
from llmtrain.data.journal import Accepted, Journal
from llmtrain.data.lineage import DocumentRecord, read_records
from llmtrain.data.store import ShardWriter
from llmtrain.errors import ConfigError, DataError, LLMTrainError
from llmtrain.run.directory import write_json
from llmtrain.tokenizer.tokenizer import load, train
from llmtrain.trace.command import main as trace
from llmtrain.trace.documents import DocumentKey, KnownDocument, Seen
from llmtrain.trace.proof import Answer, verdict
from llmtrain.trace.run import open_run
from tests.texts import TEXTS

STEPS = 16


def texts(number: int, first: int = 0) -> list[dict[str, str]]:
    """Rows in several scripts, each unlike the others; personal data in those from 100 on."""
    languages = sorted(TEXTS)
    mail = "" if first < 100 else " Write to someone@mail.org or to 94.130.20.7 about it."
    return [
        {"text": f"Text {i}: {TEXTS[languages[i % len(languages)]]}{mail} Ende {i}.",
         "url": f"https://www.example.org/{i}?a=b,c"}
        for i in range(first, first + number)
    ]  # fmt: skip


class InThisProcess(InlineExecutor):
    """Runs the tasks of a command without starting workers."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files, a tokenizer, a store of clean text, one of a pipeline, and a run over both."""
    root = tmp_path_factory.mktemp("trace")
    rows = {"one": texts(10), "two": texts(6, first=100)}
    tokenizer = root / "tokenizer"
    train(
        (row["text"] for part in rows.values() for row in part),
        tokenizer, kind="byte_bpe", vocab_size=300,
    )  # fmt: skip
    for name, part in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (root / f"{name}.jsonl").write_text(lines)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("data_pipeline.commands.LocalExecutor", InThisProcess)
    assert data_main([
        "tokenize", f"input={root / 'one.jsonl'}", f"tokenizer={tokenizer}",
        f"out={root / 'stores' / 'one'}", "validation_share=0.2",
    ]) == 0  # fmt: skip
    monkeypatch.undo()
    settings = ["pipeline=custom", "pipeline.stages=[pii]", f"pipeline.tokenizer.path={tokenizer}"]
    given = [f"input.two={root / 'two.jsonl'}", f"out={root / 'corpus'}"]
    config = load_config(
        "data_run", [*settings, "pipeline.split.validation_share=0", *given], DataRun
    )
    run_pipeline(config, Context(out=root / "corpus", executor=InlineExecutor()))
    write_run(root, root / "run")
    return root


def configuration(root: Path, **data: Any) -> RunConfig:
    sources = {"one": str(root / "stores/one"), "two": str(root / "corpus/stores/train/two")}
    held_out = {"one": str(root / "stores/one/validation")}
    return RunConfig(
        name="run",
        model=ModelConfig(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        ),
        parallel=ParallelConfig(dp_shard=2),
        training=TrainingConfig(
            num_tokens=64 * 4 * STEPS * 2, sequence_length=64, global_batch_tokens=256, seed=3
        ),
        data=DataConfig(sources=sources, validation=held_out, **data),
        tokenizer=TokenizerConfig(path=str(root / "tokenizer")),
    )  # fmt: skip


def write_run(root: Path, run: Path, **data: Any) -> RunConfig:
    """A run that has done half of its steps."""
    run.mkdir(parents=True, exist_ok=True)
    config = configuration(root, **data)
    write_yaml(config, run / "config.yaml")
    (run / "metrics.jsonl").write_text(f'{{"step": {STEPS}, "loss": 1.0}}\n{{"step": 17, "lo')
    return config


def change_corpus(run: Path, after: int) -> None:
    """Note that the run went on with other data."""
    journal = Journal(accepted=(Accepted(after, ("content was",)),))
    write_json(run / "journal.json", journal.to_plain())


@pytest.fixture(autouse=True)
def pipeline_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the data pipeline takes 2 s each time; the last test starts it as it is."""

    def run(command: list[str], input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "data_pipeline"]
        out, err = StringIO(), StringIO()
        with monkeypatch.context() as inside, redirect_stdout(out), redirect_stderr(err):
            inside.setattr("sys.stdin", StringIO(input))
            status = data_main(command[3:])
        return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())

    monkeypatch.setattr("llmtrain.trace.proof.subprocess", SimpleNamespace(run=run))


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """What the command prints as JSON; Hydra, a tenth of a second each time, is left out."""
    asked: dict[str, Any] = {"json": "-"}
    for word in words:
        (key, _, part), value = word.partition("=")[0].partition("."), word.partition("=")[2]
        plain = value if key in ("run", "url", "doc", "raw") else yaml.safe_load(value)
        asked[key] = {**asked.get(key, {}), part: plain} if part else plain
    status = trace(build(TraceConfig, asked))
    out, err = capsys.readouterr()
    assert status == 0, out + err
    return [json.loads(line) for line in out.splitlines()]


def test_a_step_is_told_with_its_proof(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load(made / "tokenizer")
    seen, inserted = set(), 0
    for step, more in ((1, "verify=true"), (2, "rules=false"), (STEPS, "rules=false")):
        found = lines(capsys, f"run={made / 'run'}", f"step={step}", "text=true", more)
        covered = dict.fromkeys(range(4), 0)
        for line in found:
            assert line["step"] == step
            if step == 1:
                assert (line["proven"], line["problem"]) == (True, "")
                assert line["file"] == str(made / f"{line['source']}.jsonl")
            assert (line["rank"], line["micro_batch"]) == (line["row"] // 2, line["row"] % 2)
            low, high = line["inputs"]
            assert low == covered[line["row"]]
            covered[line["row"]] = high
            number = int(line["url"].rpartition("/")[2].partition("?")[0])
            (row,) = texts(1, first=number)
            final = row["text"].replace("someone@mail.org", "email@example.com")
            final = final.replace("94.130.20.7", "22.214.171.124")
            assert line["text"] == final[slice(*line["characters"])]
            assert line["text"].encode() == final.encode()[slice(*line["bytes"])]
            origin = "".join(row["text"][low:high] for low, high in line["extracted"])
            assert len(origin) == len(line["text"]) - line["inserted"]
            inserted += line["inserted"]
            if line["source"] == "two" and step == 1:
                (change,) = line["rules"]
                assert change["step"] == "01-pii"
                assert sum(change["deleted"].values()) == len("someone@mail.org94.130.20.7")
            ids = tokenizer.encode(final)[slice(*line["tokens"])]
            assert line["text"] in tokenizer.decode(ids) or "\ufffd" in tokenizer.decode(ids)
            seen.add(line["id"])
        assert covered == dict.fromkeys(range(4), 64)
    assert len(seen) > 6
    assert inserted > 30


def test_a_document_is_told_with_the_steps_that_saw_it(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_document: dict[str, list[dict[str, Any]]] = {}
    for step in range(1, STEPS + 1):
        for line in lines(capsys, f"run={made / 'run'}", f"step={step}", "rules=false"):
            by_document.setdefault(line["url"], []).append(line)
    twice = max(by_document, key=lambda url: len(by_document[url]))
    assert len({line["epoch"] for line in by_document[twice]}) > 1
    for url in (twice, min(by_document)):
        found = lines(capsys, f"run={made / 'run'}", f"url={url}", "rules=false")
        assert found == by_document[url]
        bare = url.removeprefix("https://www.")
        assert lines(capsys, f"run={made / 'run'}", f"url=http://{bare}/", "rules=false") == found
        id_ = found[0]["id"]
        assert lines(capsys, f"run={made / 'run'}", f"doc={id_[:20]}", "rules=false") == found
    longer = lines(capsys, f"run={made / 'run'}", f"url={twice}", "planned=true", "rules=false")
    assert longer[: len(by_document[twice])] == by_document[twice]
    assert max(line["step"] for line in longer) > STEPS


def test_a_rank_has_its_part(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [f"run={made / 'run'}", "step=2", "rules=false"]
    whole = lines(capsys, *asked)
    parts = [lines(capsys, *asked, f"rank={rank}") for rank in (0, 1)]
    assert parts[0] + parts[1] == whole
    assert {line["rank"] for line in parts[1]} == {1}
    other = lines(capsys, *asked, "dp_size=4", "rank=3")
    assert {(line["row"], line["rank"], line["micro_batch"]) for line in other} == {(3, 3, 0)}


def test_the_table_reads_like_the_lines(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [f"run={made / 'run'}", "step=3", "rules=false"]
    found = lines(capsys, *asked)
    out = made / "lines.jsonl"
    assert main(["trace", *asked, "verify=true", "text=true", f"json={out}"]) == 0
    table = capsys.readouterr().out
    assert f"{len(found)} of {len(found)} spans proven" in table
    for line in found:
        assert line["url"] in table
        assert f"row {line['row']}: {line['source']}, epoch {line['epoch']}, window " in table
    assert "proven by " in table
    written = [json.loads(line) for line in out.read_text().splitlines()]
    more = {"text", "proven", "problem", "file"}
    assert [{k: v for k, v in line.items() if k not in more} for line in written] == found
    assert main(["trace", f"run={made / 'run'}", f"doc={found[0]['id']}", "text=true"]) == 0
    page = capsys.readouterr().out
    assert found[0]["id"] in page
    assert "micro-batch" in page


def keep_losses(
    run: Path, step: int, found: list[dict[str, Any]], **changed: Any
) -> list[DocumentLoss]:
    """Keep losses of some documents of a step, the later the higher."""
    losses = [
        DocumentLoss(
            row=line["row"], source=line["source"], loss=float(i) or None,
            document=sum(other["row"] == line["row"] for other in found[:i]),
            targets=line["inputs"][1] - line["inputs"][0]
            - float(line["tokens"][1] == line["num_tokens"]),
        )
        for i, line in enumerate(found)
    ]  # fmt: skip
    losses = [loss for loss in losses if loss.targets]
    write_document_losses(run, step, [DocumentLoss(**{**asdict(x), **changed}) for x in losses])
    return losses


def test_documents_are_sorted_by_their_loss(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(made, run)
    asked = (f"run={run}", "rules=false")
    in_order = {step: lines(capsys, *asked, f"step={step}") for step in (2, 4)}
    kept = {step: keep_losses(run, step, found) for step, found in in_order.items()}
    found = lines(capsys, *asked, "step=2", "losses=true")
    assert [line["loss"] for line in found] == [
        None, *sorted((loss.loss for loss in kept[2] if loss.loss), reverse=True)
    ]  # fmt: skip
    plain = [{k: v for k, v in line.items() if k not in ("loss", "targets")} for line in found]
    assert all(one in in_order[2] for one in plain)
    last = [line for line in found if line["rank"] == 1]
    assert lines(capsys, *asked, "step=2", "losses=true", "rank=1") == last
    short = lines(capsys, *asked, "losses=true")
    assert [(line["step"], line["url"]) for line in short] == [
        (step, found[0]["url"]) for step, found in in_order.items()
    ]
    assert trace(TraceConfig(run=str(run), rules=False, losses=True)) == 0
    table = capsys.readouterr().out
    assert "the worst document of each of 2 steps whose losses were kept" in table
    assert all(found[0]["id"] in table for found in in_order.values())
    assert trace(TraceConfig(run=str(run), step=4, rules=False, losses=True)) == 0
    assert f"step 4 of 32, {len(kept[4])} documents by loss" in capsys.readouterr().out


def test_losses_that_are_not_there_or_of_another_batch(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(made, run)
    with pytest.raises(DataError, match=r"again with 'monitor\.document_loss_steps=\[2\]'"):
        open_and_trace(run, step=2)
    with pytest.raises(DataError, match="keeps the losses of no step it has done"):
        open_and_trace(run)
    keep_losses(run, 2, lines(capsys, f"run={run}", "rules=false", "step=2"), targets=65.0)
    with pytest.raises(DataError, match="is of another batch than step 2 has today: row 0 has no"):
        open_and_trace(run, step=2)
    with pytest.raises(ConfigError, match="losses=true takes step=N or nothing, found url"):
        open_and_trace(run, url="a")


def open_and_trace(run: Path, **asked: Any) -> None:
    trace(TraceConfig(run=str(run), losses=True, rules=False, **asked))


def test_wrong_input_is_one_sentence(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"run={made / 'run'}"
    id_ = next(iter(read_records(made / "stores/one/validation/part-00000.docs.parquet"))).id
    cases = {
        (f"run={made}", "step=1"): "is not a run folder: it has no config.yaml",
        (run, "step=17"): "has done 16 of 32 steps; planned=true looks ahead",
        (run, "step=33", "planned=true"): "has done 16 of 32 steps",
        (run, "step=0"): "step=0 must be at least 1",
        (run,): "give one of step=N, url=ADDRESS and doc=ID, found none of them",
        (run, "step=1", "doc=a"): "found step and doc",
        (run, "step=1", "rank=2"): "the run's data-parallel ranks are 0 to 1",
        (run, "step=1", "sources.six=a"): "its sources are one, two",
        (run, "step=1", "sources.one=/none"): "/none does not exist",
        (run, "step=1", "tokenizer=/none"): "if the tokenizer was moved, give tokenizer=DIR",
        (run, "doc="): "doc is empty; give its value",
        (run, "step=1", "data=/none"): "data=/none is no folder of llmtrain-data",
        (run, "doc=xyz"): "has an id that begins with xyz",
        (run, "url=https://example.org/3?a=b,d"): "near are https://www.example.org/",
        (run, "url=https://no.where/"): "none of the",
        (run, f"doc={id_}"): "is held out: it is in data.validation.one",
        (run, "step=1", "verify=true", "raw=/none"): "raw=/none matches no file",
        (run, "step=1", "rules=false", "json=/none/a"): "json=/none/a cannot be written",
    }
    for words, expected in cases.items():
        with pytest.raises(LLMTrainError) as found:
            lines(capsys, *words)
        assert expected in str(found.value)
    assert main(["trace", run, "step=17"]) == 2
    assert capsys.readouterr().err.startswith("error: step=17 is beyond the run")


def test_changed_data_is_refused(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(made, run)
    facts = data_facts(open_run(TraceConfig(run=str(run), step=1)).plan)
    checkpoint = run / "checkpoints" / "step-000000008"
    checkpoint.mkdir(parents=True)
    meta = {"step": 8, "world_size": 6, "facts": facts}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    assert open_run(TraceConfig(run=str(run), step=1)).dp_size == 6
    meta["facts"] = {**facts, "content of data.sources.one": "else"}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(Exception, match=r"content of data\.sources\.one was else"):
        open_run(TraceConfig(run=str(run), step=1))
    change_corpus(run, after=8)
    assert open_run(TraceConfig(run=str(run), step=1)).first == 8


def test_steps_before_a_change_that_was_accepted_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(made, run)
    change_corpus(run, after=5)
    assert main(["trace", f"run={run}", "step=5"]) == 2
    assert "after step 5 (journal.json says what changed)" in capsys.readouterr().err
    after = lines(capsys, f"run={run}", "step=6", "rules=false")
    document = lines(capsys, f"run={run}", f"doc={after[0]['id']}", "rules=false")
    assert after[0] in document
    assert min(line["step"] for line in document) > 5


def test_an_adaptive_mixture_is_told_as_far_as_it_has_decided(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    config = replace(configuration(made), mixture=AdaptiveMixture(interval_tokens=1536))
    write_yaml(config, tmp_path / "run" / "config.yaml")
    asked = [f"run={tmp_path / 'run'}", "planned=true", "rules=false"]
    known = open_run(TraceConfig(run=str(tmp_path / "run"), step=1)).decided(2 * STEPS)
    assert 0 < known < 2 * STEPS
    assert main(["trace", *asked, f"step={known + 1}"]) == 2
    assert "is not decided yet: the adaptive mixture chooses" in capsys.readouterr().err
    last = lines(capsys, *asked, f"step={known}")[0]
    document = lines(capsys, *asked, f"doc={last['id']}")
    assert last in document
    assert max(line["step"] for line in document) == known


def test_moved_stores_and_raw_files_are_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "away"
    shutil.copytree(made / "stores" / "one", root / "one", ignore=lambda *_: [".pipeline"])
    shutil.copytree(made / "corpus" / "stores" / "train" / "two", root / "two")
    shutil.copytree(made, tmp_path / "raw", ignore=lambda *_: ["stores", "run", "corpus"])
    asked = [f"run={made / 'run'}", "step=1", "verify=true", f"sources.one={root / 'one'}",
             f"sources.two={root / 'two'}"]  # fmt: skip
    assert main(["trace", *asked]) == 1
    assert "NOT PROVEN: the raw file with sha256" in capsys.readouterr().out
    found = lines(capsys, *asked, f"raw={tmp_path / 'raw'}")
    assert {line["proven"] for line in found} == {True}
    assert found[0]["file"].startswith(str(tmp_path / "raw"))


def test_a_store_of_another_program_has_no_records(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load(made / "tokenizer")
    with ShardWriter(tmp_path / "s", 0, vocab_size=300, eos_id=tokenizer.eos_id) as writer:
        for row in texts(30):
            writer.add(tokenizer.encode(row["text"]), DocumentRecord(id="0" * 32))
    (tmp_path / "s" / "part-00000.docs.parquet").unlink()
    config = configuration(made)
    data = replace(config.data, sources={"s": str(tmp_path / "s")}, validation={})
    (tmp_path / "run").mkdir()
    write_yaml(replace(config, data=data), tmp_path / "run" / "config.yaml")
    asked = [f"run={tmp_path / 'run'}", "step=2", "planned=true"]
    found = lines(capsys, *asked, "text=true")
    assert "id" not in found[0]
    (row,) = texts(1, first=found[0]["document"])
    assert found[0]["text"] == row["text"][slice(*found[0]["characters"])]
    assert main(["trace", *asked, "verify=true"]) == 1
    assert "written by another program and holds no record" in capsys.readouterr().out
    assert main(["trace", asked[0], "doc=00"]) == 2
    assert "were written by another program and hold no records" in capsys.readouterr().err


def test_a_run_without_a_tokenizer_tells_tokens(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    config = replace(configuration(made), tokenizer=TokenizerConfig())
    write_yaml(config, tmp_path / "run" / "config.yaml")
    asked = [f"run={tmp_path / 'run'}", "step=1", "planned=true", "rules=false"]
    assert "characters" not in lines(capsys, *asked)[0]
    assert main(["trace", *asked, "text=true"]) == 2
    assert "has tokenizer.path=null; give tokenizer=DIR" in capsys.readouterr().err
    found = lines(capsys, *asked, "verify=true", f"tokenizer={made / 'tokenizer'}")
    assert {line["proven"] for line in found} == {True}


def stretch_of(text: str, runs: tuple[tuple[int, int, int], ...]) -> Seen:
    """A stretch that covers characters 2 to 12 of a text."""
    document = KnownDocument(
        key=DocumentKey(0, 0), source="s", tokens=(), num_tokens=1,
        record=DocumentRecord(id="0" * 32), text=text, problem="",
    )  # fmt: skip
    return Seen(
        stretch=None, document=document, rank=None, micro_batch=None,  # type: ignore[arg-type]
        characters=(2, 12), runs=runs,
    )  # fmt: skip


def test_inserted_characters_need_no_origin_and_others_are_compared() -> None:
    seen = stretch_of("ab<name>cdefghij", ((8, 30, 4),))
    assert seen.num_inserted == 6
    assert verdict(seen, Answer(texts={(30, 34): "cdef"})) == ""
    assert "says 'cdXf' at character 30" in verdict(seen, Answer(texts={(30, 34): "cdXf"}))
    assert verdict(seen, Answer(problem="gone")) == "gone"
    assert "another program" in verdict(seen, None)


def test_it_starts_without_torch(made: Path) -> None:
    code = (
        "import sys; from llmtrain.cli import main; "
        f"status = main(['trace', 'run={made / 'run'}', 'step=1', 'verify=true']); "
        "sys.exit(status or 7 * ('torch' in sys.modules or 'pandas' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ConfigError, match="give one of"):
        TraceConfig(run="a")
