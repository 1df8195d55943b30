"""Layouts train a model with an adapter as one process does, and keep nothing for the rest."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.run import broken_rules
from tests.distributed.adapters import LORA, Trained, adapted, go_on, train
from tests.distributed.layouts import Layout, native
from tests.world import RankPool

STEPS = 5
LAYOUTS = [
    native("fsdp2", dp_shard=2),
    native("dp2", dp_replicate=2),
    native("pp2", pp=2),
    native("tp2", tp=2),
    native("cp2", cp=2),
    native("pp2 zbv", pp=2, schedule="zbv"),
    native("tied pp2", model="tied", pp=2),
    native("muon fsdp2", optimizer="muon", dp_shard=2),
    native("pp2 fsdp2 bf16", pp=2, dp_shard=2, precision="bf16"),
]
NF4 = replace(LORA, quantize_base="nf4")
IN_4_BITS = [
    native("dp2 nf4", dp_replicate=2),
    native("pp2 nf4 bf16", pp=2, precision="bf16"),
    native("cp2 nf4 recompute", cp=2, recompute="full"),
]
ALONE: dict[tuple[str, AdapterConfig], Trained] = {}


def alone(ranks: RankPool, layout: Layout, adapter: AdapterConfig) -> Trained:
    row = layout.reference
    if (row.name, adapter) not in ALONE:
        (ALONE[row.name, adapter],) = ranks.run(train, adapted(row, adapter), STEPS, size=1)
    return ALONE[row.name, adapter]


@pytest.mark.parametrize(
    ("layout", "adapter"),
    [*((row, LORA) for row in LAYOUTS), *((row, NF4) for row in IN_4_BITS)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_adapters_train_alike(ranks: RankPool, layout: Layout, adapter: AdapterConfig) -> None:
    config = adapted(layout, adapter)
    assert broken_rules(config, layout.size) == []
    want = alone(ranks, layout, adapter)
    results = ranks.run(train, config, STEPS, size=layout.size)
    got = results[0]
    rounded = layout.engine.precision == "bf16"
    assert got.losses == pytest.approx(want.losses, rel=1e-5 if rounded else 1e-6)
    assert all(other.losses == got.losses for other in results)
    assert got.gradients.keys() == want.gradients.keys()
    assert all(".lora_" in name for name in got.gradients)
    for name, gradient in want.gradients.items():
        error = (got.gradients[name] - gradient).norm() / gradient.norm()
        assert error < (0.05 if rounded else 5e-6), name
    for name, value in want.parameters.items():
        if ".lora_" not in name:
            assert torch.equal(got.parameters[name], value), name


def test_the_base_has_no_gradient_and_no_state(ranks: RankPool) -> None:
    (one,) = ranks.run(train, adapted(native("one")), STEPS, size=1)
    assert one.holders
    assert all(".lora_" in name for name in one.holders)
    assert one.states == len(one.holders) == len(one.gradients)
    assert math.isfinite(one.norms[-1])


def test_a_checkpoint_goes_on_under_any_layout(ranks: RankPool, tmp_path: Path) -> None:
    rows = [native("fsdp2", dp_shard=2), native("pp2", pp=2), native("tp2", tp=2), native("one")]
    found = []
    for number, row in enumerate(rows):
        steps = range(2 * number, 2 * number + 2)
        found += ranks.run(go_on, adapted(row), str(tmp_path), steps, size=row.size)[0]
    (want,) = ranks.run(go_on, adapted(rows[-1]), str(tmp_path / "one"), range(8), size=1)
    assert found == pytest.approx(want, rel=1e-6)


def test_a_base_in_4_bits_is_the_same_after_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    row, whole = native("one"), str(tmp_path / "whole")
    parts = [
        *ranks.run(go_on, adapted(row, NF4), str(tmp_path), range(3), size=1)[0],
        *ranks.run(go_on, adapted(native("dp2", dp_replicate=2), NF4), str(tmp_path),
                   range(3, 5), size=2)[0],
    ]  # fmt: skip
    (want,) = ranks.run(go_on, adapted(row, NF4), whole, range(5), size=1)
    assert parts[:3] == want[:3]
    assert parts == pytest.approx(want, rel=1e-6)
