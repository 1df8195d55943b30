"""What may change when a run goes on, and how a run without a name is called."""

from functools import cache
from typing import Any

from llmtrain.config.load import from_yaml, load, to_yaml
from llmtrain.config.resume import changes, identity
from llmtrain.config.run import RunConfig

BASE = ["experiment=demo", "data.sources.a=/a", "data.sources.b=/b"]


@cache
def demo(*overrides: str) -> RunConfig:
    return load("train", [*BASE, *overrides], RunConfig)


def test_a_change_is_fatal_or_allowed_by_the_mark_of_its_field() -> None:
    before = from_yaml(to_yaml(demo()))
    fatal, allowed = changes(
        before,
        demo(
            "training.seed=1", "optimizer.lr=1e-4", "parallel=fsdp", "model.num_hidden_layers=2",
            "model.rope_scaling={kind: linear, factor: 2}",
            "name=other", "mixture.weights={a: 1, b: 2}",
        ),
    )  # fmt: skip
    assert "training.seed: 0 -> 1" in fatal
    assert "model.num_hidden_layers: 3 -> 2" in fatal
    assert "model.rope_scaling.factor: absent -> 2.0" in fatal
    assert "mixture.weights.a: absent -> 1.0" in fatal
    assert "optimizer.lr: 0.003 -> 0.0001" in allowed
    assert "parallel.pp: 2 -> 1" in allowed
    assert not any("name" in line for line in [*fatal, *allowed])


def test_a_store_may_move_but_sources_may_not_come_and_go() -> None:
    before = from_yaml(to_yaml(demo()))
    assert changes(before, demo()) == ([], [])
    assert changes(before, demo("data.sources.b=/new")) == ([], ["data.sources.b: /b -> /new"])
    assert changes(before, demo("data.sources.c=/c"))[0] == ["data.sources.c: absent -> /c"]


def test_a_field_that_an_older_run_did_not_have_stands_for_its_default() -> None:
    before: dict[str, Any] = dict(from_yaml(to_yaml(demo())))
    model, parallel = dict(before["model"]), dict(before["parallel"])
    del model["attn_logit_softcapping"], parallel["reduce_every_microbatch"]
    older = {**before, "model": model, "parallel": parallel}
    assert changes(older, demo()) == ([], [])
    (line,) = changes(older, demo("model.attn_logit_softcapping=50"))[0]
    assert line == "model.attn_logit_softcapping: null -> 50.0"


def test_only_fatal_fields_name_a_run() -> None:
    assert identity(demo()) == identity(demo("optimizer.lr=1", "parallel=fsdp", "name=x"))
    assert identity(demo()) != identity(demo("training.seed=1"))
    assert identity(demo()) != identity(demo("data.sources.b=/new"))
