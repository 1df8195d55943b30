"""Batches are a pure function of the step; rows agree with a token-by-token reference."""

import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.config.parallel import ParallelConfig
from llmtrain.data.assemble import assemble_pieces
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.held_out import EvaluationBatches
from llmtrain.data.loader import Batches
from llmtrain.data.order import ConcatOrder, Pieces
from llmtrain.data.plan import BatchPlan
from llmtrain.data.shards import Shards
from llmtrain.data.store import TokenStore
from llmtrain.errors import ConfigError, DataError
from tests.stores import plan_over, random_documents, write_store

LENGTH = 16


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    root = tmp_path_factory.mktemp("stores")
    return {
        "wiki": write_store(root / "wiki", random_documents(80, 30, seed=1), num_shards=3),
        "code": write_store(root / "code", random_documents(40, 9, seed=2)),
    }


def make_plan(stores: dict[str, TokenStore], **changes: object) -> BatchPlan:
    settings: dict[str, object] = {
        "seed": 7,
        "sequence_length": LENGTH,
        "global_batch_size": 12,
        **changes,
    }
    return plan_over(stores, {"wiki": 0.75, "code": 0.25}, **settings)


def reference_row(store: TokenStore, start: int) -> dict[str, list[float]]:
    row: dict[str, list[float]] = {
        name: [] for name in ("tokens", "targets", "positions", "document_ids", "loss_weight")
    }
    position = document_id = 0
    for token in range(start, start + LENGTH):
        document = store.document_at(token)
        if token > start and store.document_at(token - 1) != document:
            position, document_id = 0, document_id + 1
        same = store.document_at(token + 1) == document
        row["tokens"].append(store.tokens(token, token + 1)[0])
        row["targets"].append(store.tokens(token + 1, token + 2)[0] if same else IGNORE_INDEX)
        row["positions"].append(position)
        row["document_ids"].append(document_id)
        row["loss_weight"].append(float(same))
        position += 1
    return row


