"""What a checkpoint says about its data, and how a change is named."""

from pathlib import Path

import pytest

from llmtrain.checkpoint.facts import changed_facts, data_facts
from llmtrain.data.store import TokenStore
from tests.end_to_end.commands import make_store
from tests.stores import plan_over


def facts(folder: Path, *, seed: int = 0, content: int = 0, **weights: float) -> dict[str, str]:
    stores = {}
    for number, name in enumerate(("code", "web")):
        path = folder / f"{name}-{content}"
        if not path.exists():
            make_store(path, seed=number + content, num_documents=3)
        stores[name] = TokenStore.open(path)
    plan = plan_over(stores, weights or None, seed=seed, sequence_length=16, global_batch_size=4)
    return data_facts(plan)


def test_the_same_data_has_the_same_facts(tmp_path: Path) -> None:
    assert changed_facts(facts(tmp_path), facts(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, ["training.seed was 0 and is 3"]),
        ({"content": 9}, ["content of data.sources.code", "content of data.sources.web"]),
        ({"code": 0.25, "web": 0.75}, ["mixture was "]),
    ],
)
def test_a_change_is_named(tmp_path: Path, change: dict[str, float], named: list[str]) -> None:
    saved = facts(tmp_path, code=0.5, web=0.5)
    now = facts(tmp_path, **{"code": 0.5, "web": 0.5, **change})  # type: ignore[arg-type]
    found = changed_facts(saved, now)
    assert [text.startswith(start) for text, start in zip(found, named, strict=True)] == [
        True
    ] * len(named)


def test_an_unexplained_change_names_the_fingerprint() -> None:
    found = changed_facts({"data fingerprint": "a"}, {"data fingerprint": "b"})
    assert found == ["data fingerprint was a and is b"]


def test_a_source_that_went_away_is_named(tmp_path: Path) -> None:
    saved = facts(tmp_path)
    now = {name: value for name, value in saved.items() if not name.endswith("web")}
    assert [text.split(" is ")[-1] for text in changed_facts(saved, now)] == ["absent", "absent"]
