"""Bodies that ranks run in the tests of DeepSpeed's ZeRO, and their layouts."""

import contextlib
import io
from dataclasses import replace
from typing import Any

import torch

from llmtrain.config.run import RunConfig
from llmtrain.engine.deepspeed.zero import ZeroEngine
from llmtrain.parallel.place import Place
from tests.distributed.layouts import LEARNING_RATE, Layout, zero
from tests.distributed.rig import REASONS, bad_step, rig, snapshot


def with_keys(layout: Layout, **keys: Any) -> Layout:
    """``layout`` with keys of DeepSpeed's own under ``zero_optimization``."""
    own = replace(layout.engine.deepspeed, config={"zero_optimization": keys})
    return replace(layout, engine=replace(layout.engine, deepspeed=own))


def cut(suffix: str, **fields: Any) -> Layout:
    """ZeRO 3 that keeps no parameter whole between uses, in several sub-groups."""
    keys = {"stage3_param_persistence_threshold": 60, "sub_group_size": 2000}
    return with_keys(zero(3, f" cut{suffix}", **{"dp_shard": 2, **fields}), **keys)


def refusals(place: Place, config: RunConfig) -> dict[str, bool]:
    """For every reason, whether a step was refused and left every bit as it was."""
    found = {}
    with rig(place, config) as r:
        r.train(range(2))
        for reason in REASONS:
            before = snapshot(r.engine)
            weights = r.engine.eval_step(r.batch(0)).loss_sum
            result = r.engine.train_step(*swapped(bad_step(r, reason)))
            same = all(torch.equal(before[k], v) for k, v in snapshot(r.engine).items())
            same = same and torch.equal(weights, r.engine.eval_step(r.batch(0)).loss_sum)
            found[reason] = same and not result.applied.item()
    return found


def swapped(step: tuple[Any, Any]) -> tuple[Any, float, Any]:
    """Arguments of train_step."""
    batch, limits = step
    return batch, LEARNING_RATE, limits


def held_elements(place: Place, config: RunConfig) -> int:
    """Number of parameters this rank updates, padding left out."""
    with rig(place, config) as r:
        assert isinstance(r.engine, ZeroEngine)
        portions = [t for name, t in r.engine.state_dict().items() if name.startswith("model.")]
        return sum(view.numel() for portion in portions for _, view in portion.chunks)


def printed(place: Place, config: RunConfig) -> str:
    """What making an engine, a step and closing it write on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out, rig(place, config) as r:
        r.train(range(1))
    return out.getvalue()
