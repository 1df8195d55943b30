"""The JSON DeepSpeed is initialised with, made from llmtrain's configuration.

Invariant: DeepSpeed neither scales, clips nor schedules: it gathers, reduces and stores. Batch
numbers, precision, ZeRO stage and offload follow from llmtrain's fields; what those do not model
comes from ``engine.deepspeed.config`` (checked in config/deepspeed.py).

    deepspeed_json(config.engine, data_ranks=2, micro_batch_size=1, num_microbatches=4)
"""

from collections.abc import Mapping
from typing import Any

from llmtrain.config.parallel import EngineConfig

QUIET_STEPS = 2**62
"""Steps between DeepSpeed's own progress lines, which llmtrain's log replaces."""


def deepspeed_json(
    engine: EngineConfig, *, data_ranks: int, micro_batch_size: int = 1, num_microbatches: int = 1
) -> dict[str, Any]:
    """Translate ``engine`` into the dict that ``deepspeed.initialize`` takes.

    Args:
        engine: precision, ZeRO stage, offload, and DeepSpeed's own keys.
        data_ranks: data-parallel ranks.
        micro_batch_size: rows of one micro-batch.
        num_microbatches: micro-batches of one rank in a step; both sizes only have to agree with
            each other, since the engine is driven micro-batch by micro-batch.
    """
    own = engine.deepspeed
    zero: dict[str, Any] = {"stage": own.zero_stage}
    if own.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if own.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        "train_batch_size": data_ranks * micro_batch_size * num_microbatches,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": 0.0,
        "steps_per_print": QUIET_STEPS,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if engine.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    return _merged(settings, own.config)


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``theirs`` over ``ours``, section by section."""
    result = dict(ours)
    for key, value in theirs.items():
        below = result.get(key, {})
        inner = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below, value) if inner else value
    return result
