"""The report of a real small run: its numbers are those of the manifests, and it loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.cli import main
from data_pipeline.config.report import ReportConfig
from data_pipeline.document import Document
from data_pipeline.report.card import CARD_VERSION
from data_pipeline.report.funnel import make_rows
from data_pipeline.report.funnel_card import sample
from data_pipeline.report.page import write_report
from data_pipeline.report.record import FolderRecord
from data_pipeline.report.survey import (
    TopCounter,
    choose,
    count_words,
    survey_dropped,
    take_survey,
)
from data_pipeline.shards import Shard, read_documents, to_table
from data_pipeline.sink import Sink
from llmtrain.errors import ConfigError, DataError

DOCS = Path(__file__).parents[4] / "docs" / "data.md"


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return write_report(ReportConfig(out=str(folder))).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def card(folder: Path, page: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "data_card.json").read_text())
    return content


def test_rows_chain_and_steps_of_a_pass_stand_in_their_order(record: FolderRecord) -> None:
    names = [row.name for row in record.rows]
    assert names == [
        "extract", "url", "c4", "pii", "line_dedup", "minhash", "split", "tokenize",
    ]  # fmt: skip
    for before, after in zip(record.rows, record.rows[1:], strict=False):
        assert before.documents_out == after.documents_in
    for row in record.rows:
        assert row.documents_in == row.documents_out + sum(row.dropped.values())


def test_sources_of_every_row_add_up(record: FolderRecord) -> None:
    for row in record.rows[:-1]:
        assert sum(i for i, _ in row.sources.values()) == row.documents_in, row.name
        assert sum(o for _, o in row.sources.values()) == row.documents_out, row.name


def test_funnel_rows_do_not_depend_on_the_order_of_json(record: FolderRecord) -> None:
    stage = next(stage for stage in record.stages if stage.kind == "c4+pii")
    rows = make_rows(stage.manifest, {"seconds": 3.0, "steps": {"c4": 1.0, "pii": 2.0}})
    assert [(row.stage[3:], row.seconds) for row in rows] == [("c4", 1.0), ("pii", 2.0)]


def test_survey_counts_what_the_shards_hold(folder: Path, record: FolderRecord) -> None:
    documents = [d for shard in record.kept for d in read_documents(folder, shard)]
    survey = take_survey(folder, record.kept, read_bytes=1 << 30)
    assert survey.share == 1.0
    assert survey.documents.total() == len(documents)
    assert survey.words.total() == sum(len(d.text.split()) for d in documents)
    north = [len(d.text) for d in documents if d.source == "north"]
    expected = np.bincount([int(2 * np.log2(n)) for n in north], minlength=44)
    assert survey.lengths["north"].tolist() == expected.tolist()
    assert survey.domains.counts == {"example.org": len(documents)}
    sizes = {d.cluster: d.cluster_size for d in documents if d.cluster_size > 1}
    assert {(c, n) for n, c, _ in survey.clusters} <= set(sizes.items())
    assert survey.clusters[0][0] == max(sizes.values())


def test_a_part_is_read_of_more_than_was_asked_for(folder: Path, record: FolderRecord) -> None:
    survey = take_survey(folder, record.kept, read_bytes=30_000)
    assert 0 < survey.text_bytes.total() <= 30_000
    assert survey.share == survey.text_bytes.total() / sum(s.text_bytes for s in record.kept)
    again = choose(list(reversed(record.kept)), 30_000)
    assert {s.path for s in again} == {s.path for s in choose(record.kept, 30_000)}


def test_samples_have_the_smallest_ids(folder: Path, record: FolderRecord) -> None:
    stage = next(stage for stage in record.stages if stage.kind == "c4+pii")
    shards = stage.manifest.dropped
    gone = [(d.id, d.text) for shard in shards for d in read_documents(folder, shard)]
    samples = survey_dropped(folder, shards, 1 << 30, number=2, characters=50).samples
    shown = {one.id for found in samples.values() for one in found}
    assert set(samples) == set(stage.manifest.counts.dropped)
    assert min(gone)[0] in shown
    assert all(len(found) <= 2 for found in samples.values())
    assert {(i, t[:50]) for i, t in gone} >= {
        (one.id, one.text) for found in samples.values() for one in found
    }


def test_dropped_documents_are_counted_by_reason_and_source(record: FolderRecord) -> None:
    for stage in record.stages:
        found = survey_dropped(record.path, stage.manifest.dropped, 1 << 30, number=1)
        assert {r: n.total() for r, n in found.counts.items()} == stage.manifest.counts.dropped
        for source in record.sources:
            rows = sum(s.rows for s in stage.manifest.dropped if s.source == source)
            assert sum(counts[source] for counts in found.counts.values()) == rows


def test_rare_names_are_forgotten_and_the_error_is_known() -> None:
    counter = TopCounter(capacity=10)
    for i in range(100):
        counter.add({"common": 5, f"rare{i}": 1})
    assert len(counter.counts) <= 10
    assert counter.counts["common"] == 500
    assert 0 < counter.error < 100


class Loader(HTMLParser):
    """Notes what a page would load, and that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [str(v) for k, v in attributes if k in ("src", "href", "srcset")]
        if tag not in ("meta", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(page: str) -> None:
    loader = Loader()
    loader.feed(page)
    assert loader.loads == []
    assert loader.open == []
    assert "@import" not in page
    assert "url(" not in page
    assert not re.search(r"<!--\w+-->", page)


def test_page_shows_every_reason_with_samples(page: str, record: FolderRecord) -> None:
    for row in record.rows:
        for reason, number in row.dropped.items():
            assert f"<code>{reason}</code>" in page
            assert f"{number:,}" in page
    for title in ("Funnel", "By source", "Lengths", "Duplicate clusters", "Domains",
                  "Tokens and fertility", "Time", "Settings"):  # fmt: skip
        assert f"<h2>{title}</h2>" in page


def test_texts_of_documents_are_escaped(tmp_path: Path) -> None:
    sink = Sink(folder=tmp_path / "stages/00-extract", stage="00-extract", source="s", name="s-0")
    hostile = Document(id="0" * 32, source="s", text="<script>alert(1)</script>", url='"><b>')
    sink.write_dropped(to_table([hostile]), ["extract.empty"])
    sink.write_kept(to_table([hostile]))
    samples = survey_dropped(tmp_path, sink.close().dropped, 1 << 20, number=1).samples
    drawn = sample(samples["extract.empty"][0], gone=True)
    assert "<script>" not in drawn
    assert '"><b>' not in drawn


def test_scores_in_words_are_not_counted(tmp_path: Path) -> None:
    sink = Sink(folder=tmp_path / "stages/00-extract", stage="00-extract", source="s", name="s-0")
    scores = ["0.75", "good", "-1", "1e-3", "nan", ""]
    sink.write_kept(to_table([
        Document(id=f"{i:032x}", source="s", text="x", metadata={"quality": score})
        for i, score in enumerate(scores)
    ]))  # fmt: skip
    found = take_survey(tmp_path, sink.close().shards, 1 << 20).quality_scores["s"]
    assert np.flatnonzero(found).tolist() == [0, 15]
    assert found.sum() == 2


def flat(tree: object, path: str = "") -> set[str]:
    """Dotted paths of a card; names that are data become NAME."""
    if isinstance(tree, list):
        return {leaf for entry in tree for leaf in flat(entry, f"{path}[]")} or {path}
    if not isinstance(tree, dict):
        return {path}
    whole = ("settings", "code", "manifests", "sources", "survey.dropped.NAME")
    data = ("dropped", "deleted_characters", "sources", "counts", "language", "domain")
    named = path in whole or path.rpartition(".")[2] in data
    return {
        leaf
        for key, entry in tree.items()
        for leaf in flat(entry, f"{path}.{'NAME' if named else key}" if path else key)
    } or {path}


def test_every_field_of_the_card_is_documented(card: dict[str, object]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    paths = {p for p in flat(card) if not p.startswith(("settings", "code", "manifests"))}
    said = {re.sub(r"(\[\]|\.NAME)+$", "", path) for path in paths}
    assert sorted(path for path in said if f"`{path}`" not in text) == []


def test_card_agrees_with_the_manifests(card: dict[str, object], record: FolderRecord) -> None:
    assert card["version"] == CARD_VERSION
    assert card["finished"] is True
    tokens = record.stages[-1].manifest.counts.tokens
    assert card["tokens"]["total"] == tokens  # type: ignore[index]
    sources = card["sources"]
    assert isinstance(sources, dict)
    assert sum(source["tokens"] for source in sources.values()) == tokens
    kept = sum(shard.rows for shard in record.kept)
    assert sum(source["documents"] for source in sources.values()) == kept
    lengths = card["survey"]["length_characters"]  # type: ignore[index]
    assert sum(sum(counts) for counts in lengths["counts"].values()) == kept


def test_card_is_the_same_again(folder: Path, page: str) -> None:
    before = (folder / "data_card.json").read_bytes()
    write_report(ReportConfig(out=str(folder), html=str(folder / "again.html"), samples=1))
    assert (folder / "data_card.json").read_bytes() == before


def test_unfinished_folder_is_reported_up_to_its_last_stage(folder: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    for stage in ("00-extract", "01-url"):
        (begun / "stages").mkdir(parents=True, exist_ok=True)
        (begun / "stages" / stage).symlink_to(folder / "stages" / stage)
    page = write_report(ReportConfig(out=str(begun))).read_text()
    assert "up to 01-url" in page
    assert "Tokens and fertility" not in page


def test_wrong_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no finished stage"):
        write_report(ReportConfig(out=str(tmp_path)))
    with pytest.raises(ConfigError, match="is a folder; name a file in it"):
        write_report(ReportConfig(out=str(folder), html=str(tmp_path)))


def test_damaged_shard_is_refused(record: FolderRecord, tmp_path: Path) -> None:
    shard: Shard = record.kept[0]
    victim = tmp_path / shard.path
    victim.parent.mkdir(parents=True)
    victim.write_bytes((record.path / shard.path).read_bytes()[:-1] + b"\0")
    with pytest.raises(DataError, match="is damaged"):
        take_survey(tmp_path, [shard], 1 << 30)


def test_words_are_counted_across_texts_and_in_slices() -> None:
    texts = ["one two", "", "  three\n", "vier fünf\tsechs", "字字", " ", "last"]
    array = pa.array(texts, pa.large_string())
    assert count_words(array) == sum(len(text.split()) for text in texts)
    assert count_words(array.slice(3, 3)) == 4
    assert count_words(array.slice(5, 1)) == 0
    assert count_words(array.slice(0, 0)) == 0


def test_command_writes_page_and_card_again(folder: Path) -> None:
    for name in ("report.html", "data_card.json"):
        (folder / name).unlink(missing_ok=True)
    assert main(["report", f"out={folder}"]) == 0
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "data_card.json").read_text())["finished"]
