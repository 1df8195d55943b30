"""A run restored at any step goes on with the batches it would have had: whatever moves them."""

import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cli import main
from llmtrain.config.data import DataConfig
from llmtrain.config.mixture import (
    AdaptiveMixture,
    CurriculumMixture,
    MixtureConfig,
    MixturePhase,
    PhasesMixture,
    TemperatureMixture,
)
from llmtrain.config.model import ModelConfig
from llmtrain.config.ramp import BatchStage, LengthStage
from llmtrain.config.run import RunConfig, broken_rules
from llmtrain.config.training import TrainingConfig
from llmtrain.data.journal import from_plain
from llmtrain.data.loader import Batches
from llmtrain.data.plan import BatchPlan, plan_of
from llmtrain.data.store import TokenStore
from tests.stores import random_documents, write_store

LENGTH = 8
NUM_TOKENS = 3_000
STEP_TOKENS = 8 * LENGTH

PHASES = PhasesMixture(
    phases=(
        MixturePhase(until_tokens=700, weights={"a": 1}),
        MixturePhase(until_tokens=2000, weights={"a": 3, "b": 1}, interpolation="linear"),
        MixturePhase(weights={"a": 1, "b": 3}),
    )
)
MIXTURES: Sequence[MixtureConfig] = (
    TemperatureMixture(temperature=3.0),
    PHASES,
    CurriculumMixture(order=("b", "a")),
    AdaptiveMixture(interval_tokens=4 * STEP_TOKENS, learning_rate=3.0),
)
BATCH_RAMP = (
    BatchStage(until_tokens=300, global_batch_tokens=2 * LENGTH),
    BatchStage(until_tokens=900, global_batch_tokens=4 * LENGTH),
)
LENGTH_RAMP = (
    LengthStage(until_tokens=500, sequence_length=2),
    LengthStage(until_tokens=1500, sequence_length=4),
)
MODEL = ModelConfig(
    vocab_size=32_000, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def make_stores(folder: Path, seed: int) -> dict[str, TokenStore]:
    stores = {}
    for number, (name, count) in enumerate({"a": 40, "b": 15}.items()):
        documents = random_documents(count, 12, seed=seed + number)
        stores[name] = write_store(folder / name, documents, num_shards=2)
        words = ["pack", f"store={folder / name}", f"sequence_length={LENGTH}"]
        assert main(words) == 0
    return stores


def losses_after(plan: BatchPlan, step: int) -> list[tuple[float, float]] | None:
    """What a loop would hand to an adaptive mixture after ``step`` steps, if it is due."""
    schedule = plan.mixture.schedule
    due = getattr(schedule, "decides_after", None)
    if due is None or plan.first_unit(step) < due:
        return None
    return [(3.0 + step % 5, 1.0), (4.0 - step % 3, 1.0)]


def assert_equal(one: Any, other: Any) -> None:
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@settings(max_examples=8)
@given(
    mixture=st.sampled_from(MIXTURES),
    packing=st.sampled_from(["concat", "best_fit"]),
    batch_ramp=st.booleans(),
    length_ramp=st.booleans(),
    skips=st.sampled_from([(), ((5, 5), (9, 12))]),
    seed=st.integers(0, 1000),
)
def test_restored_at_every_step_gives_the_same_tail(
    mixture: MixtureConfig,
    packing: Any,
    batch_ramp: bool,
    length_ramp: bool,
    skips: tuple[tuple[int, int], ...],
    seed: int,
) -> None:
    training = TrainingConfig(
        num_tokens=NUM_TOKENS, sequence_length=LENGTH, global_batch_tokens=STEP_TOKENS, seed=seed,
        batch_ramp=BATCH_RAMP if batch_ramp else (),
        length_ramp=LENGTH_RAMP if length_ramp else (),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(Path(folder), seed)
        config = RunConfig(
            model=MODEL, training=training, mixture=mixture,
            data=DataConfig(
                sources={name: str(store.path) for name, store in stores.items()},
                packing=packing, skip_steps=skips,
            ),
        )  # fmt: skip
        assert broken_rules(replace(config, training=replace(training, micro_batch_size=2))) == []
        plan = plan_of(config, stores)
        with Batches(plan, micro_batch_size=2, prefetch=2) as batches:
            for step in range(training.num_steps):
                batch = batches.at(step)
                fresh = plan_of(config, stores, from_plain(plan.journal.to_plain()))
                assert fresh.fingerprint == plan.fingerprint
                assert fresh.batch_hash(step) == plan.batch_hash(step)
                assert_equal(batch, Batches(fresh, micro_batch_size=2, prefetch=0).at(step))
                if (losses := losses_after(plan, step + 1)) is not None:
                    plan.decide(losses)
