"""Layouts drawn from all that the support matrix lets through compute what one process computes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmtrain.config.parallel import DeepSpeedConfig, ParallelConfig, Schedule
from llmtrain.config.run import broken_rules
from tests.distributed.figures import Suite
from tests.distributed.layouts import ENGINE, Layout

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


@pytest.fixture(scope="module")
def layouts() -> dict[str, list[Layout]]:
    """The supported ones by engine."""
    found: dict[str, list[Layout]] = {"native": [], "deepspeed": []}
    for layout in filter(supported, candidates()):
        found[layout.engine.kind].append(layout)
    return found


RECOMPUTE = st.sampled_from(["none", "full", "selective", "budget"])
MODEL = st.sampled_from(["base", "tied", "window"])


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],  # a smaller failing layout is not worth its minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_drawn_layout_agrees_with_one_process(
    data: st.DataObject, layouts: dict[str, list[Layout]], suite: Suite
) -> None:
    kind = data.draw(st.sampled_from(["native", "native", "native", "deepspeed"]))
    drawn = data.draw(st.sampled_from(layouts[kind]))
    changed = replace(
        drawn,
        model=data.draw(MODEL),
        parallel=replace(drawn.parallel, recompute=data.draw(RECOMPUTE)),
    )
    layout = changed if supported(changed) else drawn
    assert suite.measure(layout).beyond() == [], layout


def test_much_is_supported(layouts: dict[str, list[Layout]]) -> None:
    assert len(layouts["native"]) > 100
    assert len(layouts["deepspeed"]) > 10
