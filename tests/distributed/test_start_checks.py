"""What live ranks find out about each other before the first step."""

import logging
import time

import pytest

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import DataError
from llmtrain.parallel.links import outliers
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.start_checks import check_ranks
from tests.world import RankPool


def looked(place: Place, ahead_s: float, data: dict[int, str]) -> tuple[list[str], str, float]:
    """Compare ranks of which the last has another machine; what was said, refused, seconds."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("llmtrain.train.start_checks")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    problem, last = "", place.rank == place.world_size - 1
    with World(ParallelConfig(), EngineConfig(device="cpu"), place) as world:
        started = time.process_time()
        try:
            check_ranks(
                world, data.get(place.rank, "aaaa"), host="n1" if last else "n0",
                clock=lambda: time.time() + (ahead_s if last else 0.0),
            )  # fmt: skip
        except DataError as error:
            problem = str(error)
        spent = time.process_time() - started
    log.removeHandler(handler)
    return said, problem, spent


def test_ranks_that_agree_are_told_how_fast_they_sum(ranks: RankPool) -> None:
    found = ranks.run(looked, 0.0, {}, size=3)
    assert [line for line in found[0][0] if "3 ranks sum " in line and "GB/s over each" in line]
    assert not [line for line in found[0][0] if "clock" in line]
    assert all(problem == "" and spent < 0.5 for _, problem, spent in found)
    assert found[1][0] == []
    assert ranks.run(looked, 0.0, {}, size=1)[0][0] == []


def test_another_clock_and_other_data_are_said(ranks: RankPool) -> None:
    found = ranks.run(looked, 5.0, {1: "bbbb"}, size=3)
    [clock] = [line for line in found[0][0] if "clock" in line]
    assert clock.startswith("the clock of n1 is ")
    assert "s ahead of the others'" in clock
    expected = "ranks 1 on n0 read other data than rank 0 on n0: bbbb, expected aaaa"
    assert all(problem.startswith(expected) for _, problem, _ in found)


def test_a_slow_link_is_among_links_of_its_kind() -> None:
    quick = [(f"n{rank // 4}", 0.1 if rank % 4 == 0 else 0.01) for rank in range(16)]
    assert outliers(quick) == []
    slow = [(host, seconds * (8 if rank in (5, 8) else 1)) for rank, (host, seconds) in
            enumerate(quick)]  # fmt: skip
    assert outliers(slow) == [(5, pytest.approx(8)), (8, pytest.approx(8))]
    assert outliers([("n0", 0.01), ("n1", 9.0)]) == []
