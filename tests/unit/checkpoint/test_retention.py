"""Which checkpoints stay."""

from pathlib import Path

import pytest

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.retention import Keep, current, retire, undone


def write(directory: Path, step: int, score: float | None = None) -> None:
    aside = archive.fresh_aside(directory, step)
    (aside / "data").write_bytes(b"weights")
    scores = {} if score is None else {"validation_loss": score, "validation_loss/code": -score}
    archive.commit(aside, {"step": step, "scores": scores}, archive.digests(aside, ["data"]))


def left(directory: Path) -> list[int]:
    return sorted(step for step, _ in archive.scan(directory))


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Keep(last=1), [7]),
        (Keep(last=2), [6, 7]),
        (Keep(last=1, every_steps=3), [3, 6, 7]),
        (Keep(last=1, best=1), [2, 7]),
        (Keep(last=1, best=3), [2, 4, 5, 7]),
        (Keep(last=1, best=1, metric="validation_loss/code"), [1, 7]),
        (Keep(last=1, best=1, metric="validation_loss/other"), [7]),
        (Keep(last=2, every_steps=5, best=1), [2, 5, 6, 7]),
    ],
)
def test_the_newest_the_nth_and_the_best_stay(tmp_path: Path, keep: Keep, steps: list[int]) -> None:
    scores = {1: 9.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.0, 6: 8.0, 7: None}
    for step, score in scores.items():
        write(tmp_path, step, score)
    retire(tmp_path, keep, up_to_step=7)
    assert left(tmp_path) == steps


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    retire(tmp_path, Keep(last=1), up_to_step=3, busy=[tmp_path / archive.folder_name(1)])
    assert left(tmp_path) == [1, 3]


def test_a_deleted_one_is_never_seen_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr(archive.shutil, "rmtree", lambda *_, **__: None)  # killed before it
    retire(tmp_path, Keep(last=1), up_to_step=2)
    assert left(tmp_path) == [2]
    monkeypatch.undo()
    archive.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


@pytest.mark.parametrize(
    ("step", "line", "by", "is_undone"),
    [
        (20, [], [15], True),
        (15, [], [15], False),
        (20, [15], [15], False),
        (20, [15], [15, 15], True),
        (15, [15], [15, 10], True),
        (20, [], [25, 10], True),
        (20, [15], [], False),
        (20, [12], [15, 10], False),
    ],
)
def test_what_was_saved_before_a_run_went_back_further_is_undone(
    step: int, line: list[int], by: list[int], is_undone: bool
) -> None:
    assert undone(step, line, by) == is_undone


def test_the_newest_line_tells_which_are_current() -> None:
    assert current({5: [], 15: [10], 20: [], 10: [10]}) == {5, 10, 15}
    assert current({5: [3], 10: [4]}) == {5, 10}  # of two runs, neither known to undo the other
