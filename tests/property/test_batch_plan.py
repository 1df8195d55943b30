"""The batch plan over any sources, sizes and ranks: nothing lost, shares held, ranks invisible."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.loader import Batches
from llmtrain.data.permutation import Permutation, derive_key
from llmtrain.data.store import TokenStore
from tests.stores import EOS_ID, plan_over, write_store

SOURCE = st.lists(st.integers(1, 15), min_size=6, max_size=12)


def numbered_store(directory: Path, lengths: list[int], num_shards: int) -> TokenStore:
    """A store whose token number n is n + 3, but for EOS at the end of each document."""
    first = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    documents = [
        list(range(f + 3, f + 3 + n)) for f, n in zip(first.tolist(), lengths, strict=True)
    ]
    return write_store(directory, documents, num_shards)


@settings(max_examples=12)
@given(
    lengths=SOURCE,
    num_shards=st.integers(1, 4),
    sequence_length=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_reads_every_token_once(
    lengths: list[int], num_shards: int, sequence_length: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = numbered_store(Path(folder) / "a", lengths, num_shards)
        plan = plan_over(
            {"a": store}, None, seed=seed, sequence_length=sequence_length, global_batch_size=1
        )
        batches = Batches(plan, micro_batch_size=1, prefetch=0)
        num_windows = plan.orders[0].num_windows
        for epoch in range(2):
            rows = [batches.at(epoch * num_windows + i) for i in range(num_windows)]
            first = np.sort([int(plan.windows(s).windows[0]) for s in range(num_windows)])
            assert np.array_equal(first, np.arange(num_windows))
            used = num_windows * sequence_length
            tokens = store.tokens(0, used + 1).astype(np.int64)
            inputs = torch.cat([row.tokens[0] for row in rows])
            targets = torch.cat([row.targets[0][row.loss_weight[0] > 0] for row in rows])
            assert sorted(inputs.tolist()) == sorted(tokens[:-1].tolist())
            starts = store.document_boundaries(0, store.num_tokens)
            wanted = np.delete(tokens, starts[starts <= used])
            assert sorted(targets.tolist()) == sorted(wanted.tolist())
            assert store.num_tokens - 1 - used < sequence_length
        assert EOS_ID in wanted or used < min(lengths)


@settings(max_examples=12)
@given(
    sizes=st.tuples(SOURCE, SOURCE),
    layout=st.sampled_from([(1, 2), (1, 12), (2, 3), (3, 4), (4, 1), (6, 2), (12, 1)]),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 100),
)
def test_every_layout_reads_the_same_global_batch(
    sizes: tuple[list[int], list[int]], layout: tuple[int, int], step: int, seed: int
) -> None:
    dp_size, micro_batch_size = layout
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            name: numbered_store(Path(folder) / name, lengths, 2)
            for name, lengths in zip("ab", sizes, strict=True)
        }
        plan = plan_over(
            stores, {"a": 0.3, "b": 0.7}, seed=seed, sequence_length=5, global_batch_size=12
        )
        whole = Batches(plan, micro_batch_size=12, prefetch=0).at(step)
        parts = []
        for rank in range(dp_size):
            batches = Batches(
                plan,
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch_size=micro_batch_size,
                prefetch=0,
            )
            parts += batches.at(step).microbatches()
        assert all(part.tokens.shape[0] == micro_batch_size for part in parts)
        for name in ("tokens", "targets", "positions", "document_ids", "loss_weight", "source_ids"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(whole, name)), name


@given(n=st.integers(1, 2**61), key=st.integers(), values=st.lists(st.integers(0, 2**61)))
def test_permutation_inverse(n: int, key: int, values: list[int]) -> None:
    permutation = Permutation(n, derive_key(key))
    places = np.array(values, dtype=np.int64) % n
    moved = permutation.forward(places)
    assert ((moved >= 0) & (moved < n)).all()
    assert np.array_equal(permutation.inverse(moved), places)
