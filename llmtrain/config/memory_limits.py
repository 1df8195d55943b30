"""Rows of the support matrix about memory and CUDA graphs; see ``support`` for the others.

Invariant: what would save nothing, or compute other numbers than without it, is refused.
"""

import math

from llmtrain.config.limits import DEFAULT, Facts, Limit


def _own_sums(f: Facts) -> bool:
    """Whether gradients are summed after the backward, by this project."""
    return f.p.tp > 1 or f.replicas


MEMORY: tuple[Limit, ...] = (
    Limit(
        concerns="offload, DeepSpeed",
        refused="`activation_offload` with `engine.kind=deepspeed`",
        because="DeepSpeed takes parameters away under what autograd saved",
        broken=lambda f: f.deepspeed and f.p.activation_offload,
        sentence="parallel.activation_offload=true found with engine.kind=deepspeed: {because}; "
        "use engine.kind=native or parallel.recompute=full",
    ),
    Limit(
        concerns="offload, recompute",
        refused="`activation_offload` with `recompute=selective` or `budget`",
        because="what these keep is held beside autograd, where nothing can move it",
        broken=lambda f: f.p.activation_offload and f.p.recompute in ("selective", "budget"),
        sentence="parallel.activation_offload=true found with parallel.recompute={f.p.recompute}: "
        "{because}; use recompute=full, which offloads the inputs of blocks, or none",
    ),
    Limit(
        concerns="offload, pipeline",
        refused="`activation_offload` with `interleaved_zero_bubble`, `zbv` or `dualpipev`",
        because="the gradients of weights come from a second pass, for which everything would "
        "travel twice",
        broken=lambda f: f.split_backward and f.p.activation_offload,
        sentence="parallel.activation_offload=true found with parallel.schedule={f.p.schedule}: "
        "{because}; use activation_offload=false or schedule=interleaved_1f1b",
    ),
    Limit(
        concerns="sharding",
        refused="`fsdp_prefetch` without `dp_shard` above 1",
        because="no parameters are gathered",
        broken=lambda f: f.native and not f.layout_problem and not f.sharded
        and f.p.fsdp_prefetch != DEFAULT.fsdp_prefetch,
        sentence="parallel.fsdp_prefetch={f.p.fsdp_prefetch} has no effect on one rank along "
        "dp_shard: {because}; use dp_shard of at least 2, or leave fsdp_prefetch out",
    ),
    Limit(
        concerns="sharding",
        refused="`reduce_every_microbatch` without `dp_shard` above 1, or with `pp` above 1",
        because="sums over shards are those of FSDP2, which pipelines make after the last "
        "backward of a stage",
        broken=lambda f: f.native and not f.layout_problem and f.p.reduce_every_microbatch
        and (not f.sharded or f.p.pp > 1),
        sentence="parallel.reduce_every_microbatch=true found with {f.dp_shard} ranks along "
        "dp_shard and parallel.pp={f.p.pp}: {because}; leave it out",
    ),
    Limit(
        concerns="CUDA graphs",
        refused="`engine.cuda_graphs` without `engine.compile`",
        because="what is recorded are compiled blocks",
        broken=lambda f: f.e.cuda_graphs and not f.e.compile,
        sentence="engine.cuda_graphs=true found with engine.compile=false: {because}; use "
        "compile=true",
    ),
    Limit(
        concerns="CUDA graphs",
        refused="`engine.cuda_graphs` with `engine.device=cpu`",
        because="the CPU launches no kernels",
        broken=lambda f: f.e.cuda_graphs and f.e.device == "cpu",
        sentence="engine.cuda_graphs=true found with engine.device=cpu: {because}; use "
        "cuda_graphs=false",
    ),
    Limit(
        concerns="CUDA graphs, sharding",
        refused="`engine.cuda_graphs` with `dp_shard` above 1",
        because="a recording reads parameters where they were, and FSDP2 gathers them into other "
        "memory each time",
        broken=lambda f: f.e.cuda_graphs and f.sharded,
        sentence="engine.cuda_graphs=true found with {f.dp_shard} ranks along dp_shard: {because}; "
        "use cuda_graphs=false or dp_replicate for dp_shard",
    ),
    Limit(
        concerns="CUDA graphs, pipeline",
        refused="`engine.cuda_graphs` with `pp` above 1",
        because="several micro-batches wait for their backward, and a recording has memory for one",
        broken=lambda f: f.native and f.e.cuda_graphs and f.p.pp > 1,
        sentence="engine.cuda_graphs=true found with parallel.pp={f.p.pp}: {because}; use "
        "cuda_graphs=false",
    ),
    Limit(
        concerns="CUDA graphs, tensor, context",
        refused="`engine.cuda_graphs` with `tp` or `cp` above 1",
        because="blocks talk to other ranks on the way, which is not recorded",
        broken=lambda f: f.native and f.e.cuda_graphs and max(f.p.tp, f.p.cp) > 1,
        sentence="engine.cuda_graphs=true found with parallel.tp={f.p.tp}, cp={f.p.cp}: {because}; "
        "use cuda_graphs=false",
    ),
    Limit(
        concerns="CUDA graphs, offload",
        refused="`engine.cuda_graphs` with `activation_offload`",
        because="a recording keeps its memory, so nothing would be saved",
        broken=lambda f: f.e.cuda_graphs and f.p.activation_offload,
        sentence="engine.cuda_graphs=true found with parallel.activation_offload=true: {because}; "
        "use one of them",
    ),
    Limit(
        concerns="CUDA graphs, update in backward",
        refused="`engine.cuda_graphs` with `optimizer.in_backward`",
        because="beside recordings all gradients keep their memory, so nothing would be saved",
        broken=lambda f: f.e.cuda_graphs and f.o.in_backward,
        sentence="engine.cuda_graphs=true found with optimizer.in_backward=true: {because}; use "
        "one of them",
    ),
    Limit(
        concerns="update in backward",
        refused="`optimizer.in_backward` with `engine.kind=deepspeed`",
        because="DeepSpeed updates after the backward",
        broken=lambda f: f.deepspeed and f.o.in_backward,
        sentence="optimizer.in_backward=true found with engine.kind=deepspeed: {because}; use "
        "engine.kind=native",
    ),
    Limit(
        concerns="update in backward",
        refused="`optimizer.in_backward` with a finite `grad_clip_norm`",
        because="the global norm is known when all gradients are, and the first are used by then",
        broken=lambda f: f.o.in_backward and math.isfinite(f.o.grad_clip_norm),
        sentence="optimizer.in_backward=true found with optimizer.grad_clip_norm="
        "{f.o.grad_clip_norm:g}: {because}; use grad_clip_norm=inf",
    ),
    Limit(
        concerns="update in backward",
        refused="`optimizer.in_backward` with `optimizer.kind=muon`",
        because="Muon works on all matrices together",
        broken=lambda f: f.o.in_backward and f.o.kind == "muon",
        sentence="optimizer.in_backward=true found with optimizer.kind=muon: {because}; use adamw "
        "or lion",
    ),
    Limit(
        concerns="update in backward, batch",
        refused="`optimizer.in_backward` with several micro-batches per rank",
        because="a gradient is used before the next micro-batch could add to it",
        broken=lambda f: f.native and f.o.in_backward and f.microbatches > 1,
        sentence="optimizer.in_backward=true found with {f.microbatches} micro-batches per rank: "
        "{because}; use training.micro_batch_size={f.rows_per_rank} or more data-parallel ranks",
    ),
    Limit(
        concerns="update in backward, tensor, replicas",
        refused="`optimizer.in_backward` with `tp` above 1, or with replicas that are not sharded",
        because="gradients are summed over these ranks after the backward",
        broken=lambda f: f.native and f.o.in_backward and not f.layout_problem and _own_sums(f),
        sentence="optimizer.in_backward=true found with parallel.tp={f.p.tp}, dp_replicate="
        "{f.dp_replicate}, cp={f.p.cp} and {f.dp_shard} ranks along dp_shard: {because}; use "
        "dp_shard alone",
    ),
    Limit(
        concerns="update in backward, offload",
        refused="`optimizer.in_backward` with `cpu_offload`",
        because="the backward would wait for every update on the host",
        broken=lambda f: f.native and f.o.in_backward and f.p.cpu_offload,
        sentence="optimizer.in_backward=true found with parallel.cpu_offload=true: {because}; use "
        "one of them",
    ),
)  # fmt: skip
"""Limits of what saves memory, and of CUDA graphs."""
