"""DeepSpeed's ZeRO beyond the parity suite: bf16, cut parameters, its own keys, gates, states."""

from pathlib import Path

import pytest
import torch

from llmtrain.model.parameters import num_parameters
from tests.distributed.figures import Suite
from tests.distributed.layouts import FEW_STEPS, Layout, zero
from tests.distributed.rig import REASONS, relative
from tests.distributed.states import load, read, save
from tests.distributed.zero import cut, held_elements, printed, refusals, with_keys
from tests.world import RankPool

BF16 = [
    *(zero(n, " bf16 dp2", steps=FEW_STEPS, dp_shard=2, precision="bf16") for n in range(3)),
    cut(" bf16 dp2", steps=FEW_STEPS, precision="bf16"),
]

VARIANTS = [
    *BF16,
    cut(" recompute dp2", steps=FEW_STEPS, recompute="full"),
    cut(
        " tied offload", steps=FEW_STEPS, dp_shard=1, model="tied",
        offload_optimizer=True, offload_parameters=True,
    ),
    zero(
        1, " bf16 offload dp2", steps=FEW_STEPS, dp_shard=2, precision="bf16",
        offload_optimizer=True,
    ),
    zero(0, " muon dp2", steps=FEW_STEPS, dp_shard=2, optimizer="muon"),
    zero(1, " alone", steps=FEW_STEPS),
    with_keys(
        zero(2, " buckets dp2", steps=FEW_STEPS, dp_shard=2),
        reduce_bucket_size=500, contiguous_gradients=False, round_robin_gradients=True,
        parameter_alignment=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("layout", VARIANTS, ids=lambda layout: layout.name)
def test_one_process_and_zero_agree(layout: Layout, suite: Suite) -> None:
    figures = suite.measure(layout)
    assert [found for found in figures.beyond() if not found.startswith(("norm", "worst"))] == []
    assert figures.gradient < 5e-6  # in bf16 too: micro-batches are added in fp32
    # ZeRO 3's hooks in the backward change the order in which a block's gradients are added. Adam
    # makes whole steps of the rounding of near-zero gradients, so later norms drift; losses do not.
    assert figures.norm < (1e-4 if layout.engine.deepspeed.zero_stage == 3 else 5e-6)


@pytest.mark.parametrize(
    "layout",
    [zero(0, dp_shard=2), zero(2, dp_shard=2), BF16[1], cut(" dp2")],
    ids=lambda layout: layout.name,
)
def test_refused_step_changes_nothing(layout: Layout, deepspeed_ranks: RankPool) -> None:
    for found in deepspeed_ranks.run(refusals, layout.config, size=layout.size):
        assert found == dict.fromkeys(REASONS, True)


@pytest.mark.parametrize("layout", [*BF16, cut(" dp2")], ids=lambda layout: layout.name)
def test_state_goes_in_and_out_exactly(
    layout: Layout, ranks: RankPool, deepspeed_ranks: RankPool, tmp_path: Path
) -> None:
    (want,) = ranks.run(save, layout.reference.config, str(tmp_path / "native"), size=1)
    paths = [str(tmp_path / name) for name in ("native", "zero")]
    got = deepspeed_ranks.run(load, layout.config, *paths, size=layout.size)[0]
    (back,) = ranks.run(load, layout.reference.config, str(tmp_path / "zero"), size=1)

    before, after = (read(Path(path)) for path in paths)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert relative(got, want) <= (1e-5 if layout.engine.precision == "bf16" else 1e-6)
    assert back == want


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_hold_their_share_and_no_more(stage: int, deepspeed_ranks: RankPool) -> None:
    layout = zero(stage, dp_shard=2)
    held = deepspeed_ranks.run(held_elements, layout.config, size=2)
    whole = num_parameters(layout.config.model)
    assert sum(held) == (2 * whole if stage == 0 else whole)
    assert abs(held[0] - held[1]) < 0.02 * whole


def test_deepspeed_prints_nothing(deepspeed_ranks: RankPool) -> None:
    assert deepspeed_ranks.run(printed, BF16[1].config, size=2) == ["", ""]
