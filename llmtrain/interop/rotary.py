"""Rotary positions as Hugging Face configs and matrices have them.

A config says them in ``rope_parameters`` (transformers 5) or in ``rope_theta`` and
``rope_scaling`` (before). Where a family turns a part of each head, its dims turn in adjacent pairs
(2i, 2i + 1) and the others follow; here dim i turns with dim i + H / 2 always, and pairs that do
not turn come last (ops/rope.py). The rows of the query and key projections are put in that order:
all scores stay what they are.

    values, used = read_rope(config_json, problems)
    order = head_order(head_size=128, rotary_size=64)    # our dim i is their dim order[i]
"""

import math
from collections.abc import Mapping
from typing import Any

from llmtrain.config.model import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    YarnRopeScaling,
)
from llmtrain.config.strict import show

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
    ),
}  # fmt: skip
"""Kinds of scaling that both sides have, with their fields."""
_GENERAL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_OF_YARN = ("mscale", "mscale_all_dim", "truncate")
DEFAULT_THETA = 10000.0
"""Base of the frequencies where a config names none."""


def head_order(head_size: int, rotary_size: int) -> list[int]:
    """Return for each dim of a head here which dim of a head it is in adjacent pairs."""
    turned = rotary_size // 2
    still = (head_size - rotary_size) // 2
    first = [2 * i for i in range(turned)] + [rotary_size + i for i in range(still)]
    second = [2 * i + 1 for i in range(turned)] + [rotary_size + still + i for i in range(still)]
    return first + second


def read_rope(values: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], set[str]]:
    """Translate; returns fields of ModelConfig and the names of the fields that say them."""
    used = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        problems.append(
            f"config.json has rope_parameters of their own for {', '.join(rope)}; one set for all "
            "layers is what this model has: use another checkpoint"
        )
        rope = {}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    found = {
        "rope_theta": DEFAULT_THETA if theta is None else theta,
        "partial_rotary_factor": 1.0 if share is None else share,
        "rope_scaling": _scaling(rope, values, problems),
    }
    return found, used


def _scaling(
    rope: Mapping[str, Any], values: Mapping[str, Any], problems: list[str]
) -> dict[str, Any] | None:
    """Translate the scaling; None where there is none or it is refused."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _FIELDS:
        problems.append(
            f"config.json has rope_type={show(kind)}, known are {', '.join(_FIELDS)}; use another "
            "checkpoint"
        )
        return None
    known = {*_GENERAL, *_FIELDS[kind], *(_OF_YARN if kind == "yarn" else ())}
    if kind == "default":
        known.add("original_max_position_embeddings")
    problems += [
        f"config.json has {name}={show(rope[name])} in its rope parameters, which rope_type={kind} "
        "has no use for here; use another checkpoint"
        for name in sorted(rope.keys() - known)
        if rope[name] is not None
    ]
    if kind == "default":
        return None
    found = {name: rope[name] for name in _FIELDS[kind] if rope.get(name) is not None}
    if "original_max_position_embeddings" in _FIELDS[kind]:
        length = values.get("max_position_embeddings")
        found.setdefault("original_max_position_embeddings", length)
    if kind == "yarn":
        _read_yarn(rope, values, found, problems)
    return {"kind": kind, **found}


def _read_yarn(
    rope: Mapping[str, Any],
    values: Mapping[str, Any],
    found: dict[str, Any],
    problems: list[str],
) -> None:
    """Fill in what a config may leave open: the factor, and the factor on the scores."""
    if rope.get("truncate", True) is not True:
        problems.append(
            "config.json has truncate=false in its yarn parameters, bounds are whole dims here; "
            "use another checkpoint"
        )
    if "factor" not in found:
        length = found["original_max_position_embeddings"]
        found["factor"] = values["max_position_embeddings"] / length
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and scale_all and "attention_factor" not in found:
        log = math.log(max(found["factor"], 1.0))
        found["attention_factor"] = (0.1 * scale * log + 1) / (0.1 * scale_all * log + 1)


def write_rope(model: ModelConfig, *, partial: bool) -> dict[str, Any]:
    """Spell the rotary positions in the fields that every version reads."""
    fields: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if partial:
        fields["partial_rotary_factor"] = model.partial_rotary_factor
    match model.rope_scaling:
        case None:
            return fields
        case LinearRopeScaling() | Llama3RopeScaling() | YarnRopeScaling() as scaling:
            names = _FIELDS[scaling.kind]
            given = {name: getattr(scaling, name) for name in names}
            kept = {name: value for name, value in given.items() if value is not None}
            fields["rope_scaling"] = {"rope_type": scaling.kind, **kept}
    return fields
