"""The loss of direct preference optimisation, arXiv:2305.18290, equation 7: no second model runs.

A pair is two texts that stand one behind the other in a row: the chosen one is the document that
holds a loss weight, 1 at one of its targets, the rejected one is the document behind it. The engine
divides by the sum of these weights, so it gives the mean over the pairs of the global batch.

The gradient of a pair is a weighted cross entropy whose weights depend on the pair's own loss, so
the head runs twice: without gradients for the log-probabilities, then with the weights. Logits of
all tokens never exist, and what is true of ``chunked_linear_cross_entropy`` on every layout is true
here: a sharded vocabulary, a pipeline's last stage, gathered parameters.

    loss_function = preference_loss(DpoConfig(beta=0.1), num_sources=1, chunk_tokens=1024)
    loss_sum, sums = loss_function(hidden, head, batch)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.objective import DpoConfig
from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import LossFunction
from llmtrain.ops.cross_entropy import CrossEntropyStep, chunked_linear_cross_entropy, torch_step
from llmtrain.train.loss import Observer, by_source, head_matrix

PAIR_SUMS = ("chosen_reward", "rejected_reward", "accuracy", "chosen_logp", "rejected_logp")
"""What is summed over pairs, as ``pair_NAME_sum`` [num_sources] among the sums of the loss."""


def preference_loss(
    config: DpoConfig,
    num_sources: int,
    chunk_tokens: int,
    observe: Observer | None = None,
    step: CrossEntropyStep = torch_step,
) -> LossFunction:
    """Make the loss of pairs from ``num_sources`` sources.

    Its sum is over pairs. Metric sums, all [num_sources]: ``source_loss_sum`` and
    ``source_tokens`` (which counts pairs here), and the PAIR_SUMS. A reward is beta times what the
    log-probability of an answer is above the reference's; the accuracy counts the pairs whose
    chosen answer has the higher reward. ``observe`` is shown the cross entropy of the answers'
    tokens, each with weight 1, of micro-batches whose rows are numbered; ``step`` makes losses and
    gradient of a chunk of logits.
    """

    def loss(hidden: Tensor, head: nn.Module, batch: StepBatch) -> tuple[Tensor, dict[str, Tensor]]:
        weight, partition = head_matrix(head)

        def cross_entropy(weights: Tensor | None) -> tuple[Tensor, Tensor]:
            total, losses, _ = chunked_linear_cross_entropy(
                hidden.flatten(0, 1), weight, batch.targets.flatten(),
                None if weights is None else weights.flatten(), chunk_tokens, partition, step=step,
            )  # fmt: skip
            return total, losses.view_as(batch.targets)

        with torch.no_grad():
            _, losses = cross_entropy(None)
            if observe is not None and batch.row_ids is not None:
                observe(losses, replace(batch, loss_weight=(batch.targets >= 0).float()))
            pairs = Pairs(losses, batch)
            value, slope, sums = pairs.scored(config)
            weights = pairs.token_weights(slope)
        total = value.sum().to(losses.dtype)
        if torch.is_grad_enabled():
            surrogate, _ = cross_entropy(weights)
            total = total + (surrogate - surrogate.detach())
        return total, {
            name: by_source(one.to(losses.dtype), batch.source_ids, num_sources)
            for name, one in sums.items()
        }

    return loss


def reward_fields(sums: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Means over the pairs of all sources for a row of metrics; none for another loss.

    ``rewards`` has chosen, rejected, margin and accuracy, ``logps`` chosen and rejected.
    """
    if f"pair_{PAIR_SUMS[0]}_sum" not in sums or not (count := sum(sums["source_tokens"])):
        return {}
    mean = {name: sum(sums[f"pair_{name}_sum"]) / count for name in PAIR_SUMS}
    chosen, rejected = mean["chosen_reward"], mean["rejected_reward"]
    fields = {
        "rewards": {
            "chosen": chosen, "rejected": rejected, "margin": chosen - rejected,
            "accuracy": mean["accuracy"],
        },
        "logps": {"chosen": mean["chosen_logp"], "rejected": mean["rejected_logp"]},
    }  # fmt: skip
    return fields if all(map(math.isfinite, mean.values())) else {}


