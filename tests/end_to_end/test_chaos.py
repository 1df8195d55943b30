"""A run that is hit by one fault after the other is, in the end, the one nobody has touched."""

from pathlib import Path

from tests.end_to_end.chaos import LAYOUTS, Storm


def test_a_run_under_faults_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    storm = Storm(tmp_path, LAYOUTS["dp2 pp2"], seed=1, num_steps=50)
    try:
        hits = [storm.hit(fault) for fault in ("kill one", "supervisor", "flip", "kill in a save")]
        storm.finish()
    finally:
        storm.close()
    assert storm.differences() == []
    assert [hit.steps_lost for hit in hits if hit.fault == "supervisor"] == [0]
    assert max(hit.steps_lost for hit in hits) <= 15
