"""Stages: finished tasks are not repeated, finished stages not remade, counts have to balance."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.attempts import RESULT, attempt, code_versions
from data_pipeline.document import Document, Run, identity
from data_pipeline.execute.local import InlineExecutor, Task
from data_pipeline.manifest import ConservationError, Counts, Manifest, TaskResult
from data_pipeline.shards import read_documents, to_table
from data_pipeline.sink import Sink
from data_pipeline.stages import Context, Stage, exclusive
from data_pipeline.step import Dropped, Finding, Kept, Verdict
from data_pipeline.transform import Judged, StepCounts, count_edit, judge
from llmtrain.errors import DataError

DOCUMENT = Document(id="ab" * 16, source="s", text="one two three", edits=identity("one two three"))


def write_one(folder: Path, number: int, log: str) -> TaskResult:
    with Path(log).open("a") as file:
        file.write(f"{number} ")
    if number == 2 and not Path(log).with_name("mended").exists():
        raise RuntimeError("killed here")
    sink = Sink(folder=folder, stage="00-test", source="s", name=f"s-{number}")
    document = replace(DOCUMENT, text=f"text {number}")
    sink.count_in(1, len(document.text), len(document.text))
    sink.write_kept(to_table([document]))
    return sink.close()


def make_stage(tmp_path: Path, **settings: int) -> Stage:
    context = Context(out=tmp_path / "out", executor=InlineExecutor())
    return Stage(context, "00-test", settings or {"a": 1}, [{"name": "x", "digest": "1"}])


def finish(tmp_path: Path) -> Manifest:
    stage = make_stage(tmp_path)
    jobs = [({"number": i, "log": str(tmp_path / "log")}, 1) for i in range(4)]
    return stage.finish(stage.run("write", write_one, jobs))


def test_interrupted_stage_goes_on_after_the_last_finished_task(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed here"):
        finish(tmp_path)
    assert make_stage(tmp_path).finished() is None
    assert list((tmp_path / "out/stages/00-test/attempts").iterdir()) == []
    (tmp_path / "mended").touch()
    manifest = finish(tmp_path)
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "2", "3"]
    assert [Path(s.path).name for s in manifest.shards] == [f"s-{i}.parquet" for i in range(4)]
    assert sorted(p.name for p in (tmp_path / "out/stages/00-test").iterdir()) == [
        "documents", "manifest.json", "timing.json",
    ]  # fmt: skip


def test_task_whose_file_was_cut_is_repeated(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed here"):
        finish(tmp_path)
    (tmp_path / "mended").touch()
    (tmp_path / "out/stages/00-test/documents/s-1.parquet").write_bytes(b"PAR1")
    (tmp_path / "out/stages/00-test/tasks/write-00000.json").write_text("")
    manifest = finish(tmp_path)
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "0", "1", "2", "3"]
    texts = [d.text for s in manifest.shards for d in read_documents(tmp_path / "out", s)]
    assert texts == [f"text {i}" for i in range(4)]


def test_finished_stage_is_used_only_with_equal_settings(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    assert make_stage(tmp_path).finished() is None
    manifest = finish(tmp_path)
    assert make_stage(tmp_path).finished() == manifest
    with pytest.raises(DataError, match=r"settings\.a was 1, is 2"):
        make_stage(tmp_path, a=2).finished()


def test_what_a_killed_driver_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    manifest = finish(tmp_path)
    orphan = tmp_path / "out/stages/00-test/attempts/write-00000-x/documents"
    orphan.mkdir(parents=True)
    assert make_stage(tmp_path).finished() == manifest
    assert not orphan.parent.parent.exists()


def attempt_of_another_driver(tmp_path: Path, stage: Stage, number: int) -> Path:
    """Let a worker finish a task that no driver commits."""
    folder, _ = attempt(
        write_one, str(stage.target), f"write-{number:05d}", stage.key, code_versions(),
        {"number": number, "log": str(tmp_path / "log")},
    )  # fmt: skip
    return Path(folder)


def test_what_a_worker_finished_after_its_driver_died_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    for number in (1, 3, 3):
        attempt_of_another_driver(tmp_path, make_stage(tmp_path), number)
    stale = attempt_of_another_driver(tmp_path, make_stage(tmp_path, a=2), 0)
    assert stale.is_dir()
    manifest = finish(tmp_path)
    assert (tmp_path / "log").read_text().split() == ["1", "3", "3", "0", "0", "2"]
    texts = [d.text for s in manifest.shards for d in read_documents(tmp_path / "out", s)]
    assert texts == [f"text {i}" for i in range(4)]


def test_task_that_comes_out_differently_the_second_time_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    stage = make_stage(tmp_path)
    for _ in range(2):
        attempt_of_another_driver(tmp_path, stage, 1)
    second = max((stage.target / "attempts").iterdir())
    values = json.loads((second / RESULT).read_text())
    values["result"]["shards"][0]["digest"] = "0" * 32
    (second / RESULT).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"write-00001 was made twice .* differently \(shards\)"):
        finish(tmp_path)


class Elsewhere:
    """Runs tasks whose folder is that of another machine."""

    def run(self, tasks: Sequence[Task], on_result: Callable[[Task, Any], None]) -> None:
        for task in tasks:
            folder, result = task.function(**task.arguments)
            shutil.move(folder, f"{folder}-there")
            on_result(task, (folder, result))


def test_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    context = Context(out=tmp_path / "out", executor=Elsewhere())
    stage = Stage(context, "00-test", {}, [])
    with pytest.raises(DataError, match="out= has to lie on a file system that all machines share"):
        stage.run("write", write_one, [({"number": 1, "log": str(tmp_path / "log")}, 1)])


def test_second_driver_that_finishes_a_stage_has_to_agree(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    manifest = finish(tmp_path)
    path = tmp_path / "out/stages/00-test/manifest.json"
    before = path.stat().st_mtime_ns
    stage = make_stage(tmp_path)
    result = TaskResult(shards=manifest.shards, counts=manifest.counts)
    assert stage.finish([result]) == manifest
    with pytest.raises(DataError, match=r"made twice and came out differently \(details\)"):
        stage.finish([result], {"more": 1})
    assert path.stat().st_mtime_ns == before


def test_worker_with_other_versions_is_refused(tmp_path: Path) -> None:
    versions = {**code_versions(), "pyarrow": "1.0"}
    with pytest.raises(DataError, match=r"other versions than the driver \(pyarrow 1\.0, "):
        attempt(write_one, str(tmp_path), "k", "s", versions, {"number": 0, "log": "log"})
    assert not (tmp_path / "attempts").exists()


def test_folder_is_held_by_one_command(tmp_path: Path) -> None:
    refused = pytest.raises(DataError, match="another llmtrain-data command is at work")
    with exclusive(tmp_path / "out"), refused, exclusive(tmp_path / "out"):
        pass
    with exclusive(tmp_path / "out"):
        pass


def test_missing_or_cut_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    path = tmp_path / "out" / finish(tmp_path).shards[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"s-0\.parquet is missing or cut"):
        make_stage(tmp_path).finished()


def test_manifest_survives_json_and_tells_no_place(tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    text = finish(tmp_path).to_json()
    assert Manifest.from_json(text).to_json() == text
    assert str(tmp_path) not in text
    assert json.loads(text)["counts"]["documents_out"] == 4


@pytest.mark.parametrize(
    "counts",
    [
        Counts(documents_in=3, documents_out=1, dropped={"a": 1}),
        Counts(
            documents_in=1, documents_out=1, characters_in=9, characters_out=7, deleted={"r": 1}
        ),
        Counts(documents_in=1, documents_out=1, characters_in=9, characters_out=9, inserted=1),
    ],
)
def test_counts_that_do_not_balance_raise(counts: Counts) -> None:
    with pytest.raises(ConservationError, match="02-x"):
        counts.check("02-x")


def test_counts_add_up() -> None:
    total = Counts(documents_in=1, dropped={"a": 1})
    total.add(Counts(documents_in=3, documents_out=1, dropped={"a": 1, "b": 1}))
    total.check("x")
    assert total.dropped == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("after", "runs", "deleted"),
    [
        ("one three", [Run(0, 0, 4), Run(4, 8, 5)], {"r": 3}),  # says too little
        ("one THREE", [Run(0, 0, 4), Run(4, 8, 5)], {"r": 4}),  # is not in both texts
        ("threeone", [Run(0, 8, 5), Run(5, 0, 3)], {"r": 5}),  # changes the order
        ("two threes", [Run(0, 4, 10)], {"r": 3}),  # goes on where the text has ended
    ],
)
def test_edits_are_believed_only_with_proof(
    after: str, runs: list[Run], deleted: dict[str, int]
) -> None:
    with pytest.raises(ConservationError):
        count_edit(Counts(), "rule", "one two three", after, runs, deleted)


class DeleteWord:
    """Deletes one word, or drops documents that do not have it."""

    def __init__(self, word: str) -> None:
        self.name = f"delete_{word}"
        self.word = word

    def __call__(self, document: Document) -> Verdict:
        start = document.text.find(self.word)
        if start < 0:
            return Dropped(f"{self.name}.absent")
        end = start + len(self.word)
        text = document.text[:start] + document.text[end:]
        runs = [Run(0, 0, start), Run(start, end, len(text) - start)]
        runs = [run for run in runs if run.length]
        return Kept(document.edited(text, runs), {self.name: len(self.word)})

    def findings(self, document: Document) -> list[Finding]:
        found = self.word in document.text
        return [Finding(f"{self.name}.absent", str(found), "True", found)]


def judged(*words: str) -> tuple[Judged, dict[str, StepCounts]]:
    steps = {word: DeleteWord(word) for word in words}
    tally = {word: StepCounts() for word in words}
    (entry,) = judge([DOCUMENT], steps, tally)
    return entry, tally


def test_steps_chain_their_edits_to_the_extracted_text() -> None:
    entry, tally = judged("one ", "three")
    assert (entry.current.text, entry.reason) == ("two ", "")
    assert entry.edits == (Run(0, 4, 4),)
    assert entry.counts.deleted == {"delete_one ": 4, "delete_three": 5}
    assert [counts.documents_out for counts in tally.values()] == [1, 1]


def test_dropped_documents_stay_as_they_came_and_count_no_edit() -> None:
    entry, tally = judged("one ", "four")
    assert entry.reason == "delete_four.absent"
    assert entry.original == DOCUMENT
    assert tally["one "].deleted == {"delete_one ": 4}
    assert tally["four"].dropped == {"delete_four.absent": 1}
