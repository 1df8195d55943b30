"""The layout: how many ranks along each mesh axis, and how each axis works.

A layout is a performance decision: none of these fields changes the numbers a run computes.

With ``auto`` along dp_shard or dp_replicate the layout is worked out at every start from the number
of processes, so that a run goes on with more or fewer of them: the same global batch is dealt out
anew, and what does not divide is filled up with rows that have no targets.
"""

import math
from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below, outside
from llmtrain.errors import ConfigError, LayoutError

Schedule = Literal[
    "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"
]
"""Orders in which a pipeline can run its micro-batches."""

Recompute = Literal["none", "full", "selective", "budget"]
"""What blocks compute again in the backward."""

SEVERAL_STAGES: frozenset[str] = frozenset(
    {"interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"}
)
"""Schedules that give every rank two or more stages."""
V_SCHEDULES: frozenset[str] = frozenset({"zbv", "dualpipev"})
"""Schedules in which rank r holds stages r and 2 pp - 1 - r, so both ends are on rank 0."""
SPLIT_BACKWARD: frozenset[str] = frozenset({"interleaved_zero_bubble", "zbv", "dualpipev"})
"""Schedules that compute the gradients of inputs and of weights apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks along each axis of the mesh; their product is the number of processes."""

    pp: int = 1
    """Pipeline ranks."""
    dp_replicate: int | Literal["auto"] = 1
    """Data-parallel replicas that each hold everything of their stage.

    ``auto`` takes all ranks that the other axes leave; dp_shard is then a number.
    """
    dp_shard: int | Literal["auto"] = "auto"
    """Data-parallel ranks that share parameters, gradients and optimizer state (FSDP2).

    ``auto`` takes all ranks that the other axes leave. Under DeepSpeed it is the number of
    data-parallel ranks, and engine.deepspeed.zero_stage says what they share.
    """
    cp: int = 1
    """Context-parallel ranks: each holds a part of every sequence."""
    tp: int = 1
    """Tensor-parallel ranks: each holds a part of every matrix, between them of the sequence."""
    schedule: Schedule = "1f1b"
    """Order in which a pipeline runs its micro-batches."""
    stages_per_rank: int | Literal["auto"] = "auto"
    """Pipeline stages on one rank; ``auto`` is 1, or 2 for schedules that need several."""
    cp_method: Literal["all_gather", "ulysses", "ring"] = "all_gather"
    """How context-parallel ranks attend to each other's keys and values."""
    recompute: Recompute = "none"
    """Activations a block computes again in the backward instead of keeping them.

    ``full``: all; ``selective``: all but products of matrices and attention; ``budget``: as few as
    bring the activations down to recompute_budget.
    """
    recompute_budget: float = 0.5
    """budget: share of the blocks' activation bytes that may be kept, 0 to 1."""
    activation_offload: bool = False
    """Keep what blocks save for their backward in host memory, copied while others run."""
    fsdp_prefetch: int = 1
    """Blocks whose parameters FSDP2 gathers ahead of the one that runs; each adds its memory."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Whether FSDP2 frees gathered parameters after a forward; ``auto`` does, but not under pp."""
    reduce_every_microbatch: bool = False
    """Sum FSDP2's gradients over the ranks after every micro-batch, not once a step.

    Each rank then keeps its shard of the sums, else the whole gradients of its stage, 4 bytes a
    parameter, until the last micro-batch.
    """
    replica_sum: Literal["auto", "overlapped", "after"] = "auto"
    """When gradients are summed over replicas: during the last backward or after it.

    ``auto`` overlaps where the backward is not split and parameters are not sharded.
    """
    cpu_offload: bool = False
    """Keep FSDP2's shards, their gradients and the optimizer state in host memory."""

    def __post_init__(self) -> None:
        """Refuse axes below 1 and shares beyond 0 and 1."""
        problems = below(self, 1, "pp", "dp_replicate", "dp_shard", "cp", "tp", "stages_per_rank")
        problems += below(self, 0, "fsdp_prefetch")
        if self.dp_replicate == self.dp_shard == "auto":
            problems.append(
                "dp_replicate=auto and dp_shard=auto found, but one alone can take the ranks that "
                "are left; set dp_shard=1 for plain replicas, or the ranks of a node"
            )
        if problems := problems + outside(self, 0, 1, "recompute_budget"):
            raise ConfigError(problems)

    @property
    def elastic(self) -> bool:
        """Whether the number of data-parallel ranks follows from the number of processes."""
        return "auto" in (self.dp_replicate, self.dp_shard)

    @property
    def fewest_microbatches(self) -> int:
        """Micro-batches that fill the pipeline: one for each stage of a pass down the ranks."""
        if self.pp == 1:
            return 1
        return 2 * self.pp if self.schedule in V_SCHEDULES else self.pp

    @property
    def num_stages_per_rank(self) -> int:
        """Stages on one rank, ``auto`` resolved."""
        if self.stages_per_rank != "auto":
            return self.stages_per_rank
        return 2 if self.pp > 1 and self.schedule in SEVERAL_STAGES else 1

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * self.num_stages_per_rank


