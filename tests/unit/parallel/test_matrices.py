"""How matrices are shared out among ranks; running it is in tests/distributed."""

from collections import Counter

import pytest
import torch

from llmtrain.parallel.matrices import (
    Matrix,
    bounds_of,
    matrices_of,
    owners_of,
    plan_rounds,
    run_alone,
)

HALVES = [((0, 4), (0, 6)), ((4, 8), (0, 6))]


def matrix(name: str, rows: int, columns: int, num_ranks: int = 1) -> Matrix:
    whole = ((0, rows), (0, columns))
    return Matrix(name=name, shape=(rows, columns), holders={whole: tuple(range(num_ranks))})


def test_work_is_spread_evenly_by_cost() -> None:
    names = ("q", "k", "v", "o", "gate", "up", "down")
    shapes = ((64, 64), (16, 64), (16, 64), (64, 64), (192, 64), (192, 64), (64, 192))
    matrices = [
        matrix(f"{layer}.{name}", *shape)
        for layer in range(8)
        for name, shape in zip(names, shapes, strict=True)
    ]
    owners = owners_of(matrices, num_ranks=4)
    load = Counter[int]()
    for each in matrices:
        load[owners[each.name]] += each.cost
    assert max(load.values()) <= 1.02 * sum(load.values()) / 4


def test_cost_is_that_of_newton_schulz_whichever_way_a_matrix_lies() -> None:
    assert matrix("a", 2, 5).cost == matrix("b", 5, 2).cost == 2 * 2 * 12


def test_every_holder_gets_its_region_back_and_one_holder_sends_it() -> None:
    holders = {HALVES[0]: (0, 2), HALVES[1]: (1, 3)}
    chosen = [Matrix(name="a", shape=(8, 6), holders=holders)]
    (planned,) = plan_rounds(chosen, num_ranks=4, rank=0)
    assert planned.names == ("a",)
    assert [(t.bounds, t.source, t.target) for t in planned.gather] == [
        (HALVES[0], 0, 0),
        (HALVES[1], 1, 0),
    ]
    assert sorted(t.target for t in planned.scatter) == [0, 1, 2, 3]


def test_rounds_are_bounded_and_hold_every_matrix_once() -> None:
    matrices = [matrix(str(i), 4, 4, num_ranks=2) for i in range(10)]
    rounds = [plan_rounds(matrices, num_ranks=2, rank=rank, limit=40) for rank in range(2)]
    names = [name for mine in rounds for planned in mine for name in planned.names]
    assert sorted(names) == sorted(m.name for m in matrices)
    assert all(len(planned.names) <= 2 for mine in rounds for planned in mine)
    assert len(rounds[0]) == len(rounds[1]) == 3
    assert [r.gather for r in rounds[0]] == [r.gather for r in rounds[1]]


def test_regions_that_leave_a_gap_are_refused() -> None:
    with pytest.raises(ValueError, match="regions of a do not make up the whole"):
        matrices_of([{"a": ((8, 6), HALVES[0])}, {"a": ((8, 6), HALVES[0])}])


def test_vectors_are_left_out_and_empty_regions_carry_nothing() -> None:
    empty = bounds_of((slice(8, 8), slice(0, 6)))
    whole = bounds_of((slice(0, 8), slice(0, 6)))
    ranks = [{"a": ((8, 6), bounds), "norm": ((8,), ((0, 8),))} for bounds in (whole, empty, empty)]
    (found,) = matrices_of(ranks).values()
    (planned,) = plan_rounds([found], num_ranks=3, rank=0)
    assert [t.bounds for t in planned.gather] == [whole]


def test_one_process_applies_the_function_itself() -> None:
    assert run_alone(torch._foreach_neg, {"a": torch.ones(2, 2)})["a"].sum() == -4
