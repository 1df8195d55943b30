"""Clusters of near-duplicates: edges, components, who stays, the Jaccard check, earlier corpora."""

import random
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.dedup import MinHashConfig
from data_pipeline.dedup.cluster import BAND, star_edges
from data_pipeline.dedup.components import Forest
from data_pipeline.dedup.jaccard import CROWD, SET_BAND, candidates, jaccard, settle_sets
from data_pipeline.dedup.minhash import MinHasher
from data_pipeline.dedup.survivors import _check_memory, _histogram
from data_pipeline.document import Document
from llmtrain.errors import ConfigError, DataError
from tests.dedup_corpus import document, run_stage

TINY = 100_000 / 2**30


def plain_components(edges: list[tuple[int, int]], nodes: int) -> list[int]:
    label = list(range(nodes))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return label


@pytest.mark.parametrize("seed", range(5))
def test_components_match_plain_propagation(seed: int) -> None:
    rng = random.Random(seed)
    edges = [(rng.randrange(200), rng.randrange(200)) for _ in range(rng.randrange(1, 250))]
    forest = Forest(200)
    for piece in np.array_split(np.array(edges, np.uint32), 3):
        forest.unite(piece[:, 0], piece[:, 1])
    roots, sizes = forest.finish()
    expected = plain_components(edges, 200)
    assert roots.tolist() == expected
    assert sizes.tolist() == [expected.count(i) for i in range(200)]


def test_long_chain_in_any_order_is_one_component() -> None:
    chain = [(i, i + 1) for i in range(999)]
    random.Random(0).shuffle(chain)
    forest = Forest(1000)
    forest.unite(*np.array(chain, np.uint32).T)
    roots, sizes = forest.finish()
    assert set(roots.tolist()) == {0}
    assert sizes[0] == 1000


def test_a_key_gives_a_star_not_all_pairs() -> None:
    records = np.zeros(50, BAND)
    records["key"][40:] = 7
    records["document"] = np.arange(50)[::-1]
    kept, edges = star_edges(records)
    assert sorted(kept["document"].tolist()) == [0, 10]
    assert {tuple(e) for e in edges.tolist()} == {(d, 10) for d in range(11, 50)} | {
        (d, 0) for d in range(1, 10)
    }
    assert len(edges) == 39 + 9


def test_equal_sets_under_a_key_are_one_and_all_pairs_of_others_are_candidates() -> None:
    records = np.zeros(6, SET_BAND)
    records["key"] = [1, 1, 1, 1, 2, 2]
    records["set"] = [5, 6, 5, 4, 9, 9]
    records["document"] = [3, 2, 1, 0, 7, 8]
    kept, edges = settle_sets(records)
    assert kept["document"].tolist() == [0, 1, 2, 7]
    assert edges.tolist() == [(3, 1), (8, 7)]
    (pairs,) = candidates(kept, 1000)
    assert pairs.tolist() == [(0, 1), (0, 2), (1, 2)]


def test_pairs_of_a_crowded_key_stay_few() -> None:
    records = np.zeros(1000, SET_BAND)
    records["set"] = records["document"] = np.arange(1000)
    parts = list(candidates(records, 50_000))
    pairs = np.concatenate(parts)
    assert len(parts) == 5
    assert len(pairs) == sum(999 - i for i in range(CROWD))
    assert set(pairs["document"].tolist()) == set(range(CROWD))


def test_jaccard_of_sorted_sets() -> None:
    one, other = np.array([1, 3, 5, 7], np.uint64), np.array([3, 4, 5], np.uint64)
    assert jaccard(one, other) == 2 / 5
    assert jaccard(one[:0], one[:0]) == 1.0


WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "st", "rk", "mp")]


def page(rng: random.Random, words: int = 80) -> list[str]:
    return rng.choices(WORDS, k=words)


def changed(words: list[str], rng: random.Random, number: int) -> list[str]:
    result = list(words)
    for place in rng.sample(range(len(words)), number):
        result[place] = "x" + rng.choice(WORDS)
    return result


