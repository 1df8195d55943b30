"""What stays after deduplication does not depend on order or shards, and is not touched again."""

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config.dedup import MinHashConfig, ParagraphConfig
from data_pipeline.document import Document, identity
from tests.dedup_corpus import document, run_stage

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A disk would take most of the time of these tests."""
SENTENCES = [f"Sentence {a} of {b} and {c}." for a in "abc" for b in ("rain", "snow") for c in "xy"]


@st.composite
def corpora(draw: st.DrawFn) -> list[Document]:
    """Pages that share sentences, with addresses and times of their own."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    number = draw(st.integers(2, 14))
    variety = draw(st.integers(1, 4))
    bases = [rng.choices(SENTENCES, k=rng.randint(3, 20)) for _ in range(variety)]
    documents = []
    for i, id_ in enumerate(rng.sample(range(10_000), number)):
        lines = list(rng.choice(bases))
        query = i * rng.randint(0, 1)
        for _ in range(rng.choice((0, 0, 1, 3))):
            lines[rng.randrange(len(lines))] = f"New {rng.random()} line. It is new. Really."
        documents.append(document(
            id_, "\n".join(lines), url=f"https://x.org/{rng.randrange(5)}?n={query}",
            timestamp=f"2026-01-01T00:{i:02d}:00Z",
        ))  # fmt: skip
    return documents


def outcome(name: str, documents: list[Document], rows: int, **config: Any) -> list[Document]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        return run_stage(Path(folder), name, documents, rows, **config).kept


def fresh(documents: list[Document]) -> list[Document]:
    """The documents as another run would read them."""
    return [
        document(int(d.id, 16), d.text, url=d.url, timestamp=d.timestamp, edits=identity(d.text))
        for d in documents
    ]


STAGES: dict[str, dict[str, Any]] = {
    "url": {},
    "exact": {},
    "line_dedup": {},
    "span_dedup": {},
    "minhash": {"minhash": MinHashConfig(keep="newest")},
    "minhash checked": {"minhash": MinHashConfig(preset="olmo", jaccard_threshold=0.6)},
}


def by_id(documents: list[Document]) -> dict[str, Any]:
    return {d.id: (d.text, d.cluster, d.cluster_size) for d in documents}


@pytest.mark.parametrize("stage", list(STAGES))
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(documents=corpora(), seed=st.integers(0, 99), rows=st.integers(1, 14))
def test_what_stays_does_not_depend_on_order_or_shards(
    stage: str, documents: list[Document], seed: int, rows: int
) -> None:
    name, config = stage.partition(" ")[0], STAGES[stage]
    # Pages of the same address share a rank, and a tie goes to the first: every page gets its own.
    if name in ("line_dedup", "span_dedup"):
        documents = [
            document(int(d.id, 16), d.text, url=f"https://x.org/{d.id}") for d in documents
        ]
    shuffled = random.Random(seed).sample(documents, len(documents))
    assert by_id(outcome(name, documents, 14, **config)) == by_id(
        outcome(name, shuffled, rows, memory_gib=30_000 / 2**30, **config)
    )


@pytest.mark.parametrize("stage", ["url", "exact", "line_dedup", "minhash", "minhash checked"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(documents=corpora())
def test_a_second_time_changes_nothing(stage: str, documents: list[Document]) -> None:
    name, config = stage.partition(" ")[0], STAGES[stage]
    once = fresh(outcome(name, documents, 5, **config))
    twice = outcome(name, once, 3, **config)
    assert [(d.id, d.text) for d in twice] == [(d.id, d.text) for d in once]
    assert all(d.cluster_size == 1 for d in twice)


@settings(max_examples=8)
@given(documents=corpora(), rows=st.integers(1, 14))
def test_paragraphs_do_not_depend_on_shards_and_are_not_touched_again(
    documents: list[Document], rows: int
) -> None:
    config = {"paragraph_dedup": ParagraphConfig(ngram=3, false_positive_rate=1e-6)}
    once = outcome("paragraph_dedup", documents, 14, **config)
    assert once == outcome("paragraph_dedup", documents, rows, **config)
    again = outcome("paragraph_dedup", fresh(once), rows, **config)
    assert [d.text for d in again] == [d.text for d in once]
