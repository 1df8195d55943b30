"""What a mixture section may say, kind by kind, and the sentence about what it may not."""

from collections.abc import Callable

import pytest

from llmtrain.config.load import load, options
from llmtrain.config.mixture import (
    ConstantMixture,
    CurriculumMixture,
    name_problem,
)
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError

NEEDED = {
    "phases": "mixture.phases=[{until_tokens: 100, weights: {a: 1}}, {weights: {b: 1}}]",
    "curriculum": "mixture.order=[a, b]",
}


def mixture(*overrides: str) -> RunConfig:
    base = ["experiment=demo", "training.num_tokens=1e5", "data.sources={a: x, b: y}"]
    return load("train", [*base, *overrides], RunConfig)


def test_every_file_of_the_group_is_a_mixture() -> None:
    kinds = set()
    for name in options("mixture"):
        extra = [NEEDED[name]] if name in NEEDED else []
        kinds.add(mixture(f"mixture={name}", *extra).mixture.kind)
    assert kinds == {"constant", "temperature", "unimax", "phases", "curriculum", "adaptive"}


def test_weights_with_the_default_file_are_constant_shares() -> None:
    assert mixture("mixture.weights={a: 0.7, b: 0.3}").mixture == ConstantMixture(
        weights={"a": 0.7, "b": 0.3}
    )


def test_whole_numbers_are_ratios(config: Callable[..., RunConfig]) -> None:
    given = config("mixture.weights={a: 3, b: 4}").mixture
    assert given == ConstantMixture(weights={"a": 3.0, "b": 4.0})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{kind: constant, weights: {a: 0.7, b: 0.5}}",
            "mixture.weights sums to 1.2; use shares that sum to 1, for example "
            "{a: 0.583333, b: 0.416667}, or whole numbers as ratios",
        ),
        (
            "{kind: constant, weights: {a: 0, b: 1}}",
            "mixture.weights.a=0.0 must be above 0 and finite",
        ),
        ("{kind: adaptive, weights: {a: -1}}", "mixture.weights.a=-1.0 must be above 0"),
        ("{kind: constant, max_epochs: 0}", "mixture.max_epochs=0.0 must be above 0"),
        (
            "{kind: temperature, weights: {a: 1}}",
            "mixture.weights has no meaning for kind=temperature; use one of kind, temperature",
        ),
        ("{kind: temperature, temperature: 0}", "mixture.temperature=0.0 must be above 0"),
        ("{kind: unimax, max_epochs: null}", "mixture.max_epochs=null is not a number"),
        ("{kind: doremi}", "mixture.kind=doremi is not a choice; use one of constant"),
        ("{kind: phases}", "mixture.phases is required"),
        ("{kind: phases, phases: []}", "mixture.phases is empty; give at least one"),
        (
            "{kind: phases, phases: [{weights: {a: 1}}, {weights: {b: 1}}]}",
            "mixture.phases[0].until_tokens=null, but 1 phases follow",
        ),
        (
            "{kind: phases, phases: [{until_tokens: 9, weights: {a: 1}}, "
            "{until_tokens: 9, weights: {b: 1}}, {weights: {b: 1}}]}",
            "mixture.phases[1].until_tokens=9 is not after phases[0].until_tokens=9; put the",
        ),
        (
            "{kind: phases, phases: [{weights: {a: 1}, interpolation: linear}]}",
            "mixture.phases[0].interpolation=linear, but no phase follows",
        ),
        (
            "{kind: phases, phases: [{weights: {a: 0.5, b: 0.2}}]}",
            "mixture.phases[0].weights sums to 0.7; use shares that sum to 1",
        ),
        (
            "{kind: phases, phases: [{weights: {a: 0}}]}",
            "mixture.phases[0].weights gives no source a share",
        ),
        (
            "{kind: phases, phases: [{until_tokens: 0, weights: {a: 1}}]}",
            "mixture.phases[0].until_tokens=0 must be at least 1",
        ),
        ("{kind: curriculum, order: [a, a]}", "mixture.order names a twice"),
        (
            "{kind: curriculum, order: [a, b], overlap: 1.5}",
            "mixture.overlap=1.5 must be between 0 and 1",
        ),
        ("{kind: adaptive, exploration: 2}", "mixture.exploration=2.0 must be at most 1"),
        ("{kind: adaptive, learning_rate: 0}", "mixture.learning_rate=0.0 must be above 0"),
    ],
)
def test_what_is_no_mixture_is_refused(
    config: Callable[..., RunConfig], section: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config(f"mixture={section}")
    (found,) = error.value.problems
    assert found.startswith(message)


def test_names_are_told_with_the_field_that_gives_them(config: Callable[..., RunConfig]) -> None:
    phases = "{until_tokens: 9, weights: {a: 1, b: 0}}, {weights: {c: 1}}"
    mixed = config(f"mixture={{kind: phases, phases: [{phases}]}}").mixture
    assert name_problem(mixed, "ac") is None
    assert name_problem(mixed, "ab") == (
        "mixture.phases[1].weights names c, no source of data.sources; mixture.phases gives no "
        "share to the source b; name exactly the sources: a, b"
    )
    assert name_problem(CurriculumMixture(order=("b", "a")), ["a", "b"]) is None
    assert name_problem(ConstantMixture(), []) is None
    assert name_problem(ConstantMixture(weights={"a": 1}), []) == (
        "mixture.weights names a, no source of data.sources; name exactly the sources: none"
    )
