"""What saves memory changes no bit, wherever a block runs; compiled ones stay within rounding."""

from typing import Any

import pytest

from llmtrain.config.parallel import ParallelConfig
from tests.distributed.recompute import (
    compiled,
    exact,
    exact_under_zero,
    exact_when,
    inside_and_after,
)
from tests.world import RankPool

ALL = ("full", "selective", "budget")

LAYOUTS = {
    "single": (1, ParallelConfig(dp_shard=1)),
    "fsdp2": (2, ParallelConfig(dp_shard=2)),
    "fsdp2_kept": (2, ParallelConfig(dp_shard=2, reshard_after_forward=False)),
    "tp2": (2, ParallelConfig(dp_shard=1, tp=2)),
    "cp2_all_gather": (2, ParallelConfig(dp_shard=1, cp=2)),
    "cp2_ulysses": (2, ParallelConfig(dp_shard=1, cp=2, cp_method="ulysses")),
    "cp2_ring": (2, ParallelConfig(dp_shard=1, cp=2, cp_method="ring")),
    "pp2": (2, ParallelConfig(pp=2, dp_shard=1)),
    "pp2_interleaved": (2, ParallelConfig(pp=2, dp_shard=1, schedule="interleaved_1f1b")),
    "pp2_fsdp2": (4, ParallelConfig(pp=2, dp_shard=2)),
    "tp2_fsdp2": (4, ParallelConfig(dp_shard=2, tp=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_as_keeping_everything(layout: str, ranks: RankPool) -> None:
    size, parallel = LAYOUTS[layout]
    assert ranks.run(exact, parallel, ALL, size=size) == [[]] * size


def test_same_bits_in_bf16(ranks: RankPool) -> None:
    assert ranks.run(exact, ParallelConfig(dp_shard=2), ALL, "bf16", size=2) == [[]] * 2


@pytest.mark.parametrize("stage", [3])
def test_same_bits_under_zero(stage: int, deepspeed_ranks: RankPool) -> None:
    found = deepspeed_ranks.run(exact_under_zero, stage, ("full", "selective"), size=2)
    assert found == [[]] * 2


@pytest.mark.parametrize("layout", ["fsdp2", "cp2_ring"])
def test_compiled_blocks_inside_layouts(layout: str, ranks: RankPool) -> None:
    size, parallel = LAYOUTS[layout]
    assert max(ranks.run(compiled, parallel, "aot_eager", size=size)) <= 5e-6


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fsdp2", {"activation_offload": True, "fsdp_prefetch": 2}),
        ("tp2", {"activation_offload": True}),
        ("pp2_interleaved", {"activation_offload": True, "recompute": "full"}),
        ("fsdp2", {"fsdp_prefetch": 0}),
    ],
)
def test_same_bits_offloaded_or_gathered_ahead(
    layout: str, changes: dict[str, Any], ranks: RankPool
) -> None:
    size, parallel = LAYOUTS[layout]
    assert ranks.run(exact_when, parallel, changes, size=size) == [[]] * size


def test_updates_in_the_backward_of_shards(ranks: RankPool) -> None:
    assert ranks.run(inside_and_after, ParallelConfig(dp_shard=2), size=2) == [[]] * 2
