"""Steps and units both ways: over ramps, over windows left out, and from a window to its steps."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.ramp import BatchStage, LengthStage
from llmtrain.data.journal import Accepted, Journal, ShareChange, Skip, from_plain, read_journal
from llmtrain.data.plan import BatchPlan, StepWindows
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError
from llmtrain.run.directory import write_json
from tests.stores import plan_over, random_documents, write_store

LENGTH = 16
STEPS = 60
SKIPS = (Skip(3, 8), Skip(20, 24), Skip(21, 1))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    root = tmp_path_factory.mktemp("stores")
    return {
        "wiki": write_store(root / "wiki", random_documents(40, 30, seed=1), num_shards=2),
        "code": write_store(root / "code", random_documents(20, 9, seed=2)),
    }


def plan_with(stores: dict[str, TokenStore], skips: tuple[Skip, ...]) -> BatchPlan:
    return plan_over(
        stores,
        {"wiki": 0.75, "code": 0.25},
        seed=7,
        sequence_length=LENGTH,
        global_batch_size=8,
        batch_ramp=[BatchStage(until_tokens=300, global_batch_tokens=4 * LENGTH)],
        length_ramp=[LengthStage(until_tokens=1000, sequence_length=LENGTH // 4)],
        journal=Journal(skips=skips),
    )


def units(batch: StepWindows) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in batch[:3]), strict=True))


def test_steps_of_a_ramp_take_the_same_stream(stores: dict[str, TokenStore]) -> None:
    ramp = plan_with(stores, ())
    flat = plan_over(
        stores, {"wiki": 0.75, "code": 0.25}, seed=7, sequence_length=LENGTH, global_batch_size=4
    )
    taken = [unit for step in range(STEPS) for unit in units(ramp.windows(step))]
    assert taken == [u for step in range(len(taken) // 4) for u in units(flat.windows(step))]
    assert {ramp.windows(step).sequence_length for step in range(STEPS)} == {4, 16}
    assert {len(ramp.windows(step).sources) for step in range(STEPS)} == {4, 8}


def test_windows_left_out_are_in_no_step_and_move_the_others(
    stores: dict[str, TokenStore],
) -> None:
    whole, skipping = plan_with(stores, ()), plan_with(stores, SKIPS)
    stream = [unit for step in range(STEPS) for unit in units(whole.windows(step))]
    expected, first = list[tuple[int, int, int]](), 0
    for step in range(30):
        first += sum(skip.num_units for skip in SKIPS if skip.step == step)
        size = skipping.steps.shape(step).num_units
        assert units(skipping.windows(step)) == stream[first : first + size]
        for unit in range(first, first + size):
            assert skipping.step_of(unit) == step
        expected += stream[first : first + size]
        first += size
    left_out = [unit for unit in range(first) if skipping.step_of(unit) is None]
    assert len(left_out) == sum(skip.num_units for skip in SKIPS)
    assert len(expected) + len(left_out) == first


@pytest.mark.parametrize("skips", [(), SKIPS])
def test_a_window_leads_back_to_its_steps(
    stores: dict[str, TokenStore], skips: tuple[Skip, ...]
) -> None:
    plan = plan_with(stores, skips)
    seen = defaultdict(list)
    for step in range(STEPS):
        for unit, (source, window, epoch) in enumerate(units(plan.windows(step))):
            seen[source, window].append((step, unit, epoch))
    assert max(len(sightings) for sightings in seen.values()) > 2
    for source, order in enumerate(plan.orders):
        for window in range(order.num_windows):
            found = plan.steps_of(source, window, STEPS)
            assert [tuple(sighting) for sighting in found] == seen[source, window]


@pytest.mark.parametrize("step", [0, 3, 15, 20, 22])
def test_what_the_guard_leaves_out_ends_where_a_step_does(
    stores: dict[str, TokenStore], step: int
) -> None:
    """Twice from the same step on: what comes next is what came next."""
    configured = tuple(skip for skip in SKIPS if skip.step <= step)
    plan = plan_with(stores, configured)
    for last in (step + 2, step + 5):
        following = plan.first_unit(last + 1)
        skip = plan.leave_out(step, last)
        plan = plan_with(stores, tuple(sorted((*configured, skip), key=lambda one: one.step)))
        assert plan.first_unit(step) == following
    assert [one.by_guard for one in plan.journal.skips].count(True) == 1


def test_a_journal_survives_json(tmp_path: Path) -> None:
    journal = Journal(
        skips=SKIPS,
        shares=(ShareChange(65_536, (16_384, 49_152), (0.25, -0.1)),),
        accepted=(Accepted(9, ("content of data.sources.a was 1 and is 2",)),),
        undecided=((0.1, 7.0), (1e-300, 0.0)),
    )
    path = tmp_path / "journal.json"
    assert read_journal(path) == Journal()
    write_json(path, journal.to_plain())
    assert read_journal(path) == journal
    assert from_plain({}) == Journal()
    path.write_text('{"skips": [{"step"')
    with pytest.raises(DataError, match=r"journal\.json is damaged"):
        read_journal(path)


def test_positions_are_those_of_windows(stores: dict[str, TokenStore]) -> None:
    order = plan_with(stores, ()).orders[1]
    places = np.arange(order.num_windows)
    for epoch in (0, 3):
        windows = order.windows(epoch, places)
        assert sorted(windows.tolist()) == places.tolist()
        assert np.array_equal(order.positions(epoch, windows), places)
    pieces = order.pieces(np.array([3, 0]))
    assert [part.tolist() for part in pieces[:4]] == [[0, 1], [0, 0], [3 * LENGTH, 0], [LENGTH] * 2]
    assert order.windows_of(0, 1).tolist() == [0]
    assert order.windows_of(LENGTH - 1, 3 * LENGTH + 1).tolist() == [0, 1, 2, 3]
