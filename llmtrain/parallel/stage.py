"""The part of a model one rank runs, with the loss inside the last stage's forward.

Invariant: head and loss run inside ``StageModule.forward``, so wrappers that gather parameters
around a forward (FSDP2) have gathered the head too, and a stage of a pipeline is fed by dense
[rows, S] tensors alone. What a stage sees of the batch does not depend on the layout.

    stage = StageModule(transformer, loss)
    stage.scale = 1 / target_tokens
    stage(tokens, **batch_fields(batch)).sum().backward()
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
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
            return hidden
        batch = StepBatch(**fields, num_microbatches=1)
        loss_sum, metrics = self.loss(hidden, self.transformer.head, batch)
        for name, value in {"loss_sum": loss_sum, **metrics}.items():
            added = value.detach().to(torch.float64)
            self.totals[name] = self.totals[name] + added if name in self.totals else added
        scaled = loss_sum if self.scale is None else loss_sum * self.scale.to(loss_sum.dtype)
        return torch.stack([scaled])


def batch_fields(batch: StepBatch) -> dict[str, Tensor]:
    """Name the batch's tensors as a stage takes them; each has rows as its first dim."""
    return {
        "tokens": batch.tokens,
        "targets": batch.targets,
        "positions": batch.positions,
        "document_ids": batch.document_ids,
        "loss_weight": batch.loss_weight,
        "source_ids": batch.source_ids,
    }


def split_layers(config: ModelConfig, pp: int) -> list[range]:
    """Share the blocks out among ``pp`` stages so that the most expensive stage is cheapest.

    The cost of a part is its number of weights that multiply, the head's included; the embedding
    counts a quarter of its weights: its lookup is cheap, its dense gradient and update are not.
    Every stage gets at least one block; ``pp`` is at most the number of blocks.
    """
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + config.num_key_value_heads
    block = 2 * width * config.head_size * heads + 3 * width * inner
    matrix = config.vocab_size * width
    costs = [float(block)] * config.num_hidden_layers
    costs[0] += matrix / 4
    costs[-1] += matrix

    edges = _edges(costs, pp)
    return [range(start, stop) for start, stop in pairwise(edges)]


def _edges(costs: list[float], parts: int) -> list[int]:
    """Cut ``costs`` into contiguous parts with the least maximum; exact, by dynamic programming."""
    count = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[n]: (maximum cost, edges) of the first n blocks in the parts so far
    best: list[tuple[float, list[int]]] = [(total[n], [0, n]) for n in range(count + 1)]
    for part in range(2, parts + 1):
        best = [
            min(
                ((max(best[m][0], total[n] - total[m]), [*best[m][1], n])
                 for m in range(part - 1, n)),
                default=(float("inf"), []),
            )
            for n in range(count + 1)
        ]  # fmt: skip
    return best[count][1]
