"""Every layout computes what one process computes: losses, gradients, start values, evaluation."""

import pytest
from torch import Tensor

from llmtrain.parity import compare_gradients
from tests.distributed.layouts import LAYOUTS, Curve, curve, gradients, relative, size_of
from tests.world import RankPool

NUM_STEPS = 20
ACCEPTED = {"dp2", "fsdp2", "pp2_gpipe", "pp2_1f1b", "dp2_pp2", "fsdp2_pp2"}
PARALLEL = [name for name in LAYOUTS if name != "single"]


def run_curve(ranks: RankPool, layout: str, precision: str, num_steps: int) -> Curve:
    curves: list[Curve] = ranks.run(curve, layout, precision, num_steps, size=size_of(layout))
    assert all(other == curves[0] for other in curves), "ranks disagree on bits"
    return curves[0]


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> Curve:
    return run_curve(ranks, "single", "fp32", NUM_STEPS)


def test_evaluation_gives_the_loss_of_the_training_step(reference: Curve) -> None:
    assert reference.held_out == reference.losses[0]


@pytest.mark.parametrize("layout", PARALLEL)
def test_twenty_steps_agree_with_one_process(
    layout: str, ranks: RankPool, reference: Curve
) -> None:
    steps = NUM_STEPS if layout in ACCEPTED else 6
    got = run_curve(ranks, layout, "fp32", steps)

    assert got.start == reference.start
    assert relative([got.held_out], [reference.held_out]) <= 1e-6
    assert relative(got.losses, reference.losses[:steps]) <= 1e-6
    assert relative(got.source_losses, reference.source_losses[:steps]) <= 1e-6
    assert relative(got.grad_norms, reference.grad_norms[:steps]) <= 1e-6


@pytest.fixture(scope="module")
def reference_gradients(ranks: RankPool) -> dict[str, tuple[float, dict[str, Tensor]]]:
    return {
        precision: ranks.run(gradients, "single", precision, False, size=1)[0]
        for precision in ("fp32", "fp64")
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-6), ("fp64", 1e-12)])
@pytest.mark.parametrize("layout", PARALLEL)
def test_every_gradient_agrees_with_one_process(
    layout: str,
    precision: str,
    tolerance: float,
    ranks: RankPool,
    reference_gradients: dict[str, tuple[float, dict[str, Tensor]]],
) -> None:
    want_loss, want = reference_gradients[precision]
    loss, got = ranks.run(gradients, layout, precision, False, size=size_of(layout))[0]

    worst = max(compare_gradients(got, want, step=1), key=lambda d: d.error)
    assert worst.error <= tolerance, worst
    assert relative([loss], [want_loss]) <= tolerance


@pytest.mark.parametrize("layout", ["dp2", "fsdp2"])
def test_tied_embeddings_count_once(layout: str, ranks: RankPool) -> None:
    _, want = ranks.run(gradients, "single", "fp32", True, size=1)[0]
    _, got = ranks.run(gradients, layout, "fp32", True, size=size_of(layout))[0]

    assert "lm_head.weight" not in got
    assert max(d.error for d in compare_gradients(got, want, step=1)) <= 5e-6


@pytest.fixture(scope="module")
def bf16_reference(ranks: RankPool) -> Curve:
    return run_curve(ranks, "single", "bf16", 5)


@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "pp2_1f1b", "fsdp2_pp2"])
def test_bf16_layouts_agree(layout: str, ranks: RankPool, bf16_reference: Curve) -> None:
    got = run_curve(ranks, layout, "bf16", 5)

    assert got.start == bf16_reference.start
    assert relative(got.losses, bf16_reference.losses) <= 1e-5


def test_bf16_stays_near_fp32(reference: Curve, bf16_reference: Curve) -> None:
    assert bf16_reference.start == reference.start
    assert bf16_reference.losses != reference.losses[:5]
    assert relative(bf16_reference.losses, reference.losses[:5]) <= 2e-3
