"""The part of a model one rank runs, with the loss inside the last stage's forward.

Invariant: head and loss run inside ``StageModule.forward``, so wrappers that gather parameters
around a forward (FSDP2) have gathered the head too, and a stage of a pipeline is fed by dense
[rows, S] tensors alone. What a stage sees of the batch does not depend on the layout.

    stage = StageModule(transformer, loss)
    stage.scale = 1 / target_tokens
    stage(tokens, **batch_fields(batch)).sum().backward()
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.model.transformer import Transformer

LossFunction = Callable[[Tensor, nn.Module, StepBatch], tuple[Tensor, dict[str, Tensor]]]
"""The loss seam: (hidden [B, S, D] after the final norm, head, micro-batch) -> (sum, metric sums).

The head is applied inside, so that a loss may work in chunks and never hold [B, S, V] logits.
The sum is not divided: the engine divides by the global number of targets.
"""

PREFIX = "transformer."
"""What a StageModule puts before the global parameter names."""


class StageModule(nn.Module):
    """A transformer part; on the last stage its output is the scaled loss, [1]."""

    def __init__(self, transformer: Transformer, loss: LossFunction | None) -> None:
        """``loss`` is None on every stage but the last."""
        super().__init__()
        self.transformer = transformer
        self.loss = loss
        self.scale: Tensor | None = None
        self.totals: dict[str, Tensor] = {}

    def forward(self, x: Tensor, **fields: Tensor) -> Tensor:
        """Run tokens [B, S] or hidden [B, S, D] to hidden, or to the loss times ``scale``.

        Sums of the loss and its metrics are added to ``totals`` in float64.
        """
        hidden: Tensor = self.transformer(x, fields["positions"], fields["document_ids"])
        if self.loss is None:
            return hidden.contiguous()  # as it is sent
        batch = StepBatch(**fields, num_microbatches=1)
        loss_sum, metrics = self.loss(hidden, self.transformer.head, batch)
        for name, value in {"loss_sum": loss_sum, **metrics}.items():
            added = value.detach().to(torch.float64)
            self.totals[name] = self.totals[name] + added if name in self.totals else added
        scaled = loss_sum if self.scale is None else loss_sum * self.scale.to(loss_sum.dtype)
        return torch.stack([scaled])


def batch_fields(batch: StepBatch) -> dict[str, Tensor]:
    """Name the batch's tensors as a stage takes them; each has rows as its first dim."""
    fields = {
        "tokens": batch.tokens,
        "targets": batch.targets,
        "positions": batch.positions,
        "document_ids": batch.document_ids,
        "loss_weight": batch.loss_weight,
        "source_ids": batch.source_ids,
    }
    return fields if batch.row_ids is None else fields | {"row_ids": batch.row_ids}
