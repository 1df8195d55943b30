"""What is said of one document agrees with what the pipeline did to it."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.config.report import ExplainConfig
from data_pipeline.dedup.earlier import earlier_keys
from data_pipeline.document import Document
from data_pipeline.report.explain import explain
from data_pipeline.report.record import FolderRecord, read_folder
from data_pipeline.report.trail import _like, find_documents
from data_pipeline.report.verdict import Event, Explained, render
from data_pipeline.shards import read_documents, read_table, to_table
from data_pipeline.sink import Sink
from llmtrain.data.store import TokenStore
from llmtrain.errors import ConfigError, DataError
from llmtrain.tokenizer.tokenizer import load as load_tokenizer


def dropped_for(record: FolderRecord, reason: str) -> Document:
    """The first document that was dropped for a reason."""
    for stage in record.stages:
        for shard in stage.manifest.dropped:
            reasons = read_table(record.path, shard, ["reason"]).column("reason").to_pylist()
            if reason in reasons:
                return read_documents(record.path, shard)[reasons.index(reason)]
    raise AssertionError(f"the crawl has no document for {reason}")


def explain_one(record: FolderRecord, doc: str) -> Explained:
    (found,) = explain(ExplainConfig(out=str(record.path), doc=doc))
    return found


def event(found: Explained, name: str) -> Event:
    return next(event for event in found.events if event.name == name)


@pytest.mark.parametrize("reason", ["c4.curly_bracket", "c4.few_sentences"])
def test_rules_are_measured_also_after_one_has_failed(record: FolderRecord, reason: str) -> None:
    found = explain_one(record, dropped_for(record, reason).id)
    assert found.reason == reason
    assert event(found, "c4").outcome == f"dropped: {reason}"
    failed = [f.rule for e in found.events for f in e.findings if not f.passed]
    assert reason in failed
    assert event(found, "pii").outcome.startswith("not reached; would")
    assert event(found, "pii").findings
    assert event(found, "minhash").outcome == "not reached"
    assert event(found, "url").outcome == "kept"


def test_duplicate_says_who_stayed(record: FolderRecord) -> None:
    gone = dropped_for(record, "url.duplicate")
    outcome = event(explain_one(record, gone.id), "url").outcome
    winner = outcome.partition("; ")[2].partition(" ")[0]
    stayed = explain_one(record, winner)
    assert event(stayed, "url").outcome == "kept"
    assert stayed.document.timestamp > gone.timestamp


def test_member_of_a_cluster_says_who_stayed(record: FolderRecord) -> None:
    gone = dropped_for(record, "minhash.duplicate")
    outcome = event(explain_one(record, gone.id), "minhash").outcome
    assert f"one of {gone.cluster_size} in cluster {gone.cluster}" in outcome
    winner = outcome.rpartition("; ")[2].partition(" ")[0]
    stayed = event(explain_one(record, winner), "minhash").outcome
    assert stayed.endswith(f"stands for a cluster of {gone.cluster_size}")


def test_kept_document_is_found_in_its_store(record: FolderRecord) -> None:
    documents = read_documents(record.path, record.kept[0])
    found = explain_one(record, documents[-1].id)
    assert found.stored is not None
    store = TokenStore.open(record.path / found.stored.store)
    assert found.stored.part == "part-00000"
    ids = store.document(found.stored.number)
    assert found.stored.record.num_tokens == len(ids)
    tokenizer = load_tokenizer(record.path / "tokenizer")
    assert tokenizer.decode(ids[:-1].tolist()) == documents[-1].text
    assert found.text == documents[-1].text
    assert all(f.passed for e in found.events for f in e.findings)


def test_page_of_text_names_origin_verdict_and_rules(record: FolderRecord) -> None:
    gone = dropped_for(record, "c4.curly_bracket")
    text = render(explain_one(record, gone.id))
    assert text.splitlines()[0] == gone.url
    assert f"at {gone.member_offset:,} (+{gone.member_length:,})" in text
    assert "crawl-0000" in text
    assert "dropped in 02-c4: c4.curly_bracket" in text
    assert any("c4.curly_bracket" in s and s.endswith("FAILS") for s in text.splitlines())
    assert all(line == line.rstrip() for line in text.splitlines())


def test_address_is_found_without_its_scheme(record: FolderRecord, tmp_path: Path) -> None:
    gone = dropped_for(record, "c4.few_sentences")
    page = tmp_path / "why" / "page.html"
    url = gone.url.replace("https://www.", "http://") + "/?utm_source=x"
    found = explain(ExplainConfig(out=str(record.path), url=url, html=str(page)))
    assert gone.id in {one.document.id for one in found}
    assert "c4.few_sentences" in page.read_text()


def test_address_inside_an_address_is_found(record: FolderRecord, tmp_path: Path) -> None:
    url = "https://web.archive.example/2020/https://www.example.org/a/"
    stage = record.stages[0]
    sink = Sink(
        folder=tmp_path / "stages" / stage.name, stage=stage.name, source="s", name="x"
    )  # fmt: skip
    table = to_table([
        Document(id="a" * 32, source="s", text="x", url="https://web.archive.example/2020/"),
        Document(id="b" * 32, source="s", text="x", url=url),
    ])  # fmt: skip
    sink.write_kept(table)
    (shard,) = sink.close().shards
    manifest = replace(stage.manifest, shards=[shard], dropped=[])
    archive = replace(record, path=tmp_path, stages=(replace(stage, manifest=manifest),))
    assert find_documents(archive, url=url) == ["b" * 32]
    gone = Document(id="c" * 32, source="s", text="y", url=url.replace("https", "http"))
    assert _like(table, gone, "url") == [1]


def test_command_takes_an_address_as_it_is(
    record: FolderRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = dropped_for(record, "c4.few_sentences")
    for words in (
        ["explain", f"out={record.path}", f"url={gone.url}?utm_x=1,2&b=(3)"],
        ["run", "pipeline=demo", f"out={record.path}", "--explain", f"{gone.url}?utm_x=1,2&b=(3)"],
        ["run", f"--explain={gone.url}", f"out={record.path}"],
    ):
        assert main(words) == 0
        assert "dropped in 02-c4: c4.few_sentences" in capsys.readouterr().out


def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    stage = tmp_path / "stages/00-extract"
    stage.mkdir(parents=True)
    (stage / "manifest.json").write_text('{"stage": ')
    with pytest.raises(DataError, match=r"manifest\.json is damaged; put it back, or remove"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        earlier_keys(str(tmp_path), "extract", {})
    (tmp_path / "pipeline.json").write_text("")
    with pytest.raises(DataError, match=r"pipeline\.json is damaged; put it back, or remove it"):
        read_folder(tmp_path)


def test_unknown_documents_are_refused(record: FolderRecord) -> None:
    with pytest.raises(DataError, match=r"none of the 1\d\d documents read .* has the address"):
        explain(ExplainConfig(out=str(record.path), url="https://absent.example/"))
    with pytest.raises(DataError, match="has an id that begins with ffff"):
        explain(ExplainConfig(out=str(record.path), doc="ffff"))
    with pytest.raises(ConfigError, match="give url=ADDRESS or doc=ID, one of them"):
        ExplainConfig(out="x")
