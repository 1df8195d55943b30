"""Buckets of the replica sum hold every gradient once, in order."""

import torch

from llmtrain.parallel import fsdp


def test_buckets_keep_every_gradient_in_order() -> None:
    sizes = [1, 10 * 2**20, 5, 9 * 2**20, 3]
    gradients = [torch.empty(size, device="meta") for size in sizes]

    buckets = fsdp.in_buckets(gradients)

    assert [g.numel() for bucket in buckets for g in bucket] == sizes
    assert all(
        sum(g.nbytes for g in bucket) <= fsdp.BUCKET_BYTES or len(bucket) == 1 for bucket in buckets
    )
    assert len(buckets) >= 3
