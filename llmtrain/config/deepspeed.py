"""DeepSpeed's own configuration keys: which pass through, which llmtrain sets, which it refuses.

Invariant: no key is ignored. What llmtrain models is refused with the field to use instead, what it
cannot honour is refused with the reason, an unknown key is refused with the nearest known one; the
rest reaches DeepSpeed as written. Nothing here imports DeepSpeed or torch.

    passthrough_problems({"zero_optimization": {"overlap_comm": True}})     # []
    passthrough_problems({"train_batch_size": 8})                           # one sentence
"""

import functools
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from llmtrain.config.strict import nearest

PIPELINE_VERSION = (0, 19, 3)
"""First DeepSpeed whose pipeline gradients are right: 0.18.3 to 0.19.2 are wrong or hang."""

_OFFLOAD = ("nvme_path", "buffer_count", "pin_memory")

PASSED: Mapping[str, tuple[str, ...]] = {
    "comms_logger": ("enabled", "verbose", "prof_all", "debug", "prof_ops"),
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules",
        "detailed", "output_file",
    ),
    "timers": ("throughput",),
    "aio": (
        "block_size", "queue_depth", "thread_count", "intra_op_parallelism", "single_submit",
        "overlap_events", "use_gds",
    ),
    "steps_per_print": (),
    "wall_clock_breakdown": (),
    "memory_breakdown": (),
    "dump_state": (),
    "log_level": (),
    "zero_optimization": (
        "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size",
        "overlap_comm", "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold",
        "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
        "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "module_granularity_threshold",
        "use_all_reduce_for_fetch_params", "allgather_sequential", "ignore_unused_parameters",
        "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size",
        "zero_quantized_weights", "zero_quantized_gradients", "memory_efficient_linear",
        "log_trace_cache_warnings", "enable_sanity_checks",
    ),
    "zero_optimization.offload_optimizer": (
        *_OFFLOAD, "pipeline_read", "pipeline_write", "fast_init",
    ),
    "zero_optimization.offload_param": (*_OFFLOAD, "buffer_size", "max_in_cpu"),
}  # fmt: skip
"""Keys that reach DeepSpeed, by section; an empty section is a plain value."""

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
        ("zero_optimization.zenflow", "zero_optimization.offload_optimizer.super_offload",
         "zero_optimization.compute_grad_norm", "progressive_layer_drop", "quantize_training",
         "compression_training", "eigenvalue", "sparse_attention"),
        "it changes what a step computes",
    ),
    **dict.fromkeys(
        ("zero_optimization.legacy_stage1", "zero_optimization.cpu_offload_use_pin_memory"),
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
    offload_optimizer: bool = True,
    offload_parameters: bool = True,
) -> list[str]:
    """One sentence for every key of ``engine.deepspeed.config`` that may not reach DeepSpeed.

    The two flags are the fields of the same names: without them, settings of an offload would be
    ignored.
    """
    known = [key for key in PASSED if "." not in key]
    problems = _problems(config, "", (*known, *SET_HERE, *REFUSED))
    zero = config.get("zero_optimization")
    switches = {
        "offload_optimizer": ("offload_optimizer", offload_optimizer),
        "offload_param": ("offload_parameters", offload_parameters),
    }
    for key, (field, on) in switches.items():
        if isinstance(zero, Mapping) and key in zero and not on:
            problems.append(
                f"config.zero_optimization.{key} has no effect with {field}=false; "
                f"set {field}=true or leave it out"
            )
    return problems


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


def _problems(section: Mapping[str, object], prefix: str, known: tuple[str, ...]) -> list[str]:
    """The problems of the keys in one section, whose full names start with ``prefix``."""
    problems = list[str]()
    for key, value in section.items():
        path = f"{prefix}{key}"
        if path in SET_HERE:
            problems.append(f"config.{path} follows from {SET_HERE[path]}; set that instead")
        elif path in REFUSED:
            problems.append(f"config.{path} is not supported: {REFUSED[path]}; leave it out")
        elif path not in PASSED and path not in known:
            hint = nearest(path, known, "config.")
            problems.append(f"config.{path} is no key that DeepSpeed reads{hint}")
        elif inner := PASSED.get(path, ()):
            problems += _section(path, value, inner)
    return problems


def _section(path: str, value: object, inner: tuple[str, ...]) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"config.{path}={value} is not a section; write config.{path}.KEY=VALUE"]
    paths = (*PASSED, *SET_HERE, *REFUSED)
    deeper = [p for p in paths if p.startswith(f"{path}.")]
    return _problems(value, f"{path}.", (*(f"{path}.{key}" for key in inner), *deeper))
