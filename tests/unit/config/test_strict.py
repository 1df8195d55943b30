"""The strict builder: every kind of type, every kind of mistake."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.config.strict import build
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Left:
    kind: Literal["left"]
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Right:
    kind: Literal["right"]
    ratio: float

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise ConfigError([f"ratio={self.ratio} must be at least 0", "one more"])


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int = 1
    share: float = 0.5
    name: str | None = None
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    shard: int | Literal["auto"] = "auto"
    part: Left | Right | None = None
    pair: tuple[int, str] = (1, "a")
    many: tuple[float, ...] = ()
    listed: Sequence[str] = ()
    table: Mapping[str, float] = field(default_factory=dict)
    folder: Path = Path()
    free: Any = None
    noted: Annotated[int, "tokens"] = 3
    several: str | tuple[str, ...] = ""


def problems(tree: dict[str, object], schema: type = Sample, path: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(schema, tree, path)
    return caught.value.problems


@pytest.mark.parametrize(
    ("key", "given", "built"),
    [
        ("count", 3, 3),
        ("count", 1e9, 1_000_000_000),
        ("share", 1, 1.0),
        ("share", float("inf"), float("inf")),
        ("name", None, None),
        ("name", "x", "x"),
        ("on", True, True),
        ("mode", "slow", "slow"),
        ("shard", 4, 4),
        ("shard", "auto", "auto"),
        ("part", {"kind": "right", "ratio": 2}, Right(kind="right", ratio=2.0)),
        ("part", {"kind": "left"}, Left(kind="left")),
        ("pair", [2, "b"], (2, "b")),
        ("many", [1, 2.5], (1.0, 2.5)),
        ("listed", ["a"], ("a",)),
        ("table", {"web": 1}, {"web": 1.0}),
        ("folder", "/tmp", Path("/tmp")),
        ("free", {"a": [1]}, {"a": [1]}),
        ("noted", 4, 4),
        ("several", ["a", "b"], ("a", "b")),
    ],
)
def test_values_take_the_type_of_their_field(key: str, given: object, built: object) -> None:
    value = getattr(build(Sample, {key: given}), key)
    assert value == built
    assert type(value) is type(built)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"count": True}, "count=true is not a whole number"),
        ({"count": 1.5}, "count=1.5 is not a whole number"),
        ({"count": "3"}, "count=3 is not a whole number"),
        ({"count": None}, "count=null is not a whole number"),
        ({"share": float("nan")}, "share=nan is not a number"),
        ({"name": 12}, "name=12 is not text; quote it: 'name=\"12\"'"),
        ({"on": 1}, "on=1 is not true or false"),
        ({"mode": "fats"}, "mode=fats is not a choice; did you mean fast?"),
        ({"mode": 7}, "mode=7 is not a choice; use one of fast, slow"),
        ({"shard": "atuo"}, "shard=atuo is not a whole number or auto; did you mean auto?"),
        ({"part": {"kind": "rigth"}}, "part.kind=rigth is not a choice; did you mean right?"),
        ({"part": {}}, "part.kind=null is not a choice; use one of left, right"),
        ({"part": {"kind": "right"}}, "part.ratio is required; set part.ratio=VALUE"),
        ({"part": {"kind": "left", "sizes": 2}}, "unknown key part.sizes; did you mean part.size?"),
        ({"pair": [1]}, "pair has 1 items, expected 2"),
        ({"pair": 1}, "pair=1 is not a list; write pair=[1]"),
        ({"many": [1, "x"]}, "many[1]=x is not a number"),
        ({"table": {"web": "x"}}, "table.web=x is not a number"),
        ({"table": "web"}, "table=web is not a group of names; write table.NAME=VALUE"),
        ({"cuont": 2}, "unknown key cuont; did you mean count?"),
        ({"size": 2}, "unknown key size; did you mean part.size?"),
        ({"part": 3}, "part=3 is not Left or Right"),
    ],
)
def test_one_mistake_is_one_sentence(tree: dict[str, object], message: str) -> None:
    assert problems(tree) == [message]


def test_all_problems_are_collected() -> None:
    found = problems(
        {"count": "x", "nothing_like_it": 1, "part": {"kind": "right", "ratio": -1}, "on": "yes"}
    )
    assert len(found) == 5
    assert "part.ratio=-1.0 must be at least 0" in found
    assert "part: one more" in found


def test_a_path_stands_before_every_message() -> None:
    found = problems({"count": "x", "cuont": 1}, path="data")
    assert found == [
        "unknown key data.cuont; did you mean data.count?",
        "data.count=x is not a whole number",
    ]


def test_messages_that_name_their_section_are_not_prefixed_twice() -> None:
    tree: dict[str, object] = dict.fromkeys(
        ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"], 8
    )
    tree |= {"num_attention_heads": 4, "num_key_value_heads": 3}
    assert problems(tree, ModelConfig, "model") == [
        "model.num_key_value_heads=3 does not divide model.num_attention_heads=4"
    ]


def test_question_marks_leave_a_value_open() -> None:
    assert problems({"kind": "right", "ratio": "???"}, Right) == [
        "ratio is required; set ratio=VALUE"
    ]
    assert build(Sample, {"count": "???"}).count == 1


def test_types_the_builder_does_not_know_are_a_fault() -> None:
    @dataclass
    class Odd:
        what: complex = 1j

    with pytest.raises(TypeError, match="what"):
        build(Odd, {"what": 1})
