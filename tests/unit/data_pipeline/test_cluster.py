"""Clusters of near-duplicates against a plain union-find."""

import random

import numpy as np
import pytest

from data_pipeline.cluster import KEY, _first_of_cluster, components, star_edges


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
def test_components_match_union_find(seed: int) -> None:
    rng = random.Random(seed)
    edges = [(rng.randrange(200), rng.randrange(200)) for _ in range(rng.randrange(1, 250))]
    found = components(np.array(edges, dtype=np.int64), 200)
    assert found.tolist() == plain_components(edges, 200)


def test_long_chain_in_any_order_is_one_component() -> None:
    chain = [(i, i + 1) for i in range(999)]
    random.Random(0).shuffle(chain)
    assert components(np.array(chain), 1000).tolist() == [0] * 1000
    assert components(np.empty((0, 2), np.int64), 3).tolist() == [0, 1, 2]


def test_a_key_gives_a_star_not_all_pairs() -> None:
    records = np.zeros(50, KEY)
    records["key"][40:] = 7
    records["document"] = np.arange(50)[::-1]
    kept, edges = star_edges(records)
    assert sorted(kept["document"].tolist()) == [0, 10]
    assert len(edges) == 39 + 9
    assert {tuple(e) for e in edges.tolist()} == {(d, 10) for d in range(11, 50)} | {
        (d, 0) for d in range(1, 10)
    }


def test_first_of_a_cluster_is_named_for_each_member() -> None:
    root = np.array([7, 3, 7, 3, 7])
    lengths, ids = np.array([5, 9, 8, 9, 8]), np.array(["e", "d", "c", "b", "a"])
    assert _first_of_cluster(root, ids).tolist() == [4, 3, 4, 3, 4]
    assert _first_of_cluster(root, -lengths, ids).tolist() == [4, 3, 4, 3, 4]
    assert _first_of_cluster(root, lengths, ids).tolist() == [0, 3, 0, 3, 0]
    assert _first_of_cluster(root[:0], ids[:0]).tolist() == []
