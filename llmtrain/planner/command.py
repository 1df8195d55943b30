"""``llmtrain plan``: memory, step time and length of a run on GPUs that are not here.

Invariant: nothing is started and no torch is imported; a layout that does not fit ends with
status 1, one that breaks a rule is refused as ``llmtrain train`` would refuse it.

    llmtrain plan model=llama3_8b num_gpus=64 search=true training.sequence_length=8192
"""

import sys
from collections.abc import Sequence

from llmtrain.config.plan import PlanConfig
from llmtrain.config.run import check
from llmtrain.planner.estimate import GIB, Estimate, estimate, gpu_of
from llmtrain.planner.flops import convention, flops_per_token
from llmtrain.planner.memory import is_trained, num_elements, parameter_shapes
from llmtrain.planner.search import overrides, search

_VALUE, _MOMENTS = 4, 8
"""Bytes of a parameter in a checkpoint, in fp32, and of the two moments of one that is trained."""


def main(config: PlanConfig) -> int:
    """Print the plan; returns 1 where nothing fits."""
    gpu_of(config)
    if config.search:
        return _searched(config)
    check(config, config.num_gpus)
    found = estimate(config)
    sys.stdout.write("\n".join([*_facts(config), "", *_memory(found), "", *_time(found)]) + "\n")
    return 0 if found.fits else 1


def _searched(config: PlanConfig) -> int:
    found = search(config)
    if not found:
        sys.stdout.write(
            f"no layout of {config.num_gpus} x {config.gpu} fits; use more GPUs, a smaller "
            "training.global_batch_tokens or sequence_length, or parallel.activation_offload=true\n"
        )
        return 1
    rows = [_row(one) for one in found[: config.show]]
    head = ("tokens/s", "step s", "MFU", "bubble", "GiB", "overrides")
    lines = [
        *_facts(config),
        f"{len(found)} meshes fit, each with its best schedule, recomputation and micro-batch size",
        "",
        *_columns([head, *rows]),
    ]
    best = found[0]
    sys.stdout.write("\n".join([*lines, "", "the first:", "", *_memory(best), "", *_time(best)]))
    sys.stdout.write(f"\n\nuse: {' '.join(overrides(best.config))}\n")
    return 0


def _row(one: Estimate) -> tuple[str, ...]:
    figures = (f"{one.tokens_per_s:,.0f}", f"{one.step_s:.2f}", f"{one.mfu:.1%}")
    memory = f"{one.memory.total / GIB:.1f}"
    return (*figures, f"{one.bubble:.1%}", memory, " ".join(overrides(one.config)))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with their numbers flush right and the last column flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + f"  {row[-1]}"
        for row in rows
    ]


def _facts(config: PlanConfig) -> list[str]:
    """What is planned for what."""
    training = config.training
    size = num_elements(parameter_shapes(config.model).items())
    flops = flops_per_token(config.model, training.sequence_length)
    gpu, counted = gpu_of(config), convention(config.model)
    return [
        f"{size / 1e9:.2f} B parameters, {flops / 1e9:.1f} GFLOP per token ({counted})",
        f"{config.num_gpus} x {config.gpu}, {gpu.tflops:,.0f} TFLOP/s at the peak, of which "
        f"{config.mfu:.0%} while a GPU computes (mfu)",
        f"{training.global_batch_tokens:,} tokens a step in rows of {training.sequence_length:,}",
    ]


def _memory(found: Estimate) -> list[str]:
    """The memory of the GPU that needs most, part by part."""
    memory = found.memory
    parts = {
        "state": memory.state, "gathered": memory.gathered,
        "activations": memory.activations, "loss": memory.loss, "total": memory.total,
    }  # fmt: skip
    lines = [f"  {name:<12}{size / GIB:8.2f} GiB" for name, size in parts.items()]
    verdict = "fits" if found.fits else "does not fit"
    used = f"{memory.total / found.limit:.0%}"
    return [
        "memory of the GPU that needs most",
        *lines,
        f"  {verdict}: {used} of {found.limit / GIB:.1f} GiB, "
        f"{found.config.reserve_gib:g} GiB kept back",
    ]


def _time(found: Estimate) -> list[str]:
    """Seconds of a step and days of the run."""
    training = found.config.training
    days = training.num_tokens / found.tokens_per_s / 86400
    model, shapes = found.config.model, parameter_shapes(found.config.model).items()
    trained = num_elements(shape for shape in shapes if is_trained(model, shape[0]))
    size = num_elements(shapes) * _VALUE + trained * _MOMENTS
    return [
        f"step of {found.step_s:.2f} s: computing {found.compute_s:.2f} s in "
        f"{found.microbatches} micro-batches a rank, bubble {found.bubble:.1%}, waiting for "
        f"communication {found.exposed_s:.2f} s",
        f"{found.tokens_per_s:,.0f} tokens/s, MFU {found.mfu:.1%}",
        f"{training.num_tokens:,} tokens: {training.num_steps:,} steps, {days:.1f} days, "
        f"{days * 24 * found.config.num_gpus:,.0f} GPU hours; "
        f"a checkpoint is {size / GIB:.1f} GiB",
    ]
