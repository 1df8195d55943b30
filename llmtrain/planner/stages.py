"""Which pipeline stage holds which blocks, and which rank holds which stages, as arithmetic.

Invariant: a function of the configuration alone, so that every rank, both engines and the planner
work out the same split.

    split_layers(config, num_stages=4)                  # [range(0, 3), range(3, 6), ...]
    stages_of_rank("zbv", pp=2, pp_rank=0, stages_per_rank=2)    # (0, 3)
"""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import V_SCHEDULES


def stages_of_rank(schedule: str, pp: int, pp_rank: int, stages_per_rank: int) -> tuple[int, ...]:
    """List the stages that pipeline rank ``pp_rank`` holds, in the order of the model.

    Schedules in V order fold the pipeline: rank r holds stages r and 2 pp - 1 - r. The others deal
    stages out in rounds (arXiv:2104.04473): r, r + pp, r + 2 pp and so on.
    """
    stages = range(pp * stages_per_rank)
    return tuple(stage for stage in stages if rank_of_stage(schedule, pp, stage) == pp_rank)


def rank_of_stage(schedule: str, pp: int, stage: int) -> int:
    """Tell which pipeline rank holds ``stage``."""
    if schedule in V_SCHEDULES and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def split_layers(
    config: ModelConfig, num_stages: int, schedule: str = "1f1b", stages_per_rank: int = 1
) -> list[range]:
    """Share the blocks out among the stages so that the busiest rank has least to do.

    Among the splits with that, one whose most expensive stage is cheapest: bubbles last as long as
    stages do. Both are exact optima. The cost of a part is its number of weights that multiply, the
    head's included; the embedding counts a quarter of its weights: its lookup is cheap, its dense
    gradient and update are not. The first and the last stage may have no block, where embedding or
    head cost more than their share; every other stage has one at least.

    Args:
        config: the model.
        num_stages: stages of the whole pipeline, at most the number of blocks.
        schedule: which rank holds which stages.
        stages_per_rank: stages on each rank.

    Returns:
        The blocks of each stage.
    """
    width = config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    block = 4 * (2 * width * config.head_size * heads + 3 * width * config.intermediate_size)
    ends = [0] * num_stages
    ends[0] += config.vocab_size * width
    ends[-1] += 4 * config.vocab_size * width

    pp = num_stages // stages_per_rank
    ranks = [rank_of_stage(schedule, pp, stage) for stage in range(num_stages)]
    edges = [0, *accumulate(_share_out(config.num_hidden_layers, block, tuple(ends), tuple(ranks)))]
    return [range(start, stop) for start, stop in pairwise(edges)]


@functools.cache
def _share_out(
    num_blocks: int, block: int, ends: tuple[int, ...], ranks: tuple[int, ...]
) -> list[int]:
    """Give each stage a number of blocks of cost ``block`` beside its part of ``ends``.

    Blocks are alike, so handing them out one by one to where least is done minimises the most that
    any rank does. The same under limits finds the least limit on stages that leaves room for all.
    """
    unlimited = block * num_blocks + sum(ends)
    counts = _hand_out(num_blocks, block, ends, ranks, unlimited, unlimited)
    done = [0] * (max(ranks) + 1)
    for stage, rank in enumerate(ranks):
        done[rank] += ends[stage] + block * counts[stage]
    costs = sorted({end + block * count for end in ends for count in range(num_blocks + 1)})
    least = bisect_left(
        costs,
        True,
        key=lambda cost: bool(_hand_out(num_blocks, block, ends, ranks, max(done), cost)),
    )
    return _hand_out(num_blocks, block, ends, ranks, max(done), costs[least])


def _hand_out(
    num_blocks: int,
    block: int,
    ends: Sequence[int],
    ranks: Sequence[int],
    rank_limit: int,
    stage_limit: int,
) -> list[int]:
    """Hand out blocks while no rank and no stage exceeds its limit; empty if some are left over.

    Of equals the later stage is served: it keeps fewer micro-batches between its two passes.
    """
    last = len(ends) - 1
    counts = [0 if stage in (0, last) else 1 for stage in range(last + 1)]
    stage_done = [end + block * count for end, count in zip(ends, counts, strict=True)]
    rank_done = [0] * (max(ranks) + 1)
    for stage, rank in enumerate(ranks):
        rank_done[rank] += stage_done[stage]
    for _ in range(num_blocks - sum(counts)):
        open_stages = [
            (rank_done[rank], stage_done[stage], -stage)
            for stage, rank in enumerate(ranks)
            if rank_done[rank] + block <= rank_limit and stage_done[stage] + block <= stage_limit
        ]
        if not open_stages:
            return []
        stage = -min(open_stages)[2]
        counts[stage] += 1
        stage_done[stage] += block
        rank_done[ranks[stage]] += block
    return counts if max(stage_done) <= stage_limit else []
