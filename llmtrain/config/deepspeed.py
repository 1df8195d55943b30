"""DeepSpeed's own configuration keys: which pass through, which llmtrain sets, which it refuses.

Invariant: no key is ignored. What llmtrain models is refused with the field to use instead, what it
cannot honour is refused with the reason, an unknown key is refused with the nearest known one, and
so is a value of the wrong type and a key that the stage of ZeRO does not read; the rest reaches
DeepSpeed as written. Nothing here imports DeepSpeed or torch.

    passthrough_problems({"zero_optimization": {"overlap_comm": True}})     # []
    passthrough_problems({"train_batch_size": 8})                           # one sentence
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llmtrain.config.strict import nearest

PIPELINE_VERSION = (0, 19, 3)
"""First DeepSpeed whose pipeline gradients are right: 0.18.3 to 0.19.2 are wrong or hang."""


def _whole(value: object, low: float) -> bool:
    """Tell whether ``value`` is a whole number of at least ``low``; 5e8 is one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value >= low and float(value).is_integer()


_LEVELS = ("debug", "info", "warning", "error", "critical")

KINDS: Mapping[str, Callable[[object], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "a number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "a whole number": lambda value: _whole(value, -math.inf),
    "a whole number of at least 0": lambda value: _whole(value, 0),
    "a whole number above 0": lambda value: _whole(value, 1),
    "text": lambda value: isinstance(value, str),
    "a list of names": lambda value: (
        isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    ),
    f"one of {', '.join(_LEVELS)}": lambda value: value in _LEVELS,
}
"""What keys take, in the words of the messages, with the test of a value."""

_SWITCH, _NUMBER, _INTEGER, _COUNT, _POSITIVE, _TEXT, _NAMES, _LEVEL = KINDS


@dataclass(frozen=True, slots=True)
class Key:
    """A key that reaches DeepSpeed."""

    takes: str
    """Kind of its value, out of ``KINDS``."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """Stages of ZeRO that read it."""


def _keys(section: str, names: Iterable[str], *key: Any) -> dict[str, Key]:
    return dict.fromkeys((f"{section}.{name}" for name in names), Key(*key))


def _stage3(names: Iterable[str], takes: str) -> dict[str, Key]:
    """Keys of stage 3 alone, which DeepSpeed takes with ``stage3_`` before them too."""
    both = [prefix + name for name in names for prefix in ("", "stage3_")]
    return _keys("zero_optimization", both, takes, (3,))


PASSED: Mapping[str, Key] = {
    **_keys("comms_logger", ("enabled", "verbose", "prof_all", "debug"), _SWITCH),
    "comms_logger.prof_ops": Key(_NAMES),
    **_keys("flops_profiler", ("enabled", "detailed"), _SWITCH),
    "flops_profiler.recompute_fwd_factor": Key(_NUMBER),
    **_keys("flops_profiler", ("profile_step", "top_modules"), _COUNT),
    "flops_profiler.module_depth": Key(_INTEGER),
    "flops_profiler.output_file": Key(_TEXT),
    **_keys("timers.throughput", ("enabled", "synchronized"), _SWITCH),
    "steps_per_print": Key(_POSITIVE),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), Key(_SWITCH)),
    "log_level": Key(_LEVEL),
    **_keys(
        "zero_optimization", ("contiguous_gradients", "reduce_scatter", "overlap_comm"),
        _SWITCH, (1, 2, 3),
    ),
    "zero_optimization.reduce_bucket_size": Key(_POSITIVE, (1, 2, 3)),
    **_keys(
        "zero_optimization",
        ("use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "round_robin_gradients",
         "parameter_alignment"),
        _SWITCH, (1, 2),
    ),
    "zero_optimization.allgather_bucket_size": Key(_COUNT, (1, 2)),
    **_stage3(
        ("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
         "max_live_parameters", "max_reuse_distance"),
        _COUNT,
    ),
    **_stage3(("module_granularity_threshold",), _INTEGER),
    **_stage3(("use_all_reduce_for_fetch_params", "allgather_sequential"), _SWITCH),
    **_keys(
        "zero_optimization",
        ("memory_efficient_linear", "log_trace_cache_warnings", "enable_sanity_checks"),
        _SWITCH, (3,),
    ),
    "zero_optimization.sub_group_size": Key(_COUNT, (3,)),
    "zero_optimization.offload_optimizer.pin_memory": Key(_SWITCH, (1, 2, 3)),
    "zero_optimization.offload_param.pin_memory": Key(_SWITCH, (3,)),
}  # fmt: skip
"""Keys that reach DeepSpeed, by dotted path."""

SECTIONS = frozenset(path[: dot.start()] for path in PASSED for dot in re.finditer(r"\.", path))
"""Paths that have keys below them."""

SET_HERE: Mapping[str, str] = {
    "train_batch_size": "training.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_tokens and training.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip_norm",
    "optimizer": "optimizer.kind and its fields",
    "scheduler": "schedule.kind and its fields",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "communication_data_type": "engine.precision",
    "zero_optimization.stage": "engine.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.deepspeed.offload_parameters",
    "zero_optimization.cpu_offload": "engine.deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.deepspeed.offload_parameters",
    "pipeline": "parallel.pp",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "data_parallel_size": "parallel.dp_shard",
    "activation_checkpointing": "parallel.recompute",
    "compile": "engine.compile",
    "checkpoint": "the checkpoint section",
    "wandb": "monitor.wandb",
    "vocabulary_size": "model.vocab_size",
    "curriculum_learning": "the mixture section",
    "data_efficiency": "the mixture section",
}
"""Keys that llmtrain sets itself, and the fields they follow from."""

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op",
         "sparse_gradients", "managed_gradient_accumulation"),
        "llmtrain sums gradients itself, exactly, weighted by target tokens",
    ),
    **dict.fromkeys(
        ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
         "zero_optimization.save_muon_momentum_buffer_in_memory",
         "zero_optimization.offload_optimizer.ratio"),
        "llmtrain brings the optimizer",
    ),
    **dict.fromkeys(
        ("nebula", "datastates_ckpt", "zero_optimization.elastic_checkpoint",
         "zero_optimization.load_from_fp32_weights",
         "zero_optimization.pipeline_loading_checkpoint",
         "zero_optimization.gather_16bit_weights_on_model_save",
         "zero_optimization.stage3_gather_16bit_weights_on_model_save",
         "zero_optimization.stage3_gather_fp16_weights_on_model_save"),
        "llmtrain writes and reads checkpoints in its own format",
    ),
    **dict.fromkeys(
        ("tensorboard", "csv_monitor", "comet"),
        "every number is in the run's metrics.jsonl",
    ),
    **dict.fromkeys(
        ("aio",
         *(f"zero_optimization.offload_optimizer.{key}" for key in (
             "nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init",
         )),
         *(f"zero_optimization.offload_param.{key}" for key in (
             "nvme_path", "buffer_count", "buffer_size", "max_in_cpu",
         ))),
        "llmtrain offloads to the host's memory, where it has no effect",
    ),
    "zero_optimization.zero_hpz_partition_size": "it wants the whole model at once, llmtrain cuts "
    "it block by block",
    **dict.fromkeys(
        ("zero_optimization.zenflow", "zero_optimization.offload_optimizer.super_offload",
         "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
         "zero_optimization.compute_grad_norm", "progressive_layer_drop", "quantize_training",
         "compression_training", "eigenvalue", "sparse_attention"),
        "it changes what a step computes",
    ),
    **dict.fromkeys(
        ("zero_optimization.legacy_stage1", "zero_optimization.allgather_partitions",
         "zero_optimization.cpu_offload_use_pin_memory"),
        "DeepSpeed itself has given it up",
    ),
    **dict.fromkeys(
        ("autotuning", "elasticity", "hybrid_engine", "expert_parallel", "graph_harvesting",
         "weight_quantization", "use_data_before_expert_parallelism", "disable_python_gc",
         "seq_parallel_communication_data_type", "dataloader_drop_last", "disable_allgather",
         "zero_optimization.leaf_module", "zero_optimization.override_module_apply",
         "zero_optimization.zero_quantized_nontrainable_weights"),
        "llmtrain does not use that part of DeepSpeed",
    ),
}  # fmt: skip
"""Keys that llmtrain would have to ignore or that would change the numbers, and the reason."""


def passthrough_problems(
    config: Mapping[str, object],
    *,
    zero_stage: int | None = None,
    offload_optimizer: bool = True,
    offload_parameters: bool = True,
) -> list[str]:
    """One sentence for every key of ``engine.deepspeed.config`` that may not reach DeepSpeed.

    The fields of the same names say what would be ignored: keys that the stage of ZeRO does not
    read (None: any stage), and settings of an offload that is off.
    """
    off = {
        f"zero_optimization.{key}": field
        for key, field, on in (
            ("offload_optimizer", "offload_optimizer", offload_optimizer),
            ("offload_param", "offload_parameters", offload_parameters),
        )
        if not on
    }
    return [
        problem
        for path, value in _leaves(config)
        if (problem := _problem(path, value, zero_stage, off)) is not None
    ]


@functools.cache
def deepspeed_version() -> str | None:
    """Version of the installed DeepSpeed, None where there is none; does not import it."""
    try:
        return version("deepspeed")
    except PackageNotFoundError:
        return None


def pipeline_is_right(installed: str) -> bool:
    """Tell whether the pipeline of DeepSpeed ``installed`` computes right gradients."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    return numbers >= PIPELINE_VERSION


def _leaves(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path and value of every key, those of a known section one by one."""
    for key, value in section.items():
        path = f"{prefix}{key}"
        if path in SECTIONS and isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _problem(
    path: str, value: object, zero_stage: int | None, off: Mapping[str, str]
) -> str | None:
    """Say what is wrong with one key; ``off`` maps sections without effect to their switches."""
    if path in SET_HERE:
        return f"config.{path} follows from {SET_HERE[path]}; set that instead"
    if path in REFUSED:
        return f"config.{path} is not supported: {REFUSED[path]}; leave it out"
    if path in SECTIONS:
        return f"config.{path}={value} is not a section; write config.{path}.KEY=VALUE"
    if path not in PASSED:
        return (
            f"config.{path} is no key that DeepSpeed reads{nearest(path, _near(path), 'config.')}"
        )
    key, section = PASSED[path], path.rpartition(".")[0]
    if not KINDS[key.takes](value):
        return f"config.{path}={value} must be {key.takes}"
    if section in off:
        return (
            f"config.{path} has no effect with {off[section]}=false; "
            f"set {off[section]}=true or leave it out"
        )
    if zero_stage is not None and zero_stage not in key.stages:
        stages = ", ".join(str(stage) for stage in key.stages)
        return (
            f"config.{path} has no effect with zero_stage={zero_stage}, only with {stages}; "
            "leave it out"
        )
    return None


def _near(path: str) -> list[str]:
    """Keys and sections in the same section as ``path``."""
    section = path.rpartition(".")[0]
    known = {*PASSED, *SECTIONS, *SET_HERE, *REFUSED}
    return sorted(name for name in known if name.rpartition(".")[0] == section)
