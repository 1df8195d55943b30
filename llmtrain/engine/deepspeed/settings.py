"""The JSON DeepSpeed is initialised with, made from llmtrain's configuration.

Invariant: DeepSpeed neither scales, clips nor schedules: it gathers, reduces and stores. Precision,
ZeRO stage and offload follow from llmtrain's fields; what those do not model comes from
``engine.deepspeed.config`` (checked in config/deepspeed.py).

    deepspeed_json(config.engine, data_ranks=2, num_elements=1_000_000)
"""

from collections.abc import Mapping
from typing import Any

from llmtrain.config.engine import EngineConfig

QUIET_STEPS = 2**62
"""Steps between DeepSpeed's own progress lines, which llmtrain's log replaces."""

_BUCKET = 500_000_000
"""DeepSpeed's default number of elements it reduces at a time, all of them allocated."""


def deepspeed_json(engine: EngineConfig, *, data_ranks: int, num_elements: int) -> dict[str, Any]:
    """Translate ``engine`` into the dict that ``deepspeed.initialize`` takes.

    Batch numbers only have to agree with each other: micro-batches are run one by one.

    Args:
        engine: precision, ZeRO stage, offload, and DeepSpeed's own keys.
        data_ranks: data-parallel ranks.
        num_elements: elements of the model, which no bucket has to exceed.
    """
    settings: dict[str, Any] = {
        "train_batch_size": data_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": QUIET_STEPS,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(engine, num_elements),
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if engine.precision == "bf16" and engine.deepspeed.zero_stage > 0:
        # ZeRO 0 refuses fp32 accumulation; there llmtrain keeps the fp32 weights itself.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return _merged(settings, engine.deepspeed.config)


def _zero(engine: EngineConfig, num_elements: int) -> dict[str, Any]:
    """Give the section about ZeRO, whose norm is not computed where DeepSpeed can do without."""
    own = engine.deepspeed
    zero: dict[str, Any] = {
        "stage": own.zero_stage,
        "reduce_bucket_size": min(_BUCKET, num_elements),
        # Its linear function would replace torch's for the life of the process.
        "memory_efficient_linear": False,
    }
    if own.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if own.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    needs_norm = own.offload_optimizer or (own.zero_stage == 1 and engine.precision == "bf16")
    if own.zero_stage in (1, 2) and not needs_norm:
        zero["compute_grad_norm"] = False
    return zero


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``theirs`` over ``ours``, section by section."""
    result = dict(ours)
    for key, value in theirs.items():
        below = result.get(key, {})
        inner = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below, value) if inner else value
    return result
