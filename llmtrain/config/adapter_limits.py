"""Rows of the support matrix about adapters; see ``support`` for the others.

Invariant: an adapter trains on every layout of the native engine; 4-bit matrices need whole ones.
"""

from llmtrain.config.limits import Facts, Limit


def _packed(f: Facts) -> bool:
    return f.m.adapter is not None and f.m.adapter.quantize_base is not None


ADAPTERS: tuple[Limit, ...] = (
    Limit(
        concerns="adapters, DeepSpeed",
        refused="`model.adapter` with `engine.kind=deepspeed`",
        because="ZeRO partitions know no parameters without gradients",
        broken=lambda f: f.m.adapter is not None and f.deepspeed,
        sentence="model.adapter found with engine.kind=deepspeed: {because}; use "
        "engine.kind=native",
    ),
    Limit(
        concerns="adapters, fp8",
        refused="`model.adapter` with `engine.fp8`",
        because="the products of frozen matrices and of adapters are not converted",
        broken=lambda f: f.m.adapter is not None and f.e.fp8 != "none",
        sentence="model.adapter found with engine.fp8={f.e.fp8}: {because}; use fp8=none",
    ),
    Limit(
        concerns="adapters in 4 bits",
        refused="`model.adapter.quantize_base` with `dp_shard` or `tp` above 1",
        because="blocks of 64 values would be cut, and others would be rounded on every layout",
        broken=lambda f: _packed(f) and (f.dp_shard > 1 or f.p.tp > 1),
        sentence="model.adapter.quantize_base={f.m.adapter.quantize_base} found with {f.dp_shard} "
        "ranks along dp_shard and parallel.tp={f.p.tp}: {because}; use parallel.dp_shard=1 "
        "parallel.dp_replicate=auto and tp=1, or quantize_base=null",
    ),
    Limit(
        concerns="adapters in 4 bits",
        refused="`model.adapter.quantize_base` with `engine.compile`",
        because="4-bit products are bitsandbytes' own kernels, which break every graph",
        broken=lambda f: _packed(f) and f.e.compile,
        sentence="model.adapter.quantize_base={f.m.adapter.quantize_base} found with "
        "engine.compile=true: {because}; use compile=false or quantize_base=null",
    ),
)
"""Limits of adapters."""
