"""Rows of the support matrix about DeepSpeed; see ``support`` for the others.

Invariant: a field that DeepSpeed's engine does not read is refused where it is set, and so is one
of DeepSpeed's where another engine runs the step.
"""

from collections.abc import Mapping

from llmtrain.config.deepspeed import pipeline_is_right
from llmtrain.config.engine import DeepSpeedConfig
from llmtrain.config.limits import Facts, Limit

_UNSET = DeepSpeedConfig()


def _old_pipeline(f: Facts) -> bool:
    version = f.installed_deepspeed
    return f.deepspeed and f.p.pp > 1 and version is not None and not pipeline_is_right(version)


def _timed_pipeline(f: Facts) -> bool:
    profiler = f.z.config.get("flops_profiler")
    profiled = isinstance(profiler, Mapping) and bool(profiler.get("enabled"))
    timed = profiled or bool(f.z.config.get("wall_clock_breakdown"))
    return f.deepspeed and f.p.pp > 1 and timed


def _overlapped_pipeline(f: Facts) -> bool:
    zero = f.z.config.get("zero_optimization")
    overlapped = isinstance(zero, Mapping) and bool(zero.get("overlap_comm"))
    return f.deepspeed and f.p.pp > 1 and overlapped


def _unread_in_bf16(f: Facts) -> bool:
    zero = f.z.config.get("zero_optimization")
    unread = isinstance(zero, Mapping) and bool(set(zero) - {"allgather_bucket_size"})
    plain = f.e.precision == "bf16" and f.z.zero_stage == 1 and not f.z.offload_optimizer
    return f.deepspeed and plain and unread


