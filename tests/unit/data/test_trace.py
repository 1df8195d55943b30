"""A step's content covers its rows with the documents the loader reads; both ways agree."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.mixture import ConstantMixture
from llmtrain.config.ramp import BatchStage, LengthStage, StepSchedule
from llmtrain.data.journal import Journal, Skip
from llmtrain.data.loader import Batches
from llmtrain.data.mixture import Mixture
from llmtrain.data.order import SourceOrder
from llmtrain.data.pack_blocks import write_packing
from llmtrain.data.packing import PackedOrder
from llmtrain.data.plan import BatchPlan
from llmtrain.data.shares import share_schedule
from llmtrain.data.store import TokenStore
from llmtrain.data.trace import Stretch, numbered, rows_of, sightings, step_content
from tests.stores import pack_store, plan_over, random_documents, write_store

LENGTH, UNITS, STEPS = 32, 4, 40


def stores(folder: Path) -> dict[str, TokenStore]:
    """Two sources of several shards, the smaller one read several times; one of long documents."""
    return {
        "long": write_store(folder / "long", random_documents(12, 90, seed=1), num_shards=2),
        "short": write_store(folder / "short", random_documents(150, 9, seed=2), num_shards=3),
    }


def concat(folder: Path) -> BatchPlan:
    return plan_over(
        stores(folder), {"long": 0.6, "short": 0.4}, seed=5, sequence_length=LENGTH,
        global_batch_size=UNITS,
    )  # fmt: skip


def ramped(folder: Path) -> BatchPlan:
    """Rows of 8, then 16, then 32; batches of 2 units, then of 4; the windows of two steps gone."""
    return plan_over(
        stores(folder), {"long": 0.5, "short": 0.5}, seed=6, sequence_length=LENGTH,
        global_batch_size=UNITS,
        batch_ramp=(BatchStage(until_tokens=10 * 64, global_batch_tokens=64),),
        length_ramp=(
            LengthStage(until_tokens=5 * 64, sequence_length=8),
            LengthStage(until_tokens=15 * 64, sequence_length=16),
        ),
        journal=Journal(skips=(Skip(3, 2), Skip(20, 8))),
    )  # fmt: skip


def packed(folder: Path) -> BatchPlan:
    """Windows of whole documents; those longer than a window are cut into several."""
    orders: dict[str, SourceOrder] = {}
    for name, store in stores(folder).items():
        write_packing(store, pack_store(store, LENGTH))
        orders[name] = PackedOrder(store, name, seed=7, window_tokens=LENGTH)
    num_windows = {name: order.num_windows for name, order in orders.items()}
    schedule = share_schedule(
        ConstantMixture(), num_windows, unit_tokens=LENGTH, num_tokens=1 << 40
    )
    steps = StepSchedule(
        LENGTH, UNITS * LENGTH, length_ramp=(LengthStage(until_tokens=1000, sequence_length=16),)
    )
    return BatchPlan(orders, Mixture(schedule), steps, seed=7)


PLANS: dict[str, Callable[[Path], BatchPlan]] = {
    "concat": concat, "ramped": ramped, "packed": packed,
}  # fmt: skip


@pytest.fixture(params=sorted(PLANS))
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> BatchPlan:
    return PLANS[request.param](tmp_path)


def test_rows_hold_the_documents_that_are_told(plan: BatchPlan) -> None:
    lengths, num_padded = set(), 0
    with Batches(plan, micro_batch_size=1, prefetch=0) as batches:
        for step in range(STEPS):
            shape = rows_of(plan, step)
            lengths.add(shape)
            rows = batches.at(step).tokens.reshape(shape.num_rows, shape.sequence_length).numpy()
            told = np.full_like(rows, -1)
            for stretch in step_content(plan, step):
                (low, high), store = stretch.inputs, plan.orders[stretch.source].store
                assert (told[stretch.row, low:high] == -1).all()
                told[stretch.row, low:high] = store.document(stretch.document)[
                    slice(*stretch.tokens)
                ]
            padding = told == -1
            assert (told[~padding] == rows[~padding]).all()
            num_padded += int(padding.sum())
    assert len(lengths) == len(set(plan.steps.shapes()))
    assert (num_padded > 0) == isinstance(plan.orders[0], PackedOrder)


def test_documents_are_numbered_as_the_loader_does(plan: BatchPlan) -> None:
    with Batches(plan, micro_batch_size=1, prefetch=0) as batches:
        for step in range(STEPS):
            batch, found = batches.at(step), numbered(step_content(plan, step))
            ids, is_target = batch.document_ids.numpy(), batch.loss_weight.numpy() > 0
            pairs = zip(*np.nonzero(is_target), strict=True)
            assert {(row, ids[row, place]) for row, place in pairs} <= set(found)
            for (row, number), stretch in found.items():
                assert (ids[row, slice(*stretch.inputs)] == number).all()
                assert (ids[row] == number).sum() == stretch.inputs[1] - stretch.inputs[0]


def test_both_ways_tell_the_same(plan: BatchPlan) -> None:
    forward: dict[tuple[int, int], list[Stretch]] = defaultdict(list)
    for step in range(STEPS):
        for stretch in step_content(plan, step):
            forward[stretch.source, stretch.document].append(stretch)
    for source, order in enumerate(plan.orders):
        for document in range(order.store.num_documents):
            found = sightings(plan, source, document, before_step=STEPS)
            assert found == sorted(forward[source, document])
            half = [stretch for stretch in found if stretch.step < STEPS // 2]
            assert sightings(plan, source, document, before_step=STEPS // 2) == half
    assert max(stretch.epoch for found in forward.values() for stretch in found) > 0


def test_some_rows_are_a_part_of_all(plan: BatchPlan) -> None:
    for step in (0, 12, STEPS - 1):
        whole = step_content(plan, step)
        num_rows = rows_of(plan, step).num_rows
        for rows in (range(num_rows // 2), range(num_rows // 2, num_rows), range(1, 2)):
            found = step_content(plan, step, rows)
            assert found == [stretch for stretch in whole if stretch.row in rows]


def test_no_step_saw_what_is_behind_the_last_window(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [[7] * 40, [8] * 40, [9] * 3])
    plan = plan_over({"s": store}, None, sequence_length=LENGTH, global_batch_size=1)
    assert store.num_tokens == 86
    assert sightings(plan, 0, 2, before_step=10) == []
    seen = sightings(plan, 0, 1, before_step=2)
    assert [stretch.tokens for stretch in sorted(seen, key=lambda s: s.tokens)] == [(0, 23)]
