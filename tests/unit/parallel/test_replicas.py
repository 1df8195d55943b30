"""Buckets of the sums over replicas; the sums are in tests/distributed."""

import torch

from llmtrain.parallel.replicas import BUCKET_BYTES, in_buckets, sum_over


def test_buckets_keep_order_and_stay_within_their_size() -> None:
    sizes = [1, 10 * 2**20, 5, 9 * 2**20, 3]
    gradients = [torch.empty(size, device="meta") for size in sizes]

    buckets = in_buckets(gradients)

    assert [g.numel() for bucket in buckets for g in bucket] == sizes
    assert all(
        sum(g.nbytes for g in bucket) <= BUCKET_BYTES or len(bucket) == 1 for bucket in buckets
    )
    assert len(buckets) >= 3


def test_a_bucket_has_one_dtype() -> None:
    kinds = [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    buckets = in_buckets([torch.empty(2, dtype=dtype) for dtype in kinds])
    assert [len(bucket) for bucket in buckets] == [2, 1, 1]


def test_a_group_of_one_changes_nothing() -> None:
    gradient = torch.ones(3)
    sum_over([gradient], None)
    assert gradient.tolist() == [1.0, 1.0, 1.0]
