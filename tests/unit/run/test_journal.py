"""What a run resumes with: the journal of its checkpoint, and what was asked for since."""

import logging
from pathlib import Path

import pytest

from llmtrain.data.journal import Accepted, Journal, Skip, read_journal
from llmtrain.run.journal import RunJournal
from llmtrain.run.mixing import Mixing
from tests.stores import plan_over, random_documents, write_store


def run_journal(
    folder: Path, *skips: Skip, accept_changed: bool = False
) -> tuple[RunJournal, Path]:
    store = write_store(folder / "store", random_documents(9, 20))
    plan = plan_over(
        {"a": store}, None, sequence_length=8, global_batch_size=2, journal=Journal(skips=skips)
    )
    path = folder / "journal.json"
    return RunJournal(plan, Mixing(plan), path, accept_changed=accept_changed), path


def test_what_is_left_out_later_is_added(tmp_path: Path) -> None:
    journal, path = run_journal(tmp_path, Skip(4, 2), Skip(20, 6))
    saved = Journal(skips=(Skip(4, 2), Skip(30, 8))).to_plain()
    assert journal.resume(saved, 20, []) == []
    assert read_journal(path).skips == (Skip(4, 2), Skip(20, 6))
    assert [skip["step"] for skip in journal.to_plain()["skips"]] == [4, 20]


def test_what_was_read_cannot_be_left_out_afterwards(tmp_path: Path) -> None:
    journal, path = run_journal(tmp_path, Skip(4, 2))
    (problem,) = journal.resume({}, 20, [])
    assert problem == (
        "data.skip_steps leaves out 2 units at step 5 before step 20, which the run has passed "
        "with none"
    )
    assert not path.exists()


def test_changed_data_is_refused_or_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = ["content of data.sources.a was 1 and is 2"]
    journal, path = run_journal(tmp_path)
    assert journal.resume({}, 7, changed) == changed
    assert not path.exists()
    (tmp_path / "two").mkdir()
    journal, path = run_journal(tmp_path / "two", accept_changed=True)
    with caplog.at_level(logging.WARNING):
        assert journal.resume({}, 7, changed) == []
    assert "going on at step 7 with other data: content of data.sources.a" in caplog.text
    assert read_journal(path).accepted == (Accepted(7, tuple(changed)),)
    assert journal.resume(journal.to_plain(), 9, []) == []
    assert read_journal(path).accepted == (Accepted(7, tuple(changed)),)


def test_what_the_guard_left_out_goes_with_the_checkpoint(tmp_path: Path) -> None:
    journal, path = run_journal(tmp_path, Skip(4, 2), Skip(12, 6))
    saved = Journal(skips=(Skip(4, 2), Skip(6, 8, by_guard=True), Skip(10, 4, by_guard=True)))
    again = journal.leaving_out(saved.to_plain(), Skip(10, 10, by_guard=True))
    kept = (Skip(4, 2), Skip(6, 8, by_guard=True), Skip(10, 10, by_guard=True), Skip(12, 6))
    for _ in range(2):  # the second time what the guard left out is in the plan already
        assert journal.resume(again, 10, []) == []
        assert read_journal(path).skips == kept
    further = journal.leaving_out(again, Skip(6, 20, by_guard=True))
    assert journal.resume(further, 6, []) == []
    assert read_journal(path).skips == (Skip(4, 2), Skip(6, 20, by_guard=True), Skip(12, 6))
