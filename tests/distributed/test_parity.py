"""``llmtrain parity`` runs its own ranks, prints the worst last, and fails beyond the tolerance."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain import parity
from llmtrain.config.commands import ParityConfig
from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import TrainingConfig
from llmtrain.errors import LayoutError
from tests.distributed.layouts import MODEL
from tests.world import RankPool

CONFIG = ParityConfig(
    model=MODEL,
    parallel=ParallelConfig(dp_shard=1),
    engine=EngineConfig(device="cpu", precision="fp64"),
    training=TrainingConfig(num_tokens=64, sequence_length=16, global_batch_tokens=64),
    tolerance=1e-12,
    steps=3,
)


def test_pipeline_against_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ParallelConfig(pp=2, dp_shard=1, schedule="zbv")
    assert parity.main(dataclasses.replace(CONFIG, parallel=layout)) == 0

    *_, summary, last = capsys.readouterr().out.splitlines()
    assert summary.startswith("losses of 3 steps: worst ")
    assert last.startswith("parity: worst ")
    assert float(last.split()[2]) <= 1e-12


def test_deepspeed_against_the_native_engine_on_one_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, deepspeed_ranks: RankPool
) -> None:
    """In ranks that live: those of the test above are processes of parity's own."""

    def run_ranks(body: Callable[..., None], size: int, store: Path, *given: object) -> None:
        deepspeed_ranks.run(body, *given, size=size)

    monkeypatch.setattr(parity, "run_ranks", run_ranks)
    config = dataclasses.replace(
        CONFIG,
        parallel=ParallelConfig(dp_shard=2),
        engine=EngineConfig(
            kind="deepspeed", device="cpu", deepspeed=DeepSpeedConfig(zero_stage=2)
        ),
        tolerance=5e-6,
    )
    assert parity.main(config) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("parity: worst ")


def test_wrong_gradient_fails_and_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_steps = parity.run_steps
    runs = iter([1.0 + 1e-9, 1.0])

    def off_in_one(config: ParityConfig, place: parity.Place) -> list[parity.StepNumbers]:
        steps, factor = run_steps(config, place), next(runs)
        steps[0].gradients["lm_head.weight"].mul_(factor)
        return steps

    monkeypatch.setattr(parity, "run_steps", off_in_one)

    assert parity.main(dataclasses.replace(CONFIG, steps=1)) == 1
    *_, summary, last = capsys.readouterr().out.splitlines()
    assert summary.endswith("gradients: worst 1.000e-09 at lm_head.weight")
    assert last == "parity: worst 1.000e-09 at lm_head.weight"


def test_negligible_gradient_is_measured_against_the_global_norm() -> None:
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-9, 0.0])}
    got = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 1e-9])}

    errors = {d.name: d.error for d in parity.compare_gradients(got, want, step=1)}

    assert errors["a"] == 0.0
    assert errors["b"] == pytest.approx(2**0.5 * 1e-9 / 5.0)


def test_not_a_number_is_the_worst() -> None:
    good = [parity.StepNumbers(loss=1.0, gradients={"a": torch.ones(2), "b": torch.ones(2)})]
    bad = [
        parity.StepNumbers(loss=1.5, gradients={"a": torch.ones(2), "b": torch.ones(2) * torch.nan})
    ]

    worst = parity.compare(bad, good)[0]

    assert worst.name == "b"
    assert not worst.error <= 1e9


def test_lost_parameter_is_refused() -> None:
    with pytest.raises(LayoutError, match="1 parameters are on one side only, the first is b"):
        parity.compare_gradients({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 1)
