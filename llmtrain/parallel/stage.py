"""The part of a model one rank runs, with the loss inside the last stage's forward.

Invariant: head and loss run inside ``StageModule.forward``, so wrappers that gather parameters
around a forward (FSDP2) have gathered the head too, and a stage of a pipeline is fed by dense
[rows, S] tensors alone. What a stage sees of the batch does not depend on the layout.

    stage = StageModule(transformer, loss)
    stage.scale = 1 / target_tokens
    stage(tokens, **batch_fields(batch)).sum().backward()
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.scopes import FORWARD, LOSS, scope

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

    def forward(self, x: Tensor, **fields: Any) -> Tensor:
        """Run tokens [B, S] or hidden [B, S, D] to hidden, or to the loss times ``scale``.

        Sums of the loss and its metrics are added to ``totals`` in float64.
        """
        with scope(FORWARD):
            hidden: Tensor = self.transformer(
                x, fields["positions"], fields["document_ids"], extent=fields.get("extent")
            )
            if self.loss is None:
                return hidden.contiguous()  # as it is sent
            with scope(LOSS):
                return self._scaled_loss(self.loss, hidden, fields)

    def _scaled_loss(self, loss: LossFunction, hidden: Tensor, fields: Mapping[str, Any]) -> Tensor:
        """Add up the sums of a micro-batch; return its loss times ``scale``, [1]."""
        batch = StepBatch(**fields, num_microbatches=1)
        loss_sum, metrics = loss(hidden, self.transformer.head, batch)
        for name, value in {"loss_sum": loss_sum, **metrics}.items():
            added = value.detach().to(torch.float64)
            self.totals[name] = self.totals[name] + added if name in self.totals else added
        scaled = loss_sum if self.scale is None else loss_sum * self.scale.to(loss_sum.dtype)
        return torch.stack([scaled])


def batch_fields(batch: StepBatch) -> dict[str, Any]:
    """Name the batch's tensors as a stage takes them, rows first, and what is no tensor."""
    fields: dict[str, Any] = {
        "tokens": batch.tokens,
        "targets": batch.targets,
        "positions": batch.positions,
        "document_ids": batch.document_ids,
        "loss_weight": batch.loss_weight,
        "source_ids": batch.source_ids,
    }
    if batch.row_ids is not None:
        fields["row_ids"] = batch.row_ids
    if batch.reference is not None:
        fields["reference"] = batch.reference
    if batch.extent is not None:
        fields["extent"] = batch.extent
    return fields
