"""fp8, parameters and moments in bf16: on several ranks, and when a run goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.precision import configured, curve, load, save, start
from tests.distributed.rig import relative
from tests.distributed.states import read
from tests.world import RankPool

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

FSDP = {"dp_shard": 2}
NO_MASTERS = {"master_dtype": "bf16", "state_dtype": "bf16"}
GATHERED = {"fp8": "tensorwise", "fp8_all_gather": True}
STEPS = 3


def bits(values: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in values.items()}


def run(
    ranks: RankPool, size: int, parallel: dict[str, Any] | None = None, **fields: Any
) -> tuple[list[float], dict[str, bytes]]:
    config = configured(parallel, **fields)
    losses, parameters = ranks.run(curve, config, STEPS, size=size)[0]
    return losses, bits(parameters)


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> tuple[list[float], dict[str, bytes]]:
    """What one rank without masters does."""
    return run(ranks, 1, **NO_MASTERS)


@pytest.mark.parametrize(
    "parallel", [FSDP, {"dp_replicate": 2}, {"pp": 2}, {**FSDP, "cpu_offload": True}]
)
def test_stochastic_rounding_gives_the_same_bits_on_every_layout(
    parallel: dict[str, Any], alone: tuple[list[float], dict[str, bytes]], ranks: RankPool
) -> None:
    assert run(ranks, 2, parallel, **NO_MASTERS) == alone


def test_tensor_parallel_ranks_agree_up_to_the_rounding_of_bf16(
    alone: tuple[list[float], dict[str, bytes]], ranks: RankPool
) -> None:
    cut, _ = run(ranks, 2, {"tp": 2}, **NO_MASTERS)
    assert relative(cut, alone[0]) < 1e-3


def test_a_run_goes_on_bit_by_bit_on_one_rank_and_on_two(ranks: RankPool, tmp_path: Path) -> None:
    two, one = configured(FSDP, **NO_MASTERS), configured(**NO_MASTERS)
    losses, parameters = ranks.run(save, two, str(tmp_path / "saved"), size=2)[0]
    saved = read(tmp_path / "saved")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    kept = [value for name, value in saved.items() if name != "optim.step"]
    assert all(torch.equal(value, value.bfloat16().float()) for value in kept)
    for config, size in ((two, 2), (one, 1)):
        again = tmp_path / f"again-{size}"
        found = ranks.run(load, config, str(tmp_path / "saved"), str(again), size=size)[0]
        assert found[0] == losses
        assert bits(found[1]) == bits(parameters)
        assert bits(read(again)) == bits(saved)


def test_fp8_changes_no_start_value_and_no_name(ranks: RankPool) -> None:
    plain = ranks.run(start, configured(precision="fp32"), size=1)
    assert ranks.run(start, configured(fp8="rowwise"), size=1) == plain
    assert ranks.run(start, configured(FSDP, **GATHERED), size=2) == plain * 2


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_gives_the_same_losses_on_every_layout(recipe: str, ranks: RankPool) -> None:
    """To 1e-6 where products are the same; fused AdamW's last bit depends on where a shard ends."""
    alone, _ = run(ranks, 1, fp8=recipe)
    assert relative(alone, run(ranks, 1)[0]) > 1e-5
    for parallel in (FSDP, {"pp": 2}):
        assert relative(run(ranks, 2, parallel, fp8=recipe)[0], alone) < 1e-6
    assert relative(run(ranks, 1, {"recompute": "selective"}, fp8=recipe)[0], alone) < 1e-6
    cut, _ = run(ranks, 2, {"tp": 2}, fp8=recipe)
    assert relative(cut, alone) < 2e-3  # scales and sums over the parts of a matrix


def test_weights_gathered_in_fp8_are_rounded_once(ranks: RankPool, tmp_path: Path) -> None:
    """They come from fp32, not by way of bf16: other bits, losses that agree."""
    plain, _ = run(ranks, 2, FSDP, fp8="tensorwise")
    found = run(ranks, 2, FSDP, **GATHERED)
    assert found[0] != plain
    assert relative(found[0], plain) < 2e-3

    config = configured(FSDP, **GATHERED)
    saved, again = str(tmp_path / "saved"), str(tmp_path / "again")
    losses, parameters = ranks.run(save, config, saved, size=2)[0]
    found_losses, found_parameters = ranks.run(load, config, saved, again, size=2)[0]
    assert found_losses == losses
    assert bits(found_parameters) == bits(parameters)
