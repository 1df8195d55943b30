"""Refused steps change nothing; what one layout saves another continues."""

from pathlib import Path

import pytest

from tests.distributed.layouts import gated, load, load_incomplete, relative, save, size_of
from tests.world import RankPool


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("single", "not finite"),
        ("single", "loss"),
        ("single", "grad_norm"),
        ("dp2", "not finite"),
        ("fsdp2", "loss"),
        ("pp2_1f1b", "not finite"),
        ("fsdp2_pp2", "grad_norm"),
    ],
)
def test_refused_step_changes_no_bit(layout: str, reason: str, ranks: RankPool) -> None:
    for refused, same, with_it, without in ranks.run(gated, layout, reason, size=size_of(layout)):
        assert refused
        assert same
        assert with_it == without


@pytest.mark.parametrize(
    ("saved_on", "loaded_on", "precision"),
    [
        ("single", "fsdp2_pp2", "fp32"),
        ("fsdp4", "pp2_gpipe", "fp32"),
        ("dp2_pp2", "single", "fp32"),
        ("fsdp2_pp2", "hsdp2x2", "fp32"),
        ("hsdp2x2", "dp2", "fp32"),
        ("pp2_1f1b", "fsdp2", "bf16"),
        ("fsdp2", "single", "bf16"),
    ],
)
def test_next_losses_after_loading_on_another_layout(
    saved_on: str, loaded_on: str, precision: str, ranks: RankPool, tmp_path: Path
) -> None:
    folder = str(tmp_path / "saved")
    want = ranks.run(save, saved_on, precision, folder, size=size_of(saved_on))[0]
    got = ranks.run(load, loaded_on, precision, folder, size=size_of(loaded_on))[0]

    tolerance = 1e-6 if precision == "fp32" else 1e-5
    assert relative(got, want) <= tolerance


def test_same_layout_continues_bit_by_bit(ranks: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    want = ranks.run(save, "fsdp2_pp2", "fp32", folder, size=4)[0]

    assert ranks.run(load, "fsdp2_pp2", "fp32", folder, size=4)[0] == want


def test_incomplete_state_is_refused(ranks: RankPool) -> None:
    message = ranks.run(load_incomplete, "single", size=1)[0]
    assert message.startswith(
        "the checkpoint lacks 1 tensors of this model, first model.model.norm.weight;"
    )
