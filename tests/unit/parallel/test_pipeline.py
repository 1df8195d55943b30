"""Orders of pipelines: what evaluation runs, what is refused, and how long schedules idle."""

import pytest

from benchmarks.pipeline_idle import FORMULAS, operations, table_idle
from llmtrain.config.parallel import SEVERAL_STAGES, ParallelConfig, Schedule
from llmtrain.errors import LayoutError
from llmtrain.parallel.forward import forward_steps
from llmtrain.parallel.pipeline import SCHEDULES, check_microbatches
from llmtrain.planner.activations import bubble
from llmtrain.planner.stages import rank_of_stage, stages_of_rank


def ticks(steps: list[list[tuple[str, int, int]]]) -> int:
    """Time the longest rank takes where a run takes 1 and a message nothing."""
    ended: dict[tuple[int, int], int] = {}
    todo, clock = [list(some) for some in steps], [0] * len(steps)
    while any(todo):
        before = [len(some) for some in todo]
        for rank, some in enumerate(todo):
            while some:
                action, stage, number = some[0]
                if action == "run":
                    if stage and (stage - 1, number) not in ended:
                        break
                    clock[rank] = 1 + max(clock[rank], ended.get((stage - 1, number), 0))
                    ended[stage, number] = clock[rank]
                some.pop(0)
        assert before != [len(some) for some in todo], "ranks wait for each other"
    return max(clock)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_evaluation_keeps_messages_in_order_and_ranks_busy(
    schedule: str, pp: int, count: int
) -> None:
    num_stages = pp if schedule == "1f1b" else 2 * pp
    steps = forward_steps(schedule, pp, num_stages, count)

    runs = [(stage, number) for some in steps for action, stage, number in some if action == "run"]
    assert sorted(runs) == [(s, n) for s in range(num_stages) for n in range(count)]
    for rank, some in enumerate(steps):
        assert all(rank_of_stage(schedule, pp, stage) == rank for _, stage, _ in some)
        for action, stage, number in some:
            if action == "receive":
                assert some.index((action, stage, number)) < some.index(("run", stage, number))
    for sender in range(pp):
        for receiver in set(range(pp)) - {sender}:
            sent = [
                (stage + 1, number)
                for action, stage, number in steps[sender]
                if action == "run" and stage + 1 < num_stages
                and rank_of_stage(schedule, pp, stage + 1) == receiver
            ]  # fmt: skip
            received = [
                (stage, number)
                for action, stage, number in steps[receiver]
                if action == "receive" and rank_of_stage(schedule, pp, stage - 1) == sender
            ]
            assert sent == received
    late = ticks(steps) - fewest_ticks(schedule, pp, num_stages, count)
    assert 0 <= late <= (pp - 1 if schedule == "interleaved_1f1b" and count % pp else 0)


def fewest_ticks(schedule: str, pp: int, num_stages: int, count: int) -> int:
    """No rank can start before its first stage is reached, nor end later than its last needs."""
    bounds = [num_stages + count - 1]
    for rank in range(pp):
        stages = stages_of_rank(schedule, pp, rank, num_stages // pp)
        bounds.append(stages[0] + len(stages) * count + num_stages - 1 - stages[-1])
    return max(bounds)


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 9), (4, 8), (4, 16)])
def test_idle_fractions_of_the_tables_are_those_of_the_formulas(
    schedule: Schedule, p: int, m: int
) -> None:
    parallel = ParallelConfig(pp=p, schedule=schedule)

    idle = table_idle(operations(schedule, p, m, parallel.num_stages_per_rank))

    assert idle == pytest.approx(bubble(parallel, m), abs=1e-12)


def test_every_schedule_of_the_configuration_runs() -> None:
    assert set(SCHEDULES) == set(Schedule.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("schedule", "count", "message"),
    [
        ("1f1b", 3, "3 micro-batches cannot fill parallel.pp=4 with schedule=1f1b"),
        ("zbv", 7, "takes at least 8"),
        ("dualpipev", 7, "takes at least 8"),
        ("interleaved_1f1b", 9, "9 micro-batches do not make 2 equal rounds of parallel.pp=4"),
        ("interleaved_zero_bubble", 13, "do not make 3 equal rounds"),
    ],
)
def test_microbatches_that_hang_or_fail_late_are_refused(
    schedule: str, count: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        check_microbatches(schedule, 4, count)


@pytest.mark.parametrize(
    ("schedule", "count"),
    [("gpipe", 5), ("1f1b", 4), ("interleaved_1f1b", 6), ("zbv", 8), ("dualpipev", 9)],
)
def test_what_schedules_take_is_not_refused(schedule: str, count: int) -> None:
    check_microbatches(schedule, 4, count)
    v = 2 if schedule in SEVERAL_STAGES else 1
    assert 0 < table_idle(operations(schedule, 4, count, v)) < 1
