"""Configurations that the tests of rules and limits change field by field."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import yaml

from llmtrain.config.load import build, compose
from llmtrain.config.run import RunConfig

BASE = [
    "experiment=demo", "parallel=fsdp", "model.num_hidden_layers=4",
    "training.num_tokens=1e5", "schedule.warmup_tokens=0",
    "training.sequence_length=256", "training.global_batch_tokens=2048",
]  # fmt: skip


@pytest.fixture(scope="module")
def tree() -> dict[str, object]:
    return compose("train", BASE)


@pytest.fixture
def config(tree: dict[str, object]) -> Callable[..., RunConfig]:
    """The base with values set, without composing it again."""

    def changed(*overrides: str) -> RunConfig:
        copy: dict[str, Any] = deepcopy(tree)
        for override in overrides:
            path, _, value = override.partition("=")
            *names, last = path.split(".")
            place = copy
            for name in names:
                place[name] = place.get(name) or {}
                place = place[name]
            place[last] = yaml.safe_load(value)
        return build(RunConfig, copy)

    return changed
