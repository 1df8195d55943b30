"""The pretraining loss against torch's cross entropy, per source, with and without z-loss."""

import torch
import torch.nn.functional as F
from torch import nn

from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.train.loss import pretraining_loss


def make_batch(rows: int, length: int, vocab: int) -> StepBatch:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocab, (rows, length), generator=generator)
    targets[:, 2] = IGNORE_INDEX
    return StepBatch(
        tokens=torch.zeros_like(targets),
        targets=targets,
        positions=torch.zeros(rows, length, dtype=torch.int32),
        document_ids=torch.zeros(rows, length, dtype=torch.int32),
        loss_weight=(targets != IGNORE_INDEX).float(),
        source_ids=torch.tensor([2, 0, 2], dtype=torch.int32),
        num_microbatches=1,
    )


def test_sums_by_source_equal_torch_row_by_row() -> None:
    batch = make_batch(3, 5, 11)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(4, 11, bias=False).double()

    total, sums = pretraining_loss(num_sources=3, chunk_tokens=4)(hidden, head, batch)

    losses = F.cross_entropy(
        head(hidden).flatten(0, 1), batch.targets.flatten(), reduction="none"
    ).view(3, 5)
    rows = losses.sum(dim=1)
    torch.testing.assert_close(total, losses.sum())
    expected = torch.stack([rows[1], torch.zeros_like(rows[1]), rows[0] + rows[2]])
    torch.testing.assert_close(sums["source_loss_sum"], expected)
    assert sums["source_tokens"].tolist() == [4, 0, 8]
    assert not sums["source_loss_sum"].requires_grad
    grads = torch.autograd.grad(total, [hidden, head.weight])
    reference = torch.autograd.grad(losses.sum(), [hidden, head.weight])
    torch.testing.assert_close(grads, reference)


def test_weights_scale_loss_and_count() -> None:
    batch = make_batch(3, 5, 11)
    batch.loss_weight[0] *= 0.5
    hidden, head = torch.randn(3, 5, 4), nn.Linear(4, 11, bias=False)
    total, sums = pretraining_loss(num_sources=3, chunk_tokens=1024)(hidden, head, batch)
    torch.testing.assert_close(sums["source_loss_sum"].sum(), total)
    assert sums["source_tokens"].tolist() == [4, 0, 6]


def test_z_loss_is_optimised_but_shown_apart() -> None:
    batch = make_batch(3, 5, 11)
    batch.loss_weight[0] *= 0.5
    hidden = torch.randn(3, 5, 4, dtype=torch.float64)
    head = nn.Linear(4, 11, bias=False).double()
    total, sums = pretraining_loss(3, 4, z_loss_weight=0.01)(hidden, head, batch)
    plain_total, plain_sums = pretraining_loss(3, 4)(hidden, head, batch)

    squares = head(hidden).logsumexp(dim=-1).square() * batch.loss_weight
    torch.testing.assert_close(sums["z_loss_sum"], 0.01 * squares.sum().detach())
    torch.testing.assert_close(total, plain_total + 0.01 * squares.sum())
    torch.testing.assert_close(sums["source_loss_sum"], plain_sums["source_loss_sum"])
    assert "z_loss_sum" not in plain_sums
