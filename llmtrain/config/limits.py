"""What a limit of the support matrix is: a predicate on a run and a sentence that says what to do.

Invariant: a sentence names what was found with its values, why it does not work and what to change.
Sentences are templates over ``Facts``, so a row of the matrix is plain data beside its predicate.

    limit = Limit(concerns="tensor", refused="`tp` above 8", because="a node has 8 GPUs",
                  broken=lambda f: f.p.tp > 8, sentence="parallel.tp={f.p.tp}: {because}; use tp=8")
    limit.message(config, world_size=16)     # the sentence, None where the run is within the limit
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtrain.config.deepspeed import deepspeed_version
from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.parallel import (
    SEVERAL_STAGES,
    SPLIT_BACKWARD,
    ParallelConfig,
    microbatches_per_rank,
    resolve_dp,
)
from llmtrain.config.strict import show
from llmtrain.errors import LayoutError

if TYPE_CHECKING:
    from llmtrain.config.model import ModelConfig
    from llmtrain.config.run import RunConfig
    from llmtrain.config.training import OptimizerConfig, TrainingConfig

DEFAULT = ParallelConfig()
"""What a layout is where nothing is set."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What predicates and sentences read: a run on a number of processes."""

    config: "RunConfig"
    """The run."""
    world: int
    """Number of processes."""

    @property
    def p(self) -> ParallelConfig:
        """The layout."""
        return self.config.parallel

    @property
    def e(self) -> EngineConfig:
        """The engine."""
        return self.config.engine

    @property
    def z(self) -> DeepSpeedConfig:
        """DeepSpeed's part of the engine."""
        return self.config.engine.deepspeed

    @property
    def m(self) -> "ModelConfig":
        """The model."""
        return self.config.model

    @property
    def t(self) -> "TrainingConfig":
        """Length and batch."""
        return self.config.training

    @property
    def o(self) -> "OptimizerConfig":
        """The optimizer."""
        return self.config.optimizer

    @property
    def native(self) -> bool:
        """Whether PyTorch's own parallelism runs the step."""
        return self.e.kind == "native"

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step."""
        return self.e.kind == "deepspeed"

    @property
    def installed_deepspeed(self) -> str | None:
        """Version of DeepSpeed here."""
        return deepspeed_version()

    @property
    def layout_problem(self) -> str | None:
        """Why the axes do not make the world; None where they do."""
        try:
            resolve_dp(self.p, self.world)
        except LayoutError as error:
            return str(error)
        return None

    @property
    def dp_shard(self) -> int:
        """Ranks along dp_shard; 1 where the axes do not make the world."""
        return 1 if self.layout_problem else resolve_dp(self.p, self.world)[1]

    @property
    def dp_replicate(self) -> int:
        """Ranks along dp_replicate; 1 where the axes do not make the world."""
        return 1 if self.layout_problem else resolve_dp(self.p, self.world)[0]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards parameters."""
        return self.native and self.dp_shard > 1

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def rows(self) -> int | None:
        """Rows of the global batch, None where they are not whole."""
        whole = self.t.global_batch_tokens % self.t.sequence_length == 0
        return self.t.global_batch_size if whole else None

    @property
    def row_unit(self) -> int:
        """Rows of which the global batch must be a multiple; ``auto`` fills up what ranks lack."""
        return self.t.micro_batch_size * (1 if self.p.elastic else self.data_ranks)

    @property
    def row_sharers(self) -> str:
        """What the rows are dealt out to."""
        ranks = "" if self.p.elastic else f"{self.data_ranks} data-parallel ranks x "
        return f"{ranks}training.micro_batch_size={self.t.micro_batch_size}"

    @property
    def whole_microbatches(self) -> bool:
        """Whether the number of micro-batches is known and whole."""
        return not self.layout_problem and self.rows is not None and self.rows % self.row_unit == 0

    @property
    def microbatches(self) -> int:
        """Micro-batches of one rank in a step, padding included; 0 where they are not whole."""
        if not self.rows or not self.whole_microbatches:
            return 0
        whole = self.rows // self.row_unit
        if not self.p.elastic or whole < self.fewest_microbatches:
            return whole
        return microbatches_per_rank(self.p, self.rows, self.data_ranks, self.t.micro_batch_size)

    @property
    def padding_rows(self) -> int:
        """Rows without targets that fill up the batch of a step, over all ranks."""
        run = self.microbatches * self.data_ranks * self.t.micro_batch_size
        return run - (self.rows or 0) if run else 0

    @property
    def rows_per_rank(self) -> int:
        """Rows of one data-parallel rank in a step, rounded down."""
        return (self.rows or 0) // self.data_ranks

    @property
    def fewest_microbatches(self) -> int:
        """Micro-batches that fill the pipeline: one for each stage of a pass down the ranks."""
        return self.p.fewest_microbatches

    @property
    def rounds(self) -> int:
        """Rounds in which interleaved schedules take the micro-batches."""
        return max(1, self.microbatches // self.p.pp)

    @property
    def split_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart."""
        return self.native and self.p.pp > 1 and self.p.schedule in SPLIT_BACKWARD

    @property
    def several_stages(self) -> bool:
        """Whether the schedule gives every rank more than one stage."""
        return self.p.schedule in SEVERAL_STAGES

    @property
    def sequence_unit(self) -> int:
        """Tokens of which a sequence must be a multiple to be cut over cp and tp."""
        return (2 * self.p.cp if self.p.cp > 1 else 1) * self.p.tp

    @property
    def near_sequence(self) -> int:
        """The multiple of ``sequence_unit`` nearest to the sequence length."""
        return max(1, round(self.t.sequence_length / self.sequence_unit)) * self.sequence_unit

    @property
    def near_batch_tokens(self) -> int:
        """The global batch nearest to the one asked for that ranks can share."""
        rows = max(1, round((self.rows or 1) / self.row_unit)) * self.row_unit
        return rows * self.t.sequence_length

    @property
    def tp_choices(self) -> str:
        """Sizes of tp that cut the model evenly."""
        return _divisors(math.gcd(self.m.num_key_value_heads, self.m.intermediate_size))

    @property
    def fsdp_fields(self) -> str:
        """Fields that FSDP2 and the native sums alone read, where they are set."""
        return self._set(
            "reshard_after_forward", "replica_sum", "cpu_offload", "fsdp_prefetch",
            "reduce_every_microbatch",
        )  # fmt: skip

    @property
    def native_axes(self) -> str:
        """Axes that only the native engine has, where they are set."""
        return self._set("dp_replicate", "cp", "tp")

    def _set(self, *names: str) -> str:
        """Overrides of the layout's fields ``names`` that are not as they are by default."""
        found = [name for name in names if getattr(self.p, name) != getattr(DEFAULT, name)]
        return ", ".join(f"parallel.{name}={show(getattr(self.p, name))}" for name in found)

    @property
    def key_value_heads_per_rank(self) -> int:
        """Key and value heads that tensor parallelism leaves on a rank, rounded down."""
        return self.m.num_key_value_heads // self.p.tp

    @property
    def replicas(self) -> bool:
        """Whether ranks hold equal parameters whose gradients this project sums itself."""
        return self.dp_replicate > 1 or (self.p.cp > 1 and not self.sharded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One row of the support matrix."""

    concerns: str
    """Part of the layout it is about."""
    refused: str
    """What is refused, in Markdown, for the table."""
    because: str
    """Why: a clause for the table, and for the sentence."""
    broken: Callable[[Facts], bool]
    """Whether a run is beyond the limit."""
    sentence: str
    """What was found, ``{because}``, and what to change; a template over ``f``, a ``Facts``."""

    def message(self, config: "RunConfig", world_size: int) -> str | None:
        """Say what is wrong with ``config`` on ``world_size`` processes, None where nothing is."""
        facts = Facts(config, world_size)
        if not self.broken(facts):
            return None
        return self.sentence.format(f=facts, because=self.because)


def _divisors(number: int) -> str:
    """Divisors as a set for a message: {1, 2, 4}."""
    return f"{{{', '.join(str(n) for n in range(1, number + 1) if number % n == 0)}}}"