def assert_equal(one: StepBatch, other: StepBatch) -> None:
    for field in fields(StepBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_rows_agree_with_the_reference(stores: dict[str, TokenStore]) -> None:
    plan = make_plan(stores)
    batch = Batches(plan, micro_batch_size=12, prefetch=0).at(3)
    chosen = plan.windows(3)
    assert batch.source_ids.tolist() == chosen.sources.tolist()
    for row, (source, window) in enumerate(zip(chosen.sources, chosen.windows, strict=True)):
        expected = reference_row(plan.orders[source].store, int(window) * LENGTH)
        for name, values in expected.items():
            assert getattr(batch, name)[row].tolist() == values, name
    wide = {batch.tokens.dtype, batch.targets.dtype}
    narrow = {batch.positions.dtype, batch.document_ids.dtype, batch.source_ids.dtype}
    assert (wide, narrow) == ({torch.int64}, {torch.int32})
    assert batch.loss_weight.dtype == torch.float32


def test_windows_cross_shards(stores: dict[str, TokenStore]) -> None:
    store = stores["wiki"]
    start = int(store.shard_starts[1]) - 7
    zero = np.zeros(1, dtype=np.int64)
    pieces = Pieces(zero, zero, np.array([start]), zero + LENGTH)
    batch = assemble_pieces(
        [(store, pieces)], np.zeros(1, np.int32), sequence_length=LENGTH, num_microbatches=1
    )
    expected = reference_row(store, start)
    for name, values in expected.items():
        assert getattr(batch, name)[0].tolist() == values
    assert batch.targets[0, 6] == IGNORE_INDEX


@pytest.mark.parametrize("prefetch", [1, 3])
def test_reading_ahead_changes_nothing(stores: dict[str, TokenStore], prefetch: int) -> None:
    plan = make_plan(stores)
    plain = Batches(plan, micro_batch_size=4, prefetch=0)
    with Batches(plan, micro_batch_size=4, prefetch=prefetch) as batches:
        for step in (0, 1, 2, 3, 9, 10, 2, 3):
            assert_equal(batches.at(step), plain.at(step))
    batches.close()


def test_reading_ahead_passes_errors_on(stores: dict[str, TokenStore]) -> None:
    plan = make_plan(stores)
    for order in plan.orders:
        assert isinstance(order, ConcatOrder)
        shards = Shards([], [], [], order.store.shards.__getitem__)
        order.store = TokenStore("none", shards, None, "")
    with Batches(plan, micro_batch_size=4) as batches, pytest.raises(IndexError):
        batches.at(0)


def test_fingerprint_covers_what_the_order_depends_on(stores: dict[str, TokenStore]) -> None:
    plan = make_plan(stores)
    backwards = dict(reversed(stores.items()))
    assert make_plan(backwards).fingerprint == plan.fingerprint
    assert make_plan(backwards).source_names == ("code", "wiki")
    others = [
        make_plan(stores, seed=8),
        make_plan(stores, sequence_length=8),
        make_plan(stores, global_batch_size=6),
        make_plan({"wiki": stores["code"], "code": stores["wiki"]}),
        plan_over(
            stores, None, seed=7, sequence_length=LENGTH, global_batch_size=12
        ),
    ]  # fmt: skip
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_shares_follow_windows_when_no_weights_are_given(stores: dict[str, TokenStore]) -> None:
    plan = plan_over(stores, None, seed=1, sequence_length=LENGTH, global_batch_size=4)
    num_windows = sum(order.num_windows for order in plan.orders)
    described = plan.describe(num_windows * LENGTH)
    assert [source.epochs for source in described] == pytest.approx([1, 1])
    assert sum(source.planned_tokens for source in described) == num_windows * LENGTH
    for source, order in zip(described, plan.orders, strict=True):
        assert source.num_tokens == order.store.num_tokens
        assert 0 <= order.store.num_tokens - 1 - source.num_windows * LENGTH < LENGTH


def test_later_epochs_have_new_orders_and_are_logged(
    stores: dict[str, TokenStore], caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_over(
        {"code": stores["code"]}, None, seed=1, sequence_length=LENGTH, global_batch_size=1
    )
    num_windows = plan.orders[0].num_windows
    batches = Batches(plan, micro_batch_size=1, prefetch=0)
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        for step in range(2 * num_windows):
            batches.at(step)
    rows = [plan.windows(step) for step in range(2 * num_windows)]
    order = [int(row.windows[0]) for row in rows]
    assert sorted(order[:num_windows]) == sorted(order[num_windows:]) == list(range(num_windows))
    assert order[:num_windows] != order[num_windows:]
    assert [int(row.epochs[0]) for row in rows] == [0] * num_windows + [1] * num_windows
    assert [r.getMessage() for r in caplog.records] == [
        f"source code begins epoch 2 of its {num_windows} windows, in a new order"
    ]


@pytest.mark.parametrize(("dp_size", "size", "pp", "shares"), [
    (5, 1, 1, [3, 3, 3, 3, 0]), (3, 4, 1, [4, 4, 4]), (2, 4, 1, [8, 4]), (5, 6, 1, [6, 6, 0, 0, 0]),
    (4, 3, 2, [6, 6, 0, 0]),
])  # fmt: skip
def test_what_ranks_lack_is_filled_up_with_rows_that_count_for_nothing(
    stores: dict[str, TokenStore], dp_size: int, size: int, pp: int, shares: list[int]
) -> None:
    plan, layout = make_plan(stores), ParallelConfig(pp=pp)
    whole = Batches(plan, micro_batch_size=12, prefetch=0).at(2)
    parts = [
        Batches(
            plan, dp_rank=rank, dp_size=dp_size, micro_batch_size=size, prefetch=0, parallel=layout
        ).at(2)
        for rank in range(dp_size)
    ]
    assert len({(len(part.tokens), part.num_microbatches) for part in parts}) == 1
    assert parts[0].num_microbatches >= pp
    for name in ("tokens", "targets", "positions", "document_ids", "loss_weight", "source_ids"):
        kept = [getattr(p, name)[:share] for p, share in zip(parts, shares, strict=True)]
        assert torch.equal(torch.cat(kept), getattr(whole, name)), name
    padding = [part.loss_weight[share:] for part, share in zip(parts, shares, strict=True)]
    assert not torch.cat(padding).any()
    ignored = [part.targets[share:] for part, share in zip(parts, shares, strict=True)]
    assert bool((torch.cat(ignored) == IGNORE_INDEX).all())


def test_wrong_sources_and_sizes(stores: dict[str, TokenStore], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source \w+ holds [\d,]+ tokens, a window needs 4,097"):
        make_plan(stores, sequence_length=4_096)
    with pytest.raises(ConfigError, match=r"mixture\.weights gives no share to the source code"):
        plan_over(stores, {"wiki": 1.0}, seed=1, sequence_length=8, global_batch_size=4)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        plan_over({}, None, seed=1, sequence_length=8, global_batch_size=4)
    other = write_store(tmp_path, random_documents(9, 40), tokenizer_hash="f" * 64)
    with pytest.raises(DataError, match="different tokenizers"):
        make_plan({**stores, "code": other})


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("max_windows", [None, 5])
def test_evaluation_reads_every_token_once_on_any_number_of_ranks(
    stores: dict[str, TokenStore], dp_size: int, max_windows: int | None
) -> None:
    per_rank = [
        list(
            EvaluationBatches(
                stores,
                sequence_length=LENGTH,
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch_size=2,
                num_microbatches=2,
                max_windows=max_windows,
            )
        )
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    batches = [batch for rank in per_rank for batch in rank]
    assert all(batch.tokens.shape == (4, LENGTH) for batch in batches)
    for source, name in enumerate(sorted(stores)):
        store = stores[name]
        weight = sum(batch.loss_weight[batch.source_ids == source].sum() for batch in batches)
        if max_windows is None:
            assert weight == store.num_tokens - store.num_documents
        else:
            assert 0 < weight <= max_windows * LENGTH
    for batch in batches:
        assert torch.equal(batch.targets == IGNORE_INDEX, batch.loss_weight == 0)
        assert (batch.document_ids.diff(dim=1) >= 0).all()


def test_evaluation_takes_a_store_shorter_than_a_window(tmp_path: Path) -> None:
    store = write_store(tmp_path, [[5, 6, 7]])
    (batch,) = EvaluationBatches(
        {"a": store}, sequence_length=LENGTH, micro_batch_size=1, num_microbatches=2
    )
    assert batch.targets[0, :4].tolist() == [6, 7, 2, IGNORE_INDEX]
    assert batch.loss_weight.sum() == 3
    assert batch.microbatches()[1].loss_weight.sum() == 0
