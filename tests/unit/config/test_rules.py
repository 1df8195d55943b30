"""Rules that cross sections, and which layout a number of processes gives."""

from collections.abc import Callable

import pytest

from llmtrain.config.parallel import ParallelConfig, implied_world_size, resolve_dp
from llmtrain.config.run import RULES, RunConfig, broken_rules, check
from llmtrain.errors import ConfigError, LayoutError

DPO = ("training.objective=dpo", "data.packing=best_fit")


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, [*DPO, "training.dpo.beta=0.5", "parallel.tp=2"]),
        (8, []),
        (4, ["parallel.pp=2", "parallel.dp_replicate=2"]),
        (8, ["parallel.pp=2", "parallel.dp_replicate=2", "parallel.dp_shard=2"]),
        (None, ["parallel.pp=4"]),
        (2, ["parallel.pp=2", "model.tie_word_embeddings=true"]),
        (8, ["parallel.pp=2", "parallel.cp=2", "parallel.tp=2", "parallel.cp_method=ring"]),
        (1, ["data.sources.a=x", "mixture.weights.a=1"]),
    ],
)
def test_what_fits_is_not_refused(
    config: Callable[..., RunConfig], world_size: int | None, overrides: list[str]
) -> None:
    assert broken_rules(config(*overrides), world_size) == []


REFUSED = [
    (1, ["training.global_batch_tokens=1000"], "use 1024"),
    (1, ["training.sequence_length=1024"], "use a sequence_length of at most 512"),
    (
        1,
        ["training.batch_ramp=[{until_tokens: 9000, global_batch_tokens: 1000}]"],
        "training.batch_ramp[0].global_batch_tokens=1000 is no multiple of",
    ),
    (
        1,
        ["training.length_ramp=[{until_tokens: 9000, sequence_length: 100}]"],
        "training.length_ramp[0].sequence_length=100 does not divide training",
    ),
    (
        1,
        ["training.batch_ramp=[{until_tokens: 1000000000, global_batch_tokens: 1024}]"],
        "training.batch_ramp[0].until_tokens=1000000000 is not before the end",
    ),
    (1, ["mixture.weights.a=1", "data.sources.b=x"], "name exactly the sources: b"),
    (
        1,
        ["mixture={kind: curriculum, order: [b, a]}", "data.sources={a: x, c: y}"],
        "mixture.order names b, no source of data.sources; mixture.order gives no share to the",
    ),
    (
        1,
        ["mixture={kind: phases, phases: [{weights: {a: 1}}]}", "data.sources={a: x, c: y}"],
        "mixture.phases gives no share to the source c",
    ),
    (
        1,
        [
            "mixture={kind: phases, phases: [{until_tokens: 100000, weights: {a: 1}}, "
            "{weights: {a: 1}}]}",
            "data.sources.a=x",
        ],
        "mixture.phases[0].until_tokens=100000 is not before the end of the run",
    ),
    (
        1,
        [
            "mixture={kind: phases, phases: [{until_tokens: 90000, weights: {a: 1}}]}",
            "data.sources.a=x",
        ],
        "ends the last phase, the run ends at training.num_tokens=100000; use until_tokens=null",
    ),
    (
        1,
        ["mixture={kind: adaptive, interval_tokens: 6000}"],
        "mixture.interval_tokens=6000 is less than data.prefetch_batches + 2 = 4 batches",
    ),
    (
        1,
        [
            "mixture={kind: adaptive, interval_tokens: 8192}",
            "training.batch_ramp=[{until_tokens: 4096, global_batch_tokens: 4096}]",
        ],
        "batches of training.global_batch_tokens=4096; use at least 16384",
    ),
    (
        1,
        ["data.skip_steps=[[2, 3], [900000, 900001]]"],
        "data.skip_steps holds [900000, 900001], the run ends with step ",
    ),
    (
        1,
        [
            "guard.on_spike=[skip]",
            "optimizer.in_backward=true",
            "optimizer.grad_clip_norm=.inf",
            "training.micro_batch_size=8",
        ],
        "guard.on_spike=[skip] skips whole updates, with optimizer.in_backward=true they are made",
    ),
    (
        1,
        ["training.objective=dpo"],
        "objective=dpo: data.packing=concat cuts pairs; use data.packing",
    ),
    (
        1,
        [*DPO, "data.fim={rate: 0.5, prefix_id: 1, middle_id: 2, suffix_id: 3}"],
        "objective=dpo: data.fim rearranges text",
    ),
    (
        1,
        [*DPO, "training.length_ramp=[{until_tokens: 9000, sequence_length: 128}]"],
        "objective=dpo: training.length_ramp cuts pairs",
    ),
    (
        1,
        [*DPO, "training.z_loss_weight=0.1"],
        "training.z_loss_weight=0.1 has no meaning for pairs",
    ),
    (1, ["schedule.warmup_tokens=1000000"], "is longer than training.num_tokens=100000"),
    (
        1,
        ["data.fim={rate: 0.5, prefix_id: 1, middle_id: 2, suffix_id: 900000}"],
        "data.fim has id 900000, model.vocab_size=",
    ),
    (
        1,
        ["checkpoint.keep_best=2", "evaluation.every_steps=3", "data.validation.web=stores/web"],
        "set data.validation.NAME=DIR, and an evaluation.every_steps that divides checkpoint.",
    ),
    (
        1,
        [
            "checkpoint.keep_best=1",
            "evaluation.every_steps=100",
            "checkpoint.every_steps=500",
            "data.validation.web=stores/web",
            "checkpoint.best_metric=validation_loss/code",
        ],
        "checkpoint.best_metric=validation_loss/code names no store of data.validation; use one",
    ),
    (
        1,
        ["evaluation.tasks=[capitals]", "evaluation.tasks_every_steps=10"],
        "evaluation.tasks=['capitals'] found with tokenizer.path=null, tasks are texts",
    ),
    (1, ["name=''"], "name='' names no folder inside runs_dir=runs"),
    (1, ["name=/tmp/x"], "name='/tmp/x' names no folder"),
    (1, ["name=../x"], "name='../x' names no folder"),
]
"""Processes, overrides, part of the one message."""


