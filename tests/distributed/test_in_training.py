"""The model that tasks see during training is the engine's, in every layout."""

import pytest

from tests.distributed.in_training import logits_on_the_way
from tests.distributed.layouts import LAYOUTS, SINGLE
from tests.world import RankPool


@pytest.mark.parametrize("name", ["fsdp2", "pp2 tp2", "deepspeed zero3 dp2"])
def test_logits_are_those_of_one_process(
    ranks: RankPool, deepspeed_ranks: RankPool, name: str
) -> None:
    layout = LAYOUTS[name]
    pool = {"native": ranks, "deepspeed": deepspeed_ranks}[layout.engine.kind]
    ((expected, losses),) = ranks.run(logits_on_the_way, SINGLE.config, size=1)
    for logits, others in pool.run(logits_on_the_way, layout.config, size=layout.size):
        assert others == pytest.approx(losses, rel=1e-5)
        for row, wanted in zip(logits, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)
