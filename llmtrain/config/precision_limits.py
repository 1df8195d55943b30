"""Rows of the support matrix about fp8 and parameters and moments in bf16; see ``support``.

Invariant: what would be ignored, or fail on hardware only, is refused.
"""

from llmtrain.config.limits import Facts, Limit

FLOAT8_UNIT = 16
"""Tokens and sizes of fp8 products are multiples of this: what the kernels take."""


def _tokens(f: Facts) -> int:
    """Count the tokens that one rank's blocks multiply at a time."""
    return f.t.micro_batch_size * f.t.sequence_length // f.p.cp


PRECISION: tuple[Limit, ...] = (
    Limit(
        concerns="fp8, DeepSpeed",
        refused="`engine.fp8` with `engine.kind=deepspeed`",
        because="the blocks that DeepSpeed runs are not converted",
        broken=lambda f: f.deepspeed and f.e.fp8 != "none",
        sentence="engine.fp8={f.e.fp8} found with engine.kind=deepspeed: {because}; use "
        "engine.kind=native or fp8=none",
    ),
    Limit(
        concerns="fp8, pipeline",
        refused="`engine.fp8` with `interleaved_zero_bubble`, `zbv` or `dualpipev`",
        because="the backward of a product in fp8 comes in one piece, so that every product would "
        "be computed twice",
        broken=lambda f: f.split_backward and f.e.fp8 != "none",
        sentence="engine.fp8={f.e.fp8} found with parallel.schedule={f.p.schedule}: {because}; use "
        "fp8=none or schedule=interleaved_1f1b",
    ),
    Limit(
        concerns="fp8",
        refused="`engine.fp8` with micro-batches whose tokens on a rank are no multiple of 16",
        because="gradients of weights are products over tokens, and kernels for float8 take "
        "multiples of 16",
        broken=lambda f: f.native and f.e.fp8 != "none" and _tokens(f) % FLOAT8_UNIT != 0,
        sentence="engine.fp8={f.e.fp8} found with training.micro_batch_size="
        "{f.t.micro_batch_size} x sequence_length={f.t.sequence_length} / parallel.cp={f.p.cp} "
        "tokens: {because}; use a sequence_length that is a multiple of 16 x cp",
    ),
    Limit(
        concerns="fp8, sharding",
        refused="`engine.fp8_all_gather` without `dp_shard` above 1",
        because="no weights are gathered",
        broken=lambda f: f.native and not f.layout_problem and f.e.fp8_all_gather
        and not f.sharded,
        sentence="engine.fp8_all_gather=true found with one rank along dp_shard: {because}; use "
        "parallel.dp_shard of at least 2 or fp8_all_gather=false",
    ),
    Limit(
        concerns="fp8, sharding",
        refused="`engine.fp8_all_gather` with `cpu_offload`",
        because="the scales are computed where the shards lie, and lost on their way to the device",
        broken=lambda f: f.native and f.e.fp8_all_gather and f.p.cpu_offload,
        sentence="engine.fp8_all_gather=true found with parallel.cpu_offload=true: {because}; use "
        "fp8_all_gather=false or cpu_offload=false",
    ),
    Limit(
        concerns="bf16 parameters, DeepSpeed",
        refused="`engine.master_dtype=bf16` or `optimizer.state_dtype=bf16` with "
        "`engine.kind=deepspeed`",
        because="ZeRO keeps fp32 parameters, and flat partitions in which no element has its name",
        broken=lambda f: f.deepspeed and "bf16" in (f.e.master_dtype, f.o.state_dtype),
        sentence="engine.master_dtype={f.e.master_dtype} and optimizer.state_dtype="
        "{f.o.state_dtype} found with engine.kind=deepspeed: {because}; use engine.kind=native, or "
        "fp32 for both",
    ),
    Limit(
        concerns="bf16 parameters",
        refused="`engine.master_dtype=bf16` with `optimizer.kind=muon` or `lion`",
        because="only AdamW rounds its updates stochastically",
        broken=lambda f: f.e.master_dtype == "bf16" and f.o.kind != "adamw",
        sentence="engine.master_dtype=bf16 found with optimizer.kind={f.o.kind}: {because}; use "
        "kind=adamw or master_dtype=fp32",
    ),
    Limit(
        concerns="bf16 moments",
        refused="`optimizer.state_dtype=bf16` with `engine.precision=fp64`",
        because="fp64 runs are for comparisons, and keep everything in fp64",
        broken=lambda f: f.o.state_dtype == "bf16" and f.e.precision == "fp64",
        sentence="optimizer.state_dtype=bf16 found with engine.precision=fp64: {because}; use "
        "state_dtype=fp32 or precision=bf16",
    ),
)  # fmt: skip
"""Limits of fp8 and of bf16 parameters and moments."""
