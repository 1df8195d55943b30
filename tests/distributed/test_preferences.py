"""Preference runs on every kind of layout: the reference and the losses of one process."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.layouts import MODEL, native, zero
from tests.distributed.preferring import Preferred, prefer
from tests.preferences import make_pairs
from tests.world import RankPool

LAYOUTS = {
    layout.name: layout
    for layout in (
        native("fsdp", dp_shard=2),
        native("tp", tp=2),
        native("pp", pp=2),
        native("pp zbv", pp=2, schedule="zbv"),
        zero(2, dp_shard=2),
    )
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    make_pairs(folder / "pairs", 1, vocab_size=MODEL.vocab_size)
    make_pairs(folder / "held", 2, vocab_size=MODEL.vocab_size, num_pairs=11)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, ranks: RankPool) -> dict[int, Preferred]:
    """By the number of blocks."""
    rows = {layout.num_layers: layout.reference for layout in LAYOUTS.values()}
    return {
        blocks: ranks.run(prefer, layout.config, folder, size=1)[0]
        for blocks, layout in rows.items()
    }


def check(found: Preferred, want: Preferred) -> None:
    np.testing.assert_allclose(found.reference, want.reference, rtol=1e-6)
    assert found.pairs == want.pairs
    assert found.losses == pytest.approx(want.losses, rel=TOLERANCE)
    assert found.margins[1:] == pytest.approx(want.margins[1:], rel=1e-3)
    for name, fields in want.held_out.items():
        assert found.held_out[name] == pytest.approx(fields, rel=1e-4), name
    norm = math.sqrt(sum(g.square().sum().item() for g in want.gradients.values()))
    difference = sum(
        (found.gradients[name] - g).square().sum().item() for name, g in want.gradients.items()
    )
    assert math.sqrt(difference) <= 1e-4 * norm


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("deepspeed")])
def test_layouts_of_the_native_engine(
    name: str, folder: Path, alone: dict[int, Preferred], ranks: RankPool
) -> None:
    layout = LAYOUTS[name]
    found = ranks.run(prefer, layout.config, folder, size=layout.size)
    check(found[0], alone[layout.num_layers])
    assert all(np.array_equal(one.reference, found[0].reference) for one in found)
    assert all(one.losses == found[0].losses for one in found)


def test_zero(folder: Path, alone: dict[int, Preferred], deepspeed_ranks: RankPool) -> None:
    layout = LAYOUTS["deepspeed zero2"]
    found = deepspeed_ranks.run(prefer, layout.config, folder, size=2)
    check(found[0], alone[layout.num_layers])


def test_the_margin_begins_at_zero_and_rises(alone: dict[int, Preferred]) -> None:
    first = next(iter(alone.values()))
    assert first.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert first.margins[0] == 0
    assert first.margins[-1] > 1
    assert first.losses[-1] < first.losses[0]
    assert torch.tensor(first.pairs).min() > 0