def corpus(groups: int = 12, seed: int = 3) -> list[Document]:
    """Groups of one page, a near-duplicate and a copy with other case, and pages alone."""
    rng = random.Random(seed)
    texts = []
    for group in range(groups):
        words = page(rng)
        texts.append(" ".join(words))
        if group % 3:
            texts.append(" ".join([*changed(words, rng, 1), "ende", "gut"]))
            texts.append(" ".join(words).upper())
    numbers = rng.sample(range(1000), len(texts))
    return [
        document(n, text, metadata={"quality": f"{n % 7 / 7:.6f}"},
                 timestamp=f"2026-01-{1 + n % 28:02d}T00:00:00Z")
        for n, text in zip(numbers, texts, strict=True)
    ]  # fmt: skip


def plain_clusters(documents: list[Document]) -> list[list[Document]]:
    keys = [set(MinHasher("fineweb").band_keys([d.text])[0].tolist()) for d in documents]
    edges = [(i, j) for i in range(len(keys)) for j in range(i) if keys[i] & keys[j]]
    label = plain_components(edges, len(documents))
    return [[d for d, x in zip(documents, label, strict=True) if x == root] for root in set(label)]


KEEP = {
    "longest": lambda d: (-len(d.text), d.id),
    "newest": lambda d: (-int(d.timestamp[8:10]), -len(d.text), d.id),
    "quality": lambda d: (-float(d.metadata["quality"]), -len(d.text), d.id),
}


@pytest.mark.parametrize("keep", list(KEEP))
@pytest.mark.parametrize(("rows", "memory_gib"), [(5, 4.0), (40, TINY)])
def test_one_document_per_cluster_stays(
    keep: str, rows: int, memory_gib: float, tmp_path: Path
) -> None:
    documents = corpus()
    clusters = plain_clusters(documents)
    config = MinHashConfig(keep=keep)  # type: ignore[arg-type]
    outcome = run_stage(tmp_path, "minhash", documents, rows, memory_gib=memory_gib, minhash=config)
    expected = {min(c, key=KEEP[keep]).id: c for c in clusters}
    assert {d.id for d in outcome.kept} == set(expected)
    for d in outcome.kept:
        assert (d.cluster, d.cluster_size) == (
            min(m.id for m in expected[d.id]), len(expected[d.id])
        )  # fmt: skip
    details = outcome.manifest.details
    sizes = [len(c) for c in clusters if len(c) > 1]
    assert (details["clusters"], details["members"]) == (len(sizes), sum(sizes))
    assert (details["largest"], details["documents"]) == (max(sizes), len(documents))
    assert outcome.manifest.counts.dropped == {"minhash.duplicate": sum(sizes) - len(sizes)}


def test_documents_without_a_score_or_time_come_last(tmp_path: Path) -> None:
    text = "the same words stand here and are the same"
    documents = [
        document(1, text + " longer"), document(2, text, metadata={"quality": "-1e300"}),
        document(3, text, timestamp="1999-01-01"),
    ]  # fmt: skip
    for keep, stays in (("quality", 2), ("newest", 3), ("longest", 1)):
        config = MinHashConfig(keep=keep)  # type: ignore[arg-type]
        outcome = run_stage(tmp_path / keep, "minhash", documents, 2, minhash=config)
        assert outcome.ids == [stays]


@pytest.mark.parametrize(("score", "message"), [("good", "is 'good'"), ("nan", "is 'nan'")])
def test_scores_that_are_none_are_refused(score: str, message: str, tmp_path: Path) -> None:
    documents = [document(1, "some words", metadata={"quality": score})]
    with pytest.raises(DataError, match=message):
        run_stage(tmp_path, "minhash", documents, 2, minhash=MinHashConfig(keep="quality"))
    outcome = run_stage(tmp_path / "longest", "minhash", documents, 2)
    assert outcome.ids == [1]


