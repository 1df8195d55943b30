"""A compiled run compiles each length once, its evaluation once, and nothing else."""

import pytest

from llmtrain.config.run import broken_rules
from tests.distributed.compiled import Counted, counted
from tests.distributed.layouts import Layout, native
from tests.distributed.ramps import ramped_config
from tests.world import RankPool

TIMEOUT_S = 240.0


def found(layout: Layout, first: int, ranks: RankPool) -> list[Counted]:
    config = ramped_config(layout)
    assert broken_rules(config, layout.size) == []
    return ranks.run(counted, config, first, size=layout.size, timeout_s=TIMEOUT_S)


def test_ramps_evaluation_and_resume_compile_each_shape_once(ranks: RankPool) -> None:
    """Lengths 8, 16, 16, 32, 32 in 4 or 8 windows; the evaluation has no gradients."""
    layout = native("single", dp_shard=1, recompute="full", activation_offload=True)
    assert found(layout, 0, ranks) == [Counted([1, 2, 2, 3, 3], 4, 4)]


@pytest.mark.parametrize(
    "layout",
    [
        native("fsdp2", dp_shard=2, recompute="selective"),
        native("tp2", tp=2),
        native("pp2", pp=2, recompute="full"),
    ],
    ids=lambda layout: layout.name,
)
def test_layouts_compile_each_length_once(layout: Layout, ranks: RankPool) -> None:
    """Lengths 16, 32, 32: a block is one graph, its collectives included."""
    assert found(layout, 2, ranks) == [Counted([1, 2, 2], 2, 2)] * 2
