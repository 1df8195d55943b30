"""The layouts that the parity suite runs, as rows of a table, and the model and batch they share.

Invariant: every row passes the support matrix, and rows of one model, optimizer and precision have
one reference: the native engine alone in one process.

    LAYOUTS["fsdp2_pp2_zbv"].config       # the RunConfig of a row, on LAYOUTS[...].size ranks
"""

from dataclasses import dataclass, replace
from typing import Any

from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.limits import Facts
from llmtrain.config.model import Llama3RopeScaling, ModelConfig
from llmtrain.config.parallel import ParallelConfig, implied_world_size
from llmtrain.config.run import RunConfig
from llmtrain.config.training import OptimizerConfig, TrainingConfig
from llmtrain.data.synthetic import BatchShape

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=4,
    qk_norm=True,
    attention_bias=True,
)
"""Small; grouped heads, and sizes that shards and vocabulary parallelism do not divide evenly."""

MODELS = {
    "base": MODEL,
    "tied": replace(MODEL, tie_word_embeddings=True),
    "mup": replace(MODEL, mup_base_width=5),
    "mup tied": replace(MODEL, mup_base_width=5, tie_word_embeddings=True),
    "window": replace(
        MODEL,
        qk_norm=False,
        attention_output_bias=True,
        sliding_window=5,
        rope_scaling=Llama3RopeScaling(factor=8.0, original_max_position_embeddings=16),
    ),
    "glm": replace(MODEL, qk_norm=False, post_norms=True, partial_rotary_factor=0.5),
}
"""Variants by name."""

SHAPE = BatchShape(rows=8, sequence_length=32, vocab_size=MODEL.vocab_size)
SEED = 5
LEARNING_RATE = 1e-3
"""Small enough that twenty steps of the deepest model here do not amplify rounding."""
NUM_STEPS = 20
HALF_STEPS = 10
FEW_STEPS = 5


