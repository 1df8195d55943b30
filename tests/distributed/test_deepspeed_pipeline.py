"""DeepSpeed's pipeline beyond the parity suite: bf16, changing shapes, who holds what."""

import pytest

from llmtrain.model.parameters import parameter_table
from llmtrain.parity import compare_gradients
from llmtrain.planner.stages import split_layers
from tests.distributed.layouts import native, zero
from tests.distributed.pipelines import (
    changing_shapes,
    short_run,
    stage_parameters,
    unclassified_keys,
)
from tests.distributed.rig import relative
from tests.world import RankPool

PP2_DP2 = zero(1, " pp2 dp2", pp=2, dp_shard=2)


@pytest.mark.parametrize(("zero_stage", "data_ranks"), [(1, 1), (0, 2)])
def test_bf16_has_the_gradients_and_the_curve_of_the_native_pipeline(
    ranks: RankPool, deepspeed_ranks: RankPool, zero_stage: int, data_ranks: int
) -> None:
    """Equal micro-batches, so that both round alike; gradients summed in bf16 would be 1e-3 off."""
    ours = native("bf16", pp=2, dp_replicate=data_ranks, precision="bf16")
    theirs = zero(zero_stage, pp=2, dp_shard=data_ranks, precision="bf16")
    want, reference = ranks.run(short_run, ours.config, size=ours.size)[0]
    got, gradients = deepspeed_ranks.run(short_run, theirs.config, size=theirs.size)[0]
    assert relative(got, want) < 1e-6
    assert max(d.error for d in compare_gradients(gradients, reference, step=1)) < 5e-6


def test_sizes_may_change_from_call_to_call(ranks: RankPool, deepspeed_ranks: RankPool) -> None:
    (want,) = ranks.run(changing_shapes, native("single").config, size=1)
    for got in deepspeed_ranks.run(changing_shapes, PP2_DP2.config, size=4):
        assert relative(got, want) < 1e-6


def test_ranks_hold_the_stages_of_the_native_plan(deepspeed_ranks: RankPool) -> None:
    model = PP2_DP2.config.model
    held = deepspeed_ranks.run(stage_parameters, PP2_DP2.config, size=4)
    assert held[0] == held[1]
    assert held[2] == held[3]
    assert sorted(held[0] + held[2]) == sorted(info.name for info in parameter_table(model))
    for names, layers in zip((held[0], held[2]), split_layers(model, 2), strict=True):
        found = {int(name.split(".")[2]) for name in names if ".layers." in name}
        assert found == set(layers)


def test_every_key_deepspeed_reads_is_passed_or_refused(deepspeed_ranks: RankPool) -> None:
    assert deepspeed_ranks.run(unclassified_keys, size=1) == [[]]
