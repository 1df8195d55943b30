"""Blocks are shared out so that no rank, then no stage, has more to do than it must."""

import itertools
from collections.abc import Iterator
from itertools import pairwise

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.planner.stages import rank_of_stage, split_layers, stages_of_rank

BLOCK = 2 * 64 * 16 * 8 + 3 * 64 * 128
"""Weights that multiply in a block of ``model``."""


def model(layers: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


def cost(counts: list[int], vocab_size: int, schedule: str, pp: int) -> tuple[float, float]:
    """Work of the busiest rank and of the most expensive stage."""
    stages = [float(BLOCK * count) for count in counts]
    stages[0] += vocab_size * 64 / 4
    stages[-1] += vocab_size * 64
    ranks = [0.0] * pp
    for stage, amount in enumerate(stages):
        ranks[rank_of_stage(schedule, pp, stage)] += amount
    return max(ranks), max(stages)


def every_split(layers: int, num_stages: int) -> Iterator[list[int]]:
    """All numbers of blocks; only the ends may have none."""
    for edges in itertools.combinations_with_replacement(range(layers + 1), num_stages - 1):
        counts = [stop - start for start, stop in pairwise((0, *edges, layers))]
        if all(counts[1:-1]):
            yield counts


@pytest.mark.parametrize("blocks_of_head", [0.1, 0.6, 1.7, 5.2])
@pytest.mark.parametrize(
    ("layers", "pp", "schedule", "stages_per_rank"),
    [
        (5, 2, "1f1b", 1),
        (9, 3, "gpipe", 1),
        (9, 4, "1f1b", 1),
        (9, 2, "interleaved_1f1b", 2),
        (8, 2, "interleaved_zero_bubble", 3),
        (9, 2, "zbv", 2),
        (10, 3, "dualpipev", 2),
    ],
)
def test_no_split_is_cheaper(
    layers: int, pp: int, schedule: str, stages_per_rank: int, blocks_of_head: float
) -> None:
    vocab_size = int(blocks_of_head * BLOCK / 64)
    num_stages = pp * stages_per_rank
    ranges = split_layers(model(layers, vocab_size), num_stages, schedule, stages_per_rank)

    assert [i for r in ranges for i in r] == list(range(layers))
    got = cost([len(r) for r in ranges], vocab_size, schedule, pp)
    best = min(cost(c, vocab_size, schedule, pp) for c in every_split(layers, num_stages))
    assert got == pytest.approx(best)


def test_a_small_head_splits_evenly() -> None:
    assert [len(r) for r in split_layers(model(8, 8), 4)] == [2, 2, 2, 2]


def test_a_heavy_head_takes_blocks_from_the_last_stage() -> None:
    assert [len(r) for r in split_layers(model(8, 4 * BLOCK // 64), 2)] == [5, 3]


def test_a_head_as_heavy_as_a_stage_stands_alone() -> None:
    assert [len(r) for r in split_layers(model(16, 6 * BLOCK // 64), 4)] == [4, 6, 6, 0]


def test_a_rank_with_both_ends_gets_fewer_blocks() -> None:
    counts = [len(r) for r in split_layers(model(16, 2 * BLOCK // 64), 4, "zbv", 2)]

    assert counts == [4, 4, 5, 3]
    assert stages_of_rank("zbv", 2, 0, 2) == (0, 3)


def test_one_stage_holds_everything() -> None:
    for schedule in ("1f1b", "zbv"):
        assert split_layers(model(3, 100), 1, schedule) == [range(3)]
        assert stages_of_rank(schedule, 1, 0, 1) == (0,)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_stages_are_dealt_out_as_torch_has_them(schedule: str) -> None:
    from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping

    style = "v" if schedule == "zbv" else "loop"
    theirs = generate_rank_to_stage_mapping(4, 8, style=style)

    assert [list(stages_of_rank(schedule, 4, rank, 2)) for rank in range(4)] == [
        theirs[rank] for rank in range(4)
    ]
    assert all(rank_of_stage(schedule, 4, s) == rank for rank in theirs for s in theirs[rank])