@pytest.mark.parametrize(("world_size", "overrides", "message"), REFUSED)
def test_each_rule_says_what_to_change(
    config: Callable[..., RunConfig], world_size: int, overrides: list[str], message: str
) -> None:
    (found,) = broken_rules(config(*overrides), world_size)
    assert message in found


def test_the_shapes_of_a_ramp_are_checked_like_the_last(
    config: Callable[..., RunConfig],
) -> None:
    ramp = "training.batch_ramp=[{until_tokens: 9000, global_batch_tokens: 1024}]"
    (found,) = broken_rules(config(ramp, "parallel.dp_shard=8"), 8)
    assert found.startswith("on the ramps of training, training.global_batch_tokens=1024 is 4 rows")
    ramp = "training.length_ramp=[{until_tokens: 9000, sequence_length: 2}]"
    (found,) = broken_rules(config(ramp, "parallel.cp=2"), 2)
    assert "training.sequence_length=2" in found


def test_every_rule_is_tested_above(config: Callable[..., RunConfig]) -> None:
    broken = {
        rule
        for world_size, overrides, _ in REFUSED
        for rule in RULES
        if rule(config(*overrides), world_size) is not None
    }
    assert broken == set(RULES)


def test_check_raises_all_at_once(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config("parallel.pp=6", "training.sequence_length=1024"), 4)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("parallel", "world_size", "shard"),
    [
        (ParallelConfig(), 1, 1),
        (ParallelConfig(), 8, 8),
        (ParallelConfig(pp=2), 8, 4),
        (ParallelConfig(pp=2, dp_replicate=2), 4, 1),
        (ParallelConfig(dp_shard=2, dp_replicate=3), 6, 2),
    ],
)
def test_auto_takes_the_ranks_that_are_left(
    parallel: ParallelConfig, world_size: int, shard: int
) -> None:
    assert resolve_dp(parallel, world_size)[1] == shard


def test_a_layout_that_does_not_fit_names_a_way_out() -> None:
    with pytest.raises(LayoutError, match=r"use parallel\.dp_shard=auto"):
        resolve_dp(ParallelConfig(dp_shard=3), 4)
    with pytest.raises(LayoutError, match="dp_replicate that divides 4"):
        resolve_dp(ParallelConfig(dp_replicate=3), 4)
    assert implied_world_size(ParallelConfig(pp=2, dp_shard=3)) == 6
    assert implied_world_size(ParallelConfig(pp=2)) == 2