def held_out_fields(names: Sequence[str], sums: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean margin and accuracy of held-out pairs by source; none for another loss."""
    fields: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        own = {key: values[i : i + 1] for key, values in sums.items() if isinstance(values, list)}
        for part, value in reward_fields(own).get("rewards", {}).items():
            if part in ("margin", "accuracy"):
                fields.setdefault(f"validation_{part}", {})[name] = value
    return fields


class Pairs:
    """Log-probabilities of the pairs of a micro-batch, by row and number of the chosen text."""

    def __init__(self, losses: Tensor, batch: StepBatch) -> None:
        """Take the cross entropy of each token, [B, S]: 0 where is no target."""
        self._document_ids = batch.document_ids
        reference = torch.zeros_like(losses) if batch.reference is None else batch.reference
        logps = document_sums(-losses, batch)
        ratios = logps - document_sums(reference, batch)
        self.present = document_sums(batch.loss_weight, batch)[:, :-1]
        """Weight of the pair whose chosen text has the number, 0 where none has: [B, N]."""
        self.logps = logps[:, :-1], logps[:, 1:]
        """Of chosen and rejected answers, [B, N] each."""
        self.ratios = ratios[:, :-1], ratios[:, 1:]
        """The same less the reference's."""

    def scored(self, config: DpoConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Give loss of each pair, its slope over the margin of log-ratios, and sums; all [B, N]."""
        chosen, rejected = (config.beta * ratio for ratio in self.ratios)
        margin, smoothing = chosen - rejected, config.label_smoothing
        value = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        slope = config.beta * (smoothing * margin.sigmoid() - (1 - smoothing) * (-margin).sigmoid())
        found = (chosen, rejected, (margin > 0).to(margin.dtype), *self.logps)
        named = {"source_loss_sum": value, "source_tokens": torch.ones_like(value)}
        named |= {f"pair_{name}_sum": one for name, one in zip(PAIR_SUMS, found, strict=True)}
        counted = {name: self._of_pairs(one) for name, one in named.items()}
        return counted["source_loss_sum"], self._of_pairs(slope), counted

    def token_weights(self, slope: Tensor) -> Tensor:
        """Give every token [B, S] the weight of its cross entropy in the gradient.

        The log-probability of a text is minus the sum of its cross entropies: tokens of the chosen
        text get minus the slope of their pair, those of the rejected one the slope.
        """
        of_document = F.pad(-slope, (0, 1)) + F.pad(slope, (1, 0))
        return of_document.gather(1, self._document_ids.long())

    def _of_pairs(self, values: Tensor) -> Tensor:
        """Weigh the values of pairs, and put 0 where is none, whatever was computed there."""
        return torch.where(self.present == 0, 0.0, values * self.present)


def document_sums(values: Tensor, batch: StepBatch) -> Tensor:
    """Sum values of tokens [B, S] by document of the row, float64 [B, N + 1].

    N is the number of the row's last document, or more. The numbers of a row never fall. A sum
    goes from the first token of its document to the last: what else is in the row, and the device,
    are nothing to it.
    """
    ids = batch.document_ids.contiguous()
    count = int(ids.max()) + 1 if batch.extent is None else batch.extent[0]
    numbers = torch.arange(max(2, count) + 1, device=ids.device, dtype=ids.dtype)
    edges = torch.searchsorted(ids, numbers.expand(len(ids), -1).contiguous())
    # its sizes are those of the edges, which a check would wait for the device to see
    return torch.segment_reduce(
        values.double().contiguous(), "sum", offsets=edges, axis=1, unsafe=True, initial=0.0
    )