def implied_world_size(parallel: ParallelConfig) -> int:
    """The fewest processes the layout runs on: ``auto`` counts as 1."""
    return math.prod(1 if size == "auto" else size for size in _axes(parallel).values())


def resolve_dp(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Ranks along dp_replicate and along dp_shard on ``world_size`` processes.

    Raises:
        LayoutError: the axes do not multiply to the number of processes.
    """
    needed = implied_world_size(parallel)
    if world_size % needed == 0 and (world_size == needed or parallel.elastic):
        left = world_size // needed
        replicate, shard = parallel.dp_replicate, parallel.dp_shard
        return left if replicate == "auto" else replicate, left if shard == "auto" else shard
    shown = [
        f"parallel.{name}={size}"
        for name, size in _axes(parallel).items()
        if size != "auto" and (size > 1 or name == "dp_shard")
    ]
    found = " x ".join(shown)
    wrong = "does not divide the ranks" if parallel.elastic else f"makes {needed} ranks"
    raise LayoutError(
        f"{found} {wrong}, started were {world_size}; {_way_out(parallel, world_size)} "
        f"or start torchrun --nproc-per-node {needed} -m llmtrain ..."
    )


def microbatches_per_rank(
    parallel: ParallelConfig, rows: int, data_ranks: int, micro_batch_size: int
) -> int:
    """Micro-batches each of ``data_ranks`` runs of a global batch of ``rows``.

    As many as hold all rows and fill the pipeline; those beyond the batch are padding.
    """
    count = max(-(-rows // (data_ranks * micro_batch_size)), parallel.fewest_microbatches)
    if parallel.pp > 1 and parallel.schedule.startswith("interleaved"):
        while count % (count // parallel.pp):  # they are taken in equal rounds of at least pp
            count += 1
    return count


def _axes(parallel: ParallelConfig) -> dict[str, int | Literal["auto"]]:
    names = ("pp", "dp_replicate", "cp", "tp", "dp_shard")
    return {name: getattr(parallel, name) for name in names}


def _way_out(parallel: ParallelConfig, world_size: int) -> str:
    """The overrides that fit ``world_size`` processes."""
    fixed = {n: s for n, s in _axes(parallel).items() if s != "auto" and n != "pp"}
    if not parallel.elastic:
        del fixed["dp_shard"]
    rest = math.prod(size for size in fixed.values())
    fit = [n for n in range(1, world_size + 1) if world_size % (n * rest) == 0]
    if not fit:
        product = " x ".join(f"parallel.{name}" for name, size in fixed.items() if size > 1)
        return f"use a {product} that divides {world_size}"
    if parallel.pp in fit:
        return "use parallel.dp_shard=auto"
    choices = f"in {{{', '.join(map(str, fit))}}}" if len(fit) > 1 else "of 1"
    return f"use parallel.pp {choices}" + ("" if parallel.elastic else ", dp_shard=auto")
