"""Layouts of a run on a number of GPUs: all that the support matrix allows, the fastest first.

Invariant: a layout that is returned breaks no rule and fits; ties go to the simpler one.

    best = search(config)[0]
    overrides(best.config)     # ["parallel.tp=2", "parallel.recompute=full", ...]
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from llmtrain.config.parallel import ParallelConfig, Recompute, Schedule, resolve_dp
from llmtrain.config.plan import PlanConfig
from llmtrain.config.run import broken_rules
from llmtrain.planner.estimate import Estimate, Held, estimate

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved_1f1b", "zbv")


def search(config: PlanConfig) -> list[Estimate]:
    """Estimate all layouts; give the best of each mesh that fits, by seconds of a step.

    Those within 1 % of the time are ordered by how little they ask for.
    """
    held: Held = {}
    found = [estimate(candidate, held) for candidate in _candidates(config)]
    fitting = [one for one in found if one.fits]
    least = min((one.step_s for one in fitting), default=1.0)
    fitting.sort(key=lambda one: (round(one.step_s / least, 2), _parts(one)))
    best: dict[tuple[int, ...], Estimate] = {}
    for one in fitting:
        best.setdefault(_axes(one), one)
    return list(best.values())


def _parts(one: Estimate) -> tuple[int, int, int]:
    """How much a layout asks for: axes in use, their ranks, recomputation."""
    p, sizes = one.config.parallel, _axes(one)
    used = sum(size > 1 for size in sizes)
    again = _RECOMPUTE.index(p.recompute) + p.reduce_every_microbatch
    return used, sum(sizes), again


def _axes(one: Estimate) -> tuple[int, int, int, int]:
    """Ranks along all axes but dp_shard, which takes the rest."""
    p = one.config.parallel
    return p.pp, resolve_dp(p, one.config.num_gpus)[0], p.cp, p.tp


def _candidates(config: PlanConfig) -> Iterator[PlanConfig]:
    """Every allowed combination of axes, schedule, recomputation and micro-batch size."""
    rows = config.training.global_batch_tokens // config.training.sequence_length
    for parallel in _layouts(config):
        ranks = config.num_gpus // (parallel.pp * parallel.cp * parallel.tp)
        for size in _powers(max(1, rows // ranks)):
            training = replace(config.training, micro_batch_size=size)
            candidate = replace(config, parallel=parallel, training=training)
            if not broken_rules(candidate, config.num_gpus):
                yield candidate


def _layouts(config: PlanConfig) -> Iterator[ParallelConfig]:
    """Axes that multiply to the GPUs, with data ranks taking what is left."""
    within, gpus = _powers(config.gpus_per_node), _powers(config.num_gpus)
    pipelines = [p for p in gpus if p <= config.model.num_hidden_layers]
    for tp, cp, pp, recompute, every in product(
        within, within, pipelines, _RECOMPUTE, (False, True)
    ):
        if config.num_gpus % (tp * cp * pp) or (every and pp > 1):
            continue
        for replicas in {1, config.num_gpus // config.gpus_per_node}:
            left = config.num_gpus // (tp * cp * pp)
            if replicas < 1 or left % replicas:
                continue
            for schedule in _SCHEDULES if pp > 1 else ("1f1b",):
                yield replace(
                    config.parallel, pp=pp, cp=cp, tp=tp, dp_replicate=replicas,
                    dp_shard=left // replicas, schedule=schedule, recompute=recompute,
                    stages_per_rank="auto", reduce_every_microbatch=every,
                )  # fmt: skip


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [1 << n for n in range(most.bit_length())]


def overrides(config: PlanConfig) -> list[str]:
    """The words that set what a search chose."""
    p, plain = config.parallel, ParallelConfig()
    names = ("pp", "dp_replicate", "cp", "tp", "schedule", "recompute", "reduce_every_microbatch")
    changed = {n: getattr(p, n) for n in names if getattr(p, n) != getattr(plain, n)}
    words = [f"parallel.{n}={str(v).lower()}" for n, v in changed.items()]
    return [*words, f"training.micro_batch_size={config.training.micro_batch_size}"]
