"""Every layout computes what one process computes; see layouts.py for the table of them."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from llmtrain.config.parallel import Schedule
from llmtrain.config.run import broken_rules
from llmtrain.data.synthetic import synthetic_batch
from tests.distributed.figures import Suite
from tests.distributed.layouts import BF16, LAYOUTS, SHAPE, TABLE_ONLY, TESTED, Layout
from tests.distributed.parity_table import page, rows_of

REPOSITORY = Path(__file__).parents[2]
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def axes_of(layout: Layout) -> frozenset[str]:
    return frozenset(axis for axis in AXES if getattr(layout.parallel, axis) > 1)


def test_the_table_holds_what_it_should() -> None:
    native = [row for row in TESTED.values() if row.engine.kind == "native"]
    deepspeed = [row for row in TESTED.values() if row.engine.kind == "deepspeed"]
    sets = {axes_of(layout) for layout in native}
    for number in (1, 2):
        assert {frozenset(some) for some in combinations(AXES, number)} <= sets
    triples = [found for found in sets if len(found) == 3]
    assert all(any(set(pair) < found for found in triples) for pair in combinations(AXES, 2))
    schedules = {x.parallel.schedule for x in native if x.parallel.pp > 1}
    assert schedules == set(Schedule.__args__)
    assert {x.engine.deepspeed.zero_stage for x in deepspeed} == {0, 1, 2, 3}
    assert len(TESTED) >= 45
    assert set(LAYOUTS) >= TABLE_ONLY
    for layout in LAYOUTS.values():
        assert broken_rules(layout.config, layout.size) == []


def test_the_batch_would_show_a_mean_of_means_and_a_cut_document() -> None:
    batch = synthetic_batch(SHAPE, seed=3, step=0)
    for ranks in (2, 4, 8):
        weights = torch.stack([part.sum() for part in batch.loss_weight.chunk(ranks)])
        assert len(set(weights.tolist())) == ranks
    for chunks in (4, 8):  # cp=2 and cp=4
        border = SHAPE.sequence_length // chunks
        ids = batch.document_ids
        assert bool((ids[:, border - 1] == ids[:, border]).any())
        assert bool((ids[:, border - 1] != ids[:, border]).any() or (ids.diff() != 0).any())
        part = batch.loss_weight.view(SHAPE.rows, chunks, -1).sum((0, 2))
        assert len(set(part.tolist())) > 1


@pytest.mark.parametrize("name", TESTED)
def test_layout_agrees_with_one_process(name: str, suite: Suite) -> None:
    layout = LAYOUTS[name]
    assert suite.measure(layout, layout.tested_steps).beyond() == []


def test_bf16_stays_near_fp32(suite: Suite) -> None:
    exact, rounded = (suite.reference(x) for x in (LAYOUTS["dp2"], BF16[0]))
    assert rounded.start == exact.start
    assert rounded.losses != exact.losses
    errors = [abs(r / e - 1) for r, e in zip(rounded.losses, exact.losses, strict=True)]
    assert max(errors[:5]) <= 2e-3


def test_docs_have_a_row_for_every_layout() -> None:
    written = (REPOSITORY / "docs/parallelism.md").read_text()
    assert [row[0] for row in rows_of(written)] == list(LAYOUTS), (
        "run: python -m tests.distributed.parity_table docs/parallelism.md"
    )
    assert page(written, rows_of(written)) == written