@pytest.mark.parametrize(("rows", "memory_gib"), [(4, 4.0), (30, TINY)])
def test_the_check_joins_similar_pairs_only(rows: int, memory_gib: float, tmp_path: Path) -> None:
    rng = random.Random(1)
    words = page(rng, 100)
    texts = [" ".join(words)]
    while len(texts) < 12:  # a chain: every page like the one before, not like the first
        words = changed(words, rng, rng.choice((1, 4)))
        texts.append(" ".join(words))
    texts += [texts[4], texts[4]]
    documents = [document(i, text) for i, text in enumerate(texts)]
    hasher = MinHasher("fineweb")
    keys = [set(hasher.band_keys([t])[0].tolist()) for t in texts]
    sets = [np.unique(hasher.shingles(t)) for t in texts]
    edges = [
        (i, j) for i in range(14) for j in range(i)
        if keys[i] & keys[j] and jaccard(sets[i], sets[j]) >= 0.8
    ]  # fmt: skip
    expected = plain_components(edges, 14)
    config = MinHashConfig(jaccard_threshold=0.8)
    outcome = run_stage(tmp_path, "minhash", documents, rows, memory_gib=memory_gib, minhash=config)
    assert 1 < len(set(expected)) < 12
    assert {int(d.cluster, 16) for d in outcome.kept} == set(expected)
    assert len(outcome.kept) == len(set(expected))
    for d in outcome.kept:
        assert expected[int(d.id, 16)] == int(d.cluster, 16)
    unchecked = run_stage(tmp_path / "all", "minhash", documents, rows)
    assert len(unchecked.kept) < len(outcome.kept)


def test_clusters_that_touch_an_earlier_corpus_go_whole(tmp_path: Path) -> None:
    rng = random.Random(7)
    old = page(rng)
    near = [*changed(old, rng, 1), "ende"]
    far = changed(near, rng, 2)
    fresh = [" ".join(page(rng)) for _ in range(3)]
    earlier = [document(1, " ".join(old)), document(2, fresh[0])]
    later = [
        document(3, " ".join(near)), document(4, " ".join(far)), document(5, fresh[1]),
        document(6, fresh[2]), document(7, fresh[2] + " more"), document(8, fresh[0]),
    ]  # fmt: skip
    run_stage(tmp_path / "old", "minhash", earlier, minhash=MinHashConfig(keep_keys=True))
    config = MinHashConfig(against=str(tmp_path / "old"))
    outcome = run_stage(tmp_path / "new", "minhash", later, 2, memory_gib=TINY, minhash=config)
    assert outcome.ids == [5, 7]
    reasons = {int(d, 16): reason for d, reason in outcome.reasons.items()}
    assert reasons.pop(6) == "minhash.duplicate"
    assert set(reasons) == {3, 4, 8}
    assert set(reasons.values()) == {"minhash.known"}
    assert outcome.manifest.details["known"] == 3


def test_other_presets_and_impossible_checks_are_refused(tmp_path: Path) -> None:
    documents = [document(1, "a b c d e f")]
    run_stage(tmp_path / "old", "minhash", documents, minhash=MinHashConfig(keep_keys=True))
    config = MinHashConfig(preset="olmo", against=str(tmp_path / "old"))
    with pytest.raises(DataError, match="preset='fineweb', this run has preset='olmo'"):
        run_stage(tmp_path / "new", "minhash", documents, minhash=config)
    with pytest.raises(ConfigError, match="use jaccard_threshold=null"):
        MinHashConfig(jaccard_threshold=0.8, against="old")
    with pytest.raises(ConfigError, match=r"jaccard_threshold=1.5; use \(0, 1\] or null"):
        MinHashConfig(jaccard_threshold=1.5)


def test_a_corpus_above_the_memory_is_refused_with_what_it_takes() -> None:
    _check_memory(1_000_000, 100_000, 2**28)
    sentence = (
        r"joining 90,000,000 documents .* takes 0.75 GiB, half of pipeline.memory_gib=1 at most"
    )
    with pytest.raises(DataError, match=sentence + r"; set pipeline.memory_gib=1.58 or more"):
        _check_memory(90_000_000, 0, 2**30)


def test_more_documents_than_32_bits_count_are_refused() -> None:
    with pytest.raises(DataError, match="5,000,000,000 are too many; run the pipeline on 2 parts"):
        _check_memory(5_000_000_000, 0, 2**60)


def test_cluster_sizes_are_counted_by_powers_of_two() -> None:
    sizes = np.array([1, 1, 0, 2, 3, 4, 0, 5, 8, 9], np.uint32)
    assert _histogram(sizes) == {"1": 2, "2": 1, "3-4": 2, "5-8": 2, "9-16": 1}
