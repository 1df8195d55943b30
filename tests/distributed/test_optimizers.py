"""Optimizers and sums on several ranks do what one process does."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.layouts import Layout, native
from tests.distributed.optimizers import (
    SHAPES,
    five_steps,
    inexact,
    one_backward_too_many,
    summed,
    trained,
)
from tests.world import RankPool

LAYOUTS = ["fsdp4", "hsdp2x2", "fsdp2_tp2", "dp2_tp2", "dp4"]


def test_whole_matrices_give_the_bits_of_one_process(ranks: RankPool) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    assert ranks.run(inexact, LAYOUTS, dtypes, size=4) == [[]] * 4


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("fp64", 1e-12)])
@pytest.mark.parametrize("kind", ["muon", "lion", "adamw"])
def test_five_steps_are_those_of_one_process(
    kind: str, precision: str, tolerance: float, ranks: RankPool
) -> None:
    ((alone,),) = ranks.run(five_steps, kind, precision, [], size=1)
    assert list(alone) == list(SHAPES)
    everyone = ranks.run(five_steps, kind, precision, LAYOUTS, size=4)
    for number, layout in enumerate(LAYOUTS):
        held: dict[tuple[str, str], torch.Tensor] = {}
        for name, (region, value) in (item for every in everyone for item in every[number].items()):
            torch.testing.assert_close(
                value, alone[name][1][region], rtol=tolerance, atol=tolerance, msg=layout
            )
            first = held.setdefault((name, str(region)), value)
            assert torch.equal(value, first), f"holders of {name} disagree on bits in {layout}"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("fp64", 1e-12)])
def test_five_steps_of_muon_in_the_engine_are_those_of_one_process(
    precision: str, tolerance: float, ranks: RankPool
) -> None:
    def run(**axes: int) -> dict[str, torch.Tensor]:
        layout = native("muon", optimizer="muon", precision=precision, **axes)
        result: dict[str, torch.Tensor] = ranks.run(trained, layout.config, 5, size=layout.size)[0]
        return result

    alone = run()
    for axes in ({"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}):
        for name, value in run(**axes).items():
            error = (value - alone[name]).norm() / alone[name].norm()
            assert error <= tolerance, f"{name}, {axes}"


@pytest.mark.parametrize("bf16", [False, True])
def test_overlapped_sums_have_the_bits_of_sums_afterwards(bf16: bool, ranks: RankPool) -> None:
    results = {how: ranks.run(summed, how, bf16, size=3) for how in ("overlapped", "after", "list")}
    for gradients, _ in (*results["overlapped"], *results["list"]):
        for got, want in zip(gradients, results["after"][0][0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for rank in range(3):
        pairs = zip(results["overlapped"][rank][0], results["after"][rank][0], strict=True)
        assert all(torch.equal(got, want) for got, want in pairs)
        assert results["after"][rank][1] == [0] * 6


def test_the_last_backward_starts_the_sums_of_what_is_ready(ranks: RankPool) -> None:
    begun = [begun for _, begun in ranks.run(summed, "overlapped", False, size=3)]
    assert begun[0] == [0, 0, 5, 0, 0, 5]
    assert begun[1] == [0] * 6, "a bucket that never fills holds back those behind it"


def test_a_gradient_after_its_sum_is_refused(ranks: RankPool) -> None:
    for message in ranks.run(one_backward_too_many, size=2):
        assert "a gradient arrived after its sum over replicas had begun" in message


@pytest.mark.parametrize(
    "layout",
    [
        native("dp4", dp_replicate=4),
        native("bf16 dp4", dp_replicate=4, precision="bf16"),
        native("pp2 dp2", pp=2, dp_replicate=2),
        native("pp2 cp2 interleaved", pp=2, cp=2, schedule="interleaved_1f1b"),
    ],
    ids=lambda layout: layout.name,
)
def test_overlapping_changes_no_bit_of_a_run(layout: Layout, ranks: RankPool) -> None:
    results = []
    for when in ("overlapped", "after"):
        config = replace(layout.config, parallel=replace(layout.parallel, replica_sum=when))
        results.append(ranks.run(trained, config, 3, size=layout.size)[0])
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
