"""The batches of a run whose ranks change on the way, with everything that moves switched on."""

import json
from pathlib import Path

import pytest

from data_pipeline.cli import main
from tests.end_to_end.commands import losses, rows
from tests.end_to_end.test_resume import Workplace, assert_one_sentence

MOVING = (
    "data.packing=best_fit",
    "training.micro_batch_size=1",
    "training.batch_ramp=[{until_tokens: 3000, global_batch_tokens: 128}]",
    "training.length_ramp=[{until_tokens: 1500, sequence_length: 16}]",
    "checkpoint.every_steps=100",
    "mixture=phases",
    "mixture.phases=[{until_tokens: 8000, interpolation: linear, weights: {web: 0.8, code: 0.2}},"
    " {weights: {web: 0.3, code: 0.7}}]",
)
ADAPTIVE = (
    "mixture=adaptive", "mixture.interval_tokens=1024", "mixture.learning_rate=2",
    "training.num_tokens=7680", "checkpoint.every_steps=100",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("batches"))


def hashes(run: Path) -> dict[int, str]:
    return {row["step"]: row["batch_hash"] for row in rows(run)}


def assert_same_run(one: Path, other: Path) -> None:
    assert hashes(one) == hashes(other)
    expected, found = losses(one), losses(other)
    assert max(abs(found[step] / expected[step] - 1) for step in expected) <= 1e-5


def test_ranks_change_in_the_middle_of_a_phase(place: Workplace) -> None:
    output = place.finish("unpacked", *MOVING, code=2)
    assert_one_sentence(output, "llmtrain-data pack")
    for store in place.stores.values():
        assert main(["pack", f"store={store}", "sequence_length=32"]) == 0
    place.finish("straight", *MOVING)
    for stop, ranks in ((14, 4), (27, 2), (35, 1), (None, 4)):
        word = f"training.stop_at_step={'null' if stop is None else stop}"
        place.finish("changing", *MOVING, word, ranks=ranks)
    assert_same_run(place.run("straight"), place.run("changing"))
    assert {row["sequence_length"] for row in rows(place.run("straight"))} == {16, 32}


def test_an_adaptive_mixture_resumes_between_two_decisions(place: Workplace) -> None:
    place.finish("adaptive", *ADAPTIVE)
    for stop in (5, 18, None):
        word = f"training.stop_at_step={'null' if stop is None else stop}"
        place.finish("stopped", *ADAPTIVE, word)
    assert_same_run(place.run("adaptive"), place.run("stopped"))
    one, other = (
        json.loads((place.run(name) / "journal.json").read_text())
        for name in ("adaptive", "stopped")
    )
    assert len(one["shares"]) > 3
    assert len({tuple(change["shares"]) for change in one["shares"]}) > 1
    assert one == other


def test_steps_left_out_are_those_of_no_other_step(place: Workplace) -> None:
    short = ("training.num_tokens=2560", "checkpoint.every_steps=4")
    place.finish("whole", *short)
    place.finish("skipping", *short, "training.stop_at_step=4")
    place.finish("skipping", *short, "data.skip_steps=[[6, 7]]")
    whole, skipping = hashes(place.run("whole")), hashes(place.run("skipping"))
    assert [skipping[step] for step in (1, 2, 3, 4, 5, 6, 7, 8)] == [
        whole[step] for step in (1, 2, 3, 4, 5, 8, 9, 10)
    ]
    late = place.finish("skipping", *short, "data.skip_steps=[[2, 3]]",
                        "training.num_tokens=3000", code=2)  # fmt: skip
    assert_one_sentence(late, "before step 10, which the run has passed with 16 units at step 6")
