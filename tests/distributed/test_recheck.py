"""The search finds a fault of the backward alone, and leaves the training as it was."""

import math
import socket
from dataclasses import replace

import pytest

from llmtrain.config.run import RunConfig
from tests.distributed.adapters import LORA, adapted
from tests.distributed.layouts import LAYOUTS, SHAPE, Layout, native, zero
from tests.distributed.precision import configured
from tests.distributed.rechecks import FAULTY_RANK, Checked, recheck
from tests.world import RankPool

FAULTY = [LAYOUTS[name] for name in ("fsdp2", "tp2", "pp2 1f1b")] + [zero(3, dp_shard=2)]

SOUND = [
    *FAULTY,
    native("dp2", dp_replicate=2),
    native("pp2 zbv", pp=2, schedule="zbv"),
    native("cp2 ring", cp=2, cp_method="ring"),
    native("fsdp2 recompute", dp_shard=2, recompute="full"),
    native("fsdp2 bf16", dp_shard=2, precision="bf16"),
    native("tied tp2 bf16", tp=2, model="tied", precision="bf16"),
    *(zero(stage, dp_shard=2) for stage in range(3)),
    zero(1, " bf16", dp_shard=2, precision="bf16"),
    zero(1, " pp2", pp=2),
]


def inside(layout: Layout) -> RunConfig:
    """``layout`` with updates in its backward, which take one micro-batch and no clip."""
    config = layout.config
    rows = SHAPE.rows // layout.size
    return replace(
        config,
        optimizer=replace(config.optimizer, in_backward=True, grad_clip_norm=math.inf),
        training=replace(config.training, micro_batch_size=rows),
    )


def compiled(layout: Layout) -> RunConfig:
    return replace(layout.config, engine=replace(layout.engine, compile=True))


VARIANTS = {
    "fsdp2 in backward": inside(native("", dp_shard=2)),
    "fsdp2 compiled": compiled(native("", dp_shard=2)),
    "fsdp2 fp8": configured({"dp_shard": 2}, fp8="tensorwise", fp8_all_gather=True),
    "fsdp2 lora": adapted(native("", dp_shard=2)),
    "dp2 nf4": adapted(native("", dp_replicate=2), replace(LORA, quantize_base="nf4")),
}


def ran(
    layout: Layout, ranks: RankPool, deepspeed_ranks: RankPool, *, faulty: bool
) -> list[Checked]:
    pool = {"native": ranks, "deepspeed": deepspeed_ranks}[layout.engine.kind]
    return pool.run(recheck, layout.config, faulty, size=layout.size)


@pytest.mark.parametrize("layout", FAULTY, ids=lambda layout: layout.name)
def test_rank_and_layer_of_a_wrong_backward_are_named(
    layout: Layout, ranks: RankPool, deepspeed_ranks: RankPool
) -> None:
    for rank in ran(layout, ranks, deepspeed_ranks, faulty=True):
        assert rank.found == [
            f"step 2: rank {FAULTY_RANK} on {socket.gethostname()} computed layer 1's gradient of "
            "mlp.up_proj.weight twice with other bits"
        ]
        assert rank.state == rank.untouched


@pytest.mark.parametrize("layout", SOUND, ids=lambda layout: layout.name)
def test_a_sound_layout_is_found_sound_and_trains_on_bit_by_bit(
    layout: Layout, ranks: RankPool, deepspeed_ranks: RankPool
) -> None:
    for rank in ran(layout, ranks, deepspeed_ranks, faulty=False):
        assert rank.found == []
        assert rank.state == rank.untouched


@pytest.mark.parametrize("name", VARIANTS)
def test_what_changes_blocks_is_found_sound(name: str, ranks: RankPool) -> None:
    for rank in ranks.run(recheck, VARIANTS[name], False, size=2):
        assert rank.found == []
        assert rank.state == rank.untouched
