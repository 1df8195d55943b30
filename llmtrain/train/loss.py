"""The pretraining loss: next-token cross entropy in chunks, with its sums per data source.

The sum is over weighted targets and is not divided: the engine divides by the global number of
targets, so that no mean of means appears on any layout.

    loss_function = pretraining_loss(num_sources=3, chunk_tokens=1024)
    loss_sum, sums = loss_function(hidden, head, batch)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import LossFunction
from llmtrain.ops.cross_entropy import (
    CrossEntropyStep,
    VocabPartition,
    chunked_linear_cross_entropy,
    torch_step,
)

Observer = Callable[[Tensor, StepBatch], None]
"""Takes the cross entropy of each token of a micro-batch, [B, S] in nats, and the micro-batch.

What it is given is the loss of the step itself: detached, on the device, 0 where is no target.
"""


def pretraining_loss(
    num_sources: int,
    chunk_tokens: int,
    z_loss_weight: float = 0.0,
    observe: Observer | None = None,
    step: CrossEntropyStep = torch_step,
) -> LossFunction:
    """Make the loss of a mixture of ``num_sources`` sources.

    The sum it returns is what is optimised: cross entropy and, with a weight above 0, the z-loss
    (arXiv:2204.02311, section 5). Its metric sums are ``source_loss_sum`` and ``source_tokens``,
    both [num_sources] and of the cross entropy alone, and with a weight ``z_loss_sum``, a scalar.
    ``observe`` is shown every micro-batch whose rows are numbered; ``step`` makes losses and
    gradient of a chunk of logits.
    """

    def loss(hidden: Tensor, head: nn.Module, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        weight, partition = head_matrix(head)
        total, losses, log_denominators = chunked_linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            batch.targets.flatten(),
            batch.loss_weight.flatten(),
            chunk_tokens,
            partition,
            z_loss_weight,
            step,
        )
        losses = losses.view_as(batch.targets)
        if observe is not None and batch.row_ids is not None:
            observe(losses, batch)
        weights = batch.loss_weight.to(losses.dtype)
        weighted = losses * weights
        metrics = {
            "source_loss_sum": by_source(weighted, batch.source_ids, num_sources),
            "source_tokens": by_source(weights, batch.source_ids, num_sources),
        }
        if z_loss_weight:
            squares = log_denominators.square() * weights.flatten()
            metrics["z_loss_sum"] = z_loss_weight * squares.sum()
        return total, metrics

    return loss


def head_matrix(head: nn.Module) -> tuple[Tensor, VocabPartition | None]:
    """Give the head's matrix and which rows of the vocabulary it holds; TypeError without one."""
    weight, partition = head.weight, getattr(head, "partition", None)
    if not isinstance(weight, Tensor) or not isinstance(partition, VocabPartition | None):
        raise TypeError(f"the head is a {type(head).__name__} without a weight matrix")
    return weight, partition


def by_source(values: Tensor, source_ids: Tensor, num_sources: int) -> Tensor:
    """Sum rows [R, S] by source [R] into [num_sources]; deterministic on every device."""
    sources = torch.arange(num_sources, device=source_ids.device, dtype=source_ids.dtype)
    member = source_ids[None, :] == sources[:, None]
    return (member * values.detach().sum(dim=1)[None, :]).sum(dim=1)