ENGINE = EngineConfig(device="cpu", timeout_s=60.0, loss_chunk_tokens=16)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One row: what is compared with one process."""

    name: str
    parallel: ParallelConfig
    engine: EngineConfig = ENGINE
    model: str = "base"
    """Name in MODELS."""
    optimizer: str = "adamw"
    steps: int = NUM_STEPS
    """Steps whose losses are compared."""
    layers: int | None = None
    """Blocks of the model; None takes 2, or as many as there are stages."""

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return self.layers or max(2, self.parallel.num_stages)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return implied_world_size(self.parallel)

    @property
    def tested_steps(self) -> int:
        """Steps of a test run: the long curves are the table's, see parity_table.py."""
        return min(self.steps, HALF_STEPS if self.size <= 2 else FEW_STEPS)

    @property
    def config(self) -> RunConfig:
        """The whole of the row; few micro-batches, which is quick, but several on two ranks."""
        whole = RunConfig(
            model=replace(MODELS[self.model], num_hidden_layers=self.num_layers),
            parallel=self.parallel,
            engine=self.engine,
            training=TrainingConfig(
                num_tokens=10**6,
                sequence_length=SHAPE.sequence_length,
                global_batch_tokens=SHAPE.rows * SHAPE.sequence_length,
                seed=SEED,
            ),
            optimizer=OptimizerConfig(kind=self.optimizer, lr=LEARNING_RATE),
        )
        facts = Facts(whole, self.size)
        rows = SHAPE.rows // facts.data_ranks
        count = 2 * self.parallel.pp if self.size <= 2 else facts.fewest_microbatches
        # bf16 rounds the gradient of a micro-batch: only equal ones give equal sums.
        micro = 1 if self.engine.precision == "bf16" else max(1, rows // count)
        return replace(whole, training=replace(whole.training, micro_batch_size=micro))

    @property
    def reference(self) -> "Layout":
        """The row it is compared with."""
        precision = self.engine.precision
        return Layout(
            name=f"{self.model} {self.num_layers} {self.optimizer} {precision}",
            parallel=ParallelConfig(dp_shard=1),
            engine=replace(ENGINE, precision=precision),
            model=self.model,
            optimizer=self.optimizer,
            layers=self.num_layers,
        )


def native(name: str, **fields: Any) -> Layout:
    """A row of the native engine; ``fields`` are ParallelConfig's, model, optimizer, precision."""
    own = {key: fields.pop(key) for key in ("model", "optimizer", "steps") if key in fields}
    engine = replace(ENGINE, precision=fields.pop("precision", "fp32"))
    parallel = ParallelConfig(**{"dp_shard": 1, **fields})
    return Layout(name=name, parallel=parallel, engine=engine, **own)


ZERO3 = {"stage3_param_persistence_threshold": 60, "sub_group_size": 2000}
"""Cuts all but the smallest parameters of a model as small as this, and in several groups."""


def zero(stage: int, suffix: str = "", **fields: Any) -> Layout:
    """A row of DeepSpeed's engine with ZeRO ``stage``; offloads, and fields as of ``native``."""
    names = ("offload_optimizer", "offload_parameters")
    settings = {key: fields.pop(key) for key in names if key in fields}
    row = native(f"deepspeed zero{stage}{suffix}", **fields)
    config = {"zero_optimization": dict(ZERO3)} if stage == 3 else {}
    deepspeed = DeepSpeedConfig(zero_stage=stage, config=config, **settings)
    return replace(row, engine=replace(row.engine, kind="deepspeed", deepspeed=deepspeed))


SINGLE = native("single")
"""One process."""

ONE_AXIS = (
    native("dp2", dp_replicate=2),
    native("dp2 after", dp_replicate=2, replica_sum="after"),
    native("fsdp2", dp_shard=2),
    native("fsdp2 keep", dp_shard=2, reshard_after_forward=False),
    native("fsdp2 reduce every", dp_shard=2, reduce_every_microbatch=True),
    native("fsdp4", dp_shard=4),
    native("tp2", tp=2),
    native("tp4", tp=4),
    native("cp2 all_gather", cp=2),
    native("cp2 ulysses", cp=2, cp_method="ulysses"),
    native("cp2 ring", cp=2, cp_method="ring"),
    native("cp4 ring", cp=4, cp_method="ring"),
    native("pp2 gpipe", pp=2, schedule="gpipe"),
    native("pp2 1f1b", pp=2),
    native("pp4 1f1b", pp=4),
    native("pp2 interleaved_1f1b", pp=2, schedule="interleaved_1f1b"),
    native("pp2 interleaved_zero_bubble", pp=2, schedule="interleaved_zero_bubble"),
    native("pp2 zbv", pp=2, schedule="zbv"),
    native("pp2 dualpipev", pp=2, schedule="dualpipev"),
)
"""Each axis alone."""

TWO_AXES = (
    native("dp2 fsdp2", dp_replicate=2, dp_shard=2),
    native("dp2 fsdp2 reduce every", dp_replicate=2, dp_shard=2, reduce_every_microbatch=True),
    native("pp2 dp2", pp=2, dp_replicate=2),
    native("pp2 fsdp2", pp=2, dp_shard=2),
    native("pp2 fsdp2 dualpipev", pp=2, dp_shard=2, schedule="dualpipev"),
    native(
        "pp2 fsdp2 interleaved_zero_bubble",
        pp=2, dp_shard=2, schedule="interleaved_zero_bubble",
    ),
    native("pp2 tp2", pp=2, tp=2),
    native("pp2 tp2 zbv", pp=2, tp=2, schedule="zbv"),
    native("pp2 cp2 all_gather", pp=2, cp=2),
    native(
        "pp2 cp2 ring interleaved_1f1b",
        pp=2, cp=2, cp_method="ring", schedule="interleaved_1f1b",
    ),
    native("dp2 tp2", dp_replicate=2, tp=2),
    native("dp2 cp2 ring", dp_replicate=2, cp=2, cp_method="ring"),
    native("fsdp2 tp2", dp_shard=2, tp=2),
    native("fsdp2 cp2 all_gather", dp_shard=2, cp=2),
    native("cp2 tp2 ring", cp=2, tp=2, cp_method="ring"),
)  # fmt: skip
"""Every pair of axes."""

THREE_AXES = (
    native("pp2 dp2 fsdp2", pp=2, dp_replicate=2, dp_shard=2),
    native(
        "pp2 dp2 cp2 zero bubble", pp=2, dp_replicate=2, cp=2, schedule="interleaved_zero_bubble"
    ),
    native("pp2 dp2 tp2 dualpipev", pp=2, dp_replicate=2, tp=2, schedule="dualpipev"),
    native("pp2 fsdp2 cp2 zbv", pp=2, dp_shard=2, cp=2, cp_method="ulysses", schedule="zbv"),
    native("pp2 fsdp2 tp2", pp=2, dp_shard=2, tp=2),
    native("pp2 cp2 tp2", pp=2, cp=2, tp=2, cp_method="ring"),
    native("dp2 fsdp2 cp2", dp_replicate=2, dp_shard=2, cp=2),
    native("dp2 fsdp2 tp2", dp_replicate=2, dp_shard=2, tp=2),
    native("dp2 cp2 tp2", dp_replicate=2, cp=2, tp=2, cp_method="ulysses"),
    native("fsdp2 cp2 tp2", dp_shard=2, cp=2, tp=2, cp_method="ring"),
)
"""Every triple of axes, on eight ranks."""

VARIANTS = (
    native("tied fsdp2", steps=FEW_STEPS, model="tied", dp_shard=2),
    native("tied pp2 1f1b", steps=FEW_STEPS, model="tied", pp=2),
    native("tied pp2 zbv", steps=FEW_STEPS, model="tied", pp=2, schedule="zbv"),
    native("tied pp2 fsdp2 tp2", steps=FEW_STEPS, model="tied", pp=2, dp_shard=2, tp=2),
    native("window tp2", steps=FEW_STEPS, model="window", tp=2),
    native("window cp2 ring", steps=FEW_STEPS, model="window", cp=2, cp_method="ring"),
    native("recompute full pp2 fsdp2", steps=FEW_STEPS, pp=2, dp_shard=2, recompute="full"),
    native("recompute selective tp2", steps=FEW_STEPS, tp=2, recompute="selective"),
    native("recompute budget cp2", steps=FEW_STEPS, cp=2, recompute="budget"),
    native("offload fsdp2", steps=FEW_STEPS, dp_shard=2, cpu_offload=True),
    native("muon fsdp2 tp2", steps=FEW_STEPS, optimizer="muon", dp_shard=2, tp=2),
    native("muon pp2 dp2", steps=FEW_STEPS, optimizer="muon", pp=2, dp_replicate=2),
    native("lion cp2 tp2", steps=FEW_STEPS, optimizer="lion", cp=2, tp=2),
    native("mup tied pp2 1f1b", steps=FEW_STEPS, model="mup tied", pp=2),
    native("mup muon tp2", steps=FEW_STEPS, model="mup", optimizer="muon", tp=2),
    native("glm tp2", steps=FEW_STEPS, model="glm", tp=2),
)
"""Tied embeddings, other attention, recomputation, offload, optimizers, muP; few steps suffice."""

BF16 = (
    native("bf16 dp2", steps=FEW_STEPS, precision="bf16", dp_replicate=2),
    native("bf16 fsdp2", steps=FEW_STEPS, precision="bf16", dp_shard=2),
    native("bf16 pp2 1f1b", steps=FEW_STEPS, precision="bf16", pp=2),
    native("bf16 pp2 fsdp2", steps=FEW_STEPS, precision="bf16", pp=2, dp_shard=2),
)
"""Layouts that keep the order of sums within a row, and so the bf16 curve."""

DEEPSPEED = (
    zero(0, " dp2", dp_shard=2),
    zero(1, " dp2", dp_shard=2),
    zero(2, " dp2", dp_shard=2),
    zero(3, " dp2", dp_shard=2),
    zero(3, " dp4", dp_shard=4),
    zero(0, " pp2", pp=2),
    zero(0, " pp4", pp=4),
    zero(1, " pp2 dp2", pp=2, dp_shard=2),
    zero(1, " pp2 dp4", pp=2, dp_shard=4),
    zero(2, " tied dp2", model="tied", dp_shard=2),
    zero(2, " mup dp2", model="mup", dp_shard=2),
    zero(2, " offload dp2", dp_shard=2, offload_optimizer=True),
    zero(3, " offload dp2", dp_shard=2, offload_optimizer=True, offload_parameters=True),
    zero(1, " lion dp2", optimizer="lion", dp_shard=2),
)
"""DeepSpeed's engine."""

NATIVE: dict[str, Layout] = {
    row.name: row for row in (*ONE_AXIS, *TWO_AXES, *THREE_AXES, *VARIANTS)
}
LAYOUTS: dict[str, Layout] = NATIVE | {row.name: row for row in (*DEEPSPEED, *BF16)}
"""Every row by name."""

TABLE_ONLY = frozenset(
    {
        "dp2 after", "fsdp2 keep", "fsdp2 reduce every", "cp4 ring", "pp4 1f1b",
        "pp2 fsdp2 interleaved_zero_bubble", "pp2 dp2 tp2 dualpipev", "pp2 fsdp2 cp2 zbv",
        "pp2 cp2 all_gather", "pp2 tp2", "pp2 dp2 cp2 zero bubble", "fsdp2 cp2 tp2",
        "tied pp2 fsdp2 tp2", "window tp2", "recompute selective tp2", "recompute budget cp2",
        "muon pp2 dp2", "offload fsdp2",
        "deepspeed zero3 dp4", "deepspeed zero0 pp4", "deepspeed zero1 pp2 dp4",
        "deepspeed zero2 offload dp2", "deepspeed zero3 offload dp2",
        "bf16 dp2", "bf16 pp2 1f1b",
    }
)  # fmt: skip
"""Rows whose parts other rows and tests show: run by tests/distributed/parity_table.py only."""

TESTED: dict[str, Layout] = {name: row for name, row in LAYOUTS.items() if name not in TABLE_ONLY}
"""The rows of every test run."""