DEEPSPEED: tuple[Limit, ...] = (
    Limit(
        concerns="DeepSpeed",
        refused="`engine.deepspeed.*` with `engine.kind=native`",
        because="only DeepSpeed reads these fields",
        broken=lambda f: f.native and f.z != _UNSET,
        sentence="engine.deepspeed is set and engine.kind=native: {because}; use "
        "engine.kind=deepspeed or leave engine.deepspeed out",
    ),
    Limit(
        concerns="DeepSpeed",
        refused="`engine.kind=deepspeed` where DeepSpeed is not installed",
        because="it is an extra",
        broken=lambda f: f.deepspeed and f.installed_deepspeed is None,
        sentence="engine.kind=deepspeed found no DeepSpeed here: {because}; pip install "
        "'llmtrain[deepspeed]' or use engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed, pipeline",
        refused="`pp` above 1 with DeepSpeed below 0.19.3",
        because="the gradients of its pipeline are wrong, or it hangs",
        broken=_old_pipeline,
        sentence="parallel.pp={f.p.pp} found DeepSpeed {f.installed_deepspeed}: {because}; "
        "pip install 'deepspeed>=0.19.3' or use engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed",
        refused="`engine.precision=fp64`",
        because="DeepSpeed has no such mode",
        broken=lambda f: f.deepspeed and f.e.precision == "fp64",
        sentence="engine.precision=fp64 found with engine.kind=deepspeed: {because}; use "
        "engine.precision=fp32 or engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed",
        refused="`dp_replicate`, `cp` or `tp` above 1",
        because="its ranks are stages and data ranks only",
        broken=lambda f: f.deepspeed and f.native_axes != "",
        sentence="{f.native_axes} found with engine.kind=deepspeed: {because}; use dp_shard and "
        "pp, or engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed, pipeline",
        refused="`zero_stage` 2 or 3 with `pp`",
        because="gradients of a stage are complete only after its last micro-batch, so they cannot "
        "be shared out before",
        broken=lambda f: f.deepspeed and f.p.pp > 1 and f.z.zero_stage >= 2,
        sentence="engine.deepspeed.zero_stage={f.z.zero_stage} found with parallel.pp={f.p.pp}: "
        "{because}; use zero_stage of 0 or 1, or engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed, pipeline",
        refused="schedules other than `1f1b`",
        because="its pipeline knows no other order",
        broken=lambda f: f.deepspeed and f.p.pp > 1 and f.p.schedule != "1f1b",
        sentence="parallel.schedule={f.p.schedule} found with engine.kind=deepspeed: {because}; "
        "use schedule=1f1b or engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed, pipeline",
        refused="tied embeddings with `pp`",
        because="the matrix would be on the first and on the last stage",
        broken=lambda f: f.deepspeed and f.p.pp > 1 and f.m.tie_word_embeddings,
        sentence="model.tie_word_embeddings=true found with engine.kind=deepspeed on "
        "parallel.pp={f.p.pp}: {because}; use pp=1, untied embeddings or engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed, pipeline",
        refused="`flops_profiler` or `wall_clock_breakdown` in `engine.deepspeed.config` with `pp`",
        because="its pipeline starts those timers twice and stops",
        broken=_timed_pipeline,
        sentence="engine.deepspeed.config asks for flops_profiler or wall_clock_breakdown on "
        "parallel.pp={f.p.pp} stages: {because}; leave them out or use pp=1",
    ),
    Limit(
        concerns="DeepSpeed, pipeline",
        refused="`zero_optimization.overlap_comm` in `engine.deepspeed.config` with `pp`",
        because="its pipeline sums gradients after the last backward",
        broken=_overlapped_pipeline,
        sentence="engine.deepspeed.config.zero_optimization.overlap_comm=true found with "
        "parallel.pp={f.p.pp}: {because}; leave it out or use pp=1",
    ),
    Limit(
        concerns="DeepSpeed",
        refused="`zero_optimization` in `engine.deepspeed.config` with `zero_stage` 1 in bf16, but "
        "for `allgather_bucket_size`",
        because="its optimizer for that, BF16_Optimizer, reads no other key",
        broken=_unread_in_bf16,
        sentence="engine.deepspeed.config.zero_optimization found with zero_stage=1 and "
        "engine.precision=bf16: {because} than allgather_bucket_size; leave the others out or use "
        "zero_stage=2",
    ),
    Limit(
        concerns="DeepSpeed",
        refused="`reshard_after_forward`, `replica_sum` or `cpu_offload`",
        because="FSDP2 and the native sums alone read it",
        broken=lambda f: f.deepspeed and f.fsdp_fields != "",
        sentence="{f.fsdp_fields} found with engine.kind=deepspeed: {because}; leave it out, "
        "engine.deepspeed has zero_stage and offload_optimizer",
    ),
    Limit(
        concerns="DeepSpeed, compile",
        refused="`engine.compile=true`",
        because="its hooks break the graph of every block",
        broken=lambda f: f.deepspeed and f.e.compile,
        sentence="engine.compile=true found with engine.kind=deepspeed: {because}; use "
        "engine.compile=false or engine.kind=native",
    ),
    Limit(
        concerns="DeepSpeed, offload",
        refused="`offload_optimizer` with `zero_stage` 0",
        because="ZeRO offloads the state that it shards",
        broken=lambda f: f.deepspeed and f.z.offload_optimizer and f.z.zero_stage == 0,
        sentence="engine.deepspeed.offload_optimizer=true found with zero_stage=0: {because}; use "
        "zero_stage of 1 to 3 or offload_optimizer=false",
    ),
    Limit(
        concerns="DeepSpeed, offload",
        refused="`offload_parameters` with `zero_stage` below 3",
        because="only stage 3 shards parameters",
        broken=lambda f: f.deepspeed and f.z.offload_parameters and f.z.zero_stage < 3,
        sentence="engine.deepspeed.offload_parameters=true found with zero_stage="
        "{f.z.zero_stage}: {because}; use zero_stage=3 or offload_parameters=false",
    ),
    Limit(
        concerns="DeepSpeed, optimizer",
        refused="`optimizer.kind=muon` with `zero_stage` above 0",
        because="ZeRO flattens the matrices that Muon needs whole",
        broken=lambda f: f.deepspeed and f.z.zero_stage > 0 and f.config.optimizer.kind == "muon",
        sentence="optimizer.kind=muon found with engine.deepspeed.zero_stage={f.z.zero_stage}: "
        "{because}; use zero_stage=0 or engine.kind=native",
    ),
)
"""Limits of DeepSpeed's engine."""
