"""What the reopen command answers, and what the rules did to documents on the way."""

import io
import json
from pathlib import Path

import pytest

from data_pipeline.cli import main
from data_pipeline.report.history import Wanted, histories
from data_pipeline.report.record import FolderRecord
from data_pipeline.shards import read_documents
from llmtrain.data.lineage import DocumentRecord, read_records


def lines_of(folder: Path, records: list[DocumentRecord], source: str) -> str:
    """Requests of a store's records as the command takes them."""
    return "".join(
        json.dumps({
            "folder": str(folder), "id": r.id, "source": source, "url": r.url,
            "source_file_id": r.source_file_id, "member_offset": r.member_offset,
            "member_length": r.member_length, "payload_sha256": r.payload_sha256,
            "extracted_sha256": r.extracted_sha256, "spans": r.resolve(0, 50),
            "extractor": {"name": r.extractor_name, "version": r.extractor_version,
                          "options": r.extractor_options},
        }) + "\n"
        for r in records
    )  # fmt: skip


def test_the_command_proves_a_store_and_tells_what_the_rules_did(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = next(folder.glob("stores/train/*"))
    records = [r for part in sorted(store.glob("*.parquet")) for r in read_records(part)]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines_of(folder, records, store.name)))
    assert main(["reopen", "requests=-", "rules=true"]) == 0
    found = {line["id"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(found) == {record.id for record in records}
    deleted: set[str] = set()
    for record in records:
        line = found[record.id]
        assert line["problem"] == ""
        assert len(line["texts"]) == len(record.resolve(0, 50))
        gone = sum(sum(change["deleted"].values()) for change in line["changes"])
        assert gone > 0 or [run[:2] for run in record.edits] == [(0, 0)]
        deleted |= {rule for change in line["changes"] for rule in change["deleted"]}
    assert {"c4.no_end_mark", "c4.policy"} <= deleted


def test_what_the_rules_deleted_adds_up(record: FolderRecord) -> None:
    first = record.stages[0]
    before = {
        d.id: d for shard in first.manifest.shards for d in read_documents(record.path, shard)
    }
    after = [d for shard in record.kept for d in read_documents(record.path, shard)]
    wanted = [Wanted(d.id, d.source, d.source_file_id) for d in after]
    found = histories(record, wanted)
    assert set(found) == {d.id for d in after}
    for document in after:
        gone = sum(sum(change.deleted.values()) for change in found[document.id])
        assert len(document.text) == len(before[document.id].text) - gone
        clusters = [c.labels for c in found[document.id] if "cluster_size" in c.labels]
        if document.cluster_size > 1:
            assert clusters[-1]["cluster_size"] == str(document.cluster_size)
    steps = {change.step for changes in found.values() for change in changes if change.deleted}
    assert len(steps) == 2


@pytest.mark.parametrize("line", ["[]", "{}", "no json", '{"id": "a", "extractor": {}}'])
def test_a_line_that_is_no_request_is_refused(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(f"{line}\n")
    assert main(["reopen", f"requests={path}"]) == 2
    assert "line 1 of requests=" in capsys.readouterr().err
    assert main(["reopen", f"requests={tmp_path / 'none'}"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["reopen", f"requests={path}", "records=false"]) == 2
    assert "ask for nothing" in capsys.readouterr().err
