"""Layouts drawn from all that the support matrix lets through compute what one process computes."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmtrain.config.engine import DeepSpeedConfig
from llmtrain.config.parallel import ParallelConfig, Schedule
from llmtrain.config.run import broken_rules
from tests.distributed.figures import Suite
from tests.distributed.layouts import ENGINE, FEW_STEPS, Layout

SIZES = (1, 2, 4)
MOST_RANKS = 8


def candidates() -> Iterator[Layout]:
    """Every combination of the fields drawn, supported or not, but for those without a meaning."""
    for pp, dp_replicate, dp_shard, cp, tp in product(SIZES, repeat=5):
        if not 2 <= pp * dp_replicate * dp_shard * cp * tp <= MOST_RANKS:
            continue
        schedules = Schedule.__args__ if pp > 1 else ("1f1b",)
        methods = ("all_gather", "ulysses", "ring") if cp > 1 else ("all_gather",)
        for schedule, method in product(schedules, methods):
            parallel = ParallelConfig(
                pp=pp, dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, tp=tp,
                schedule=schedule, cp_method=method,
            )  # fmt: skip
            yield Layout(name="drawn", parallel=parallel)
            for stage in (0, 1, 2, 3) if dp_replicate * cp * tp == 1 else ():
                deepspeed = DeepSpeedConfig(zero_stage=stage)
                engine = replace(ENGINE, kind="deepspeed", deepspeed=deepspeed)
                yield Layout(name="drawn", parallel=parallel, engine=engine)


def supported(layout: Layout) -> bool:
    return not broken_rules(layout.config, layout.size)


@functools.cache
def layouts() -> dict[str, list[Layout]]:
    """The supported ones by engine."""
    found: dict[str, list[Layout]] = {"native": [], "deepspeed": []}
    for layout in filter(supported, candidates()):
        found[layout.engine.kind].append(layout)
    return found


@settings(
    max_examples=6,
    phases=[Phase.explicit, Phase.generate],  # a smaller failing layout is not worth its minutes
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(["native", "native", "native", "deepspeed"]),
    number=st.integers(0, 10**6),
    model=st.sampled_from(["base", "tied", "window"]),
    recompute=st.sampled_from(["none", "full", "selective", "budget"]),
)
def test_drawn_layout_agrees_with_one_process(
    kind: str,
    number: int,
    model: str,
    recompute: str,
    suite: Suite,
) -> None:
    drawn = layouts()[kind][number % len(layouts()[kind])]
    parallel = replace(drawn.parallel, recompute=recompute)
    changed = replace(drawn, model=model, parallel=parallel)
    layout = changed if supported(changed) else drawn
    assert suite.measure(layout, FEW_STEPS).beyond() == [], layout


def test_much_is_supported() -> None:
    assert len(layouts()["native"]) > 100
    assert len(layouts()["deepspeed"]) > 10
