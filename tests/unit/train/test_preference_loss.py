"""The preference loss against autograd through all logits, in double precision."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.config.objective import DpoConfig
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.train.preference_loss import document_sums, preference_loss
from tests.host_waits import NoHostWait, as_copied

VOCABULARY = 11
ROWS = (
    ((4, 3), (2, 5)),
    ((6, 7),),
)
"""Lengths of chosen and rejected texts of the pairs of two rows; what is left is padding."""
LENGTH = 16


def pair_batch() -> StepBatch:
    """Two pairs in the first row, one in the second; the first token of a text is its prompt."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    document_ids, positions = torch.zeros(2, 2, LENGTH, dtype=torch.int32)
    weight, reference = torch.zeros(2, 2, LENGTH)
    for row, pairs in enumerate(ROWS):
        start = 0
        for number, length in enumerate(length for pair in pairs for length in pair):
            here = slice(start, start + length)
            document_ids[row, start:] = number
            positions[row, here] = torch.arange(length)
            targets[row, start : start + length - 1] = tokens[row, start + 1 : start + length]
            weight[row, start + length - 2] = 1.0 - number % 2
            reference[row, start + length - 2] = -2.0 * length - 0.3 * number
            start += length
        document_ids[row, start:] = len(pairs) * 2
    return StepBatch(
        tokens=tokens, targets=targets, positions=positions, document_ids=document_ids,
        loss_weight=weight, source_ids=torch.tensor([1, 0], dtype=torch.int32),
        num_microbatches=1, reference=reference,
    )  # fmt: skip


def plain(logits: Tensor, batch: StepBatch, config: DpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen and rejected rewards of all pairs in order, from whole logits."""
    logps = -F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
    ).view(batch.targets.shape)  # fmt: skip
    assert batch.reference is not None
    ratios = []
    for row, pairs in enumerate(ROWS):
        for number in range(2 * len(pairs)):
            own = batch.document_ids[row] == number
            ratios.append(logps[row, own].sum() - batch.reference[row, own].sum())
    chosen, rejected = (
        config.beta * torch.stack(ratios[::2]),
        config.beta * torch.stack(ratios[1::2]),
    )
    z, smoothing = chosen - rejected, config.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    return losses, chosen, rejected


@pytest.mark.parametrize("config", [DpoConfig(beta=0.7), DpoConfig(beta=0.2, label_smoothing=0.2)])
def test_loss_gradients_and_sums_equal_autograd_in_fp64(config: DpoConfig) -> None:
    batch = pair_batch()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, LENGTH, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    head = nn.Linear(6, VOCABULARY, bias=False).double()

    total, sums = preference_loss(config, num_sources=3, chunk_tokens=5)(hidden, head, batch)

    losses, chosen, rejected = plain(head(hidden), batch, config)
    torch.testing.assert_close(total, losses.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(total / 3, [hidden, head.weight]),
        torch.autograd.grad(losses.mean(), [hidden, head.weight]), rtol=1e-11, atol=1e-15,
    )  # fmt: skip
    by_source = [[2], [0, 1]]
    for name, values in {
        "source_loss_sum": losses, "pair_chosen_reward_sum": chosen,
        "pair_rejected_reward_sum": rejected, "pair_accuracy_sum": (chosen > rejected).double(),
    }.items():  # fmt: skip
        want = torch.stack([values[own].sum() for own in by_source] + [torch.zeros(()).double()])
        torch.testing.assert_close(sums[name], want.detach())
        assert not sums[name].requires_grad
    assert sums["source_tokens"].tolist() == [1, 2, 0]


def test_sums_of_documents_are_of_their_tokens_alone() -> None:
    """Bit by bit, wherever a document stands; more numbers than there are documents give 0."""
    values = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(40, dtype=torch.int32).expand(2, -1) // 7
    batch = replace(pair_batch(), document_ids=ids, extent=(9, 7))
    found = document_sums(values, batch)
    member = ids[:, None, :] == torch.arange(9)[:, None]
    want = torch.where(member, values.double()[:, None], 0.0).sum(dim=2)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
    moved = replace(batch, document_ids=ids[:, 7:])
    assert torch.equal(document_sums(values[:, 7:], moved)[:, 1:6], found[:, 1:6])


def test_a_document_sum_takes_the_memory_of_its_tokens() -> None:
    """1.3 GB where every document had a row of its own."""
    ids = (torch.arange(32768, dtype=torch.int32) // 55).expand(8, -1)
    batch = replace(pair_batch(), document_ids=ids)
    with _Sizes() as sizes:
        document_sums(torch.ones(8, 32768), batch)
    assert max(sizes.elements) == 8 * 32768


class _Sizes(TorchDispatchMode):
    """Notes how many elements what operations give has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.elements.append(found.numel() if isinstance(found, Tensor) else 0)
        return found


def test_without_gradients_the_value_is_the_same_and_nothing_has_a_graph() -> None:
    batch, head = pair_batch(), nn.Linear(6, VOCABULARY, bias=False)
    hidden = torch.randn(2, LENGTH, 6)
    loss = preference_loss(DpoConfig(), num_sources=2, chunk_tokens=64)
    trained, _ = loss(hidden, head, batch)
    with torch.no_grad():
        scored, _ = loss(hidden, head, batch)
    assert torch.equal(trained, scored)
    assert trained.requires_grad
    assert not scored.requires_grad


def test_numbered_rows_are_shown_with_every_answer_counting() -> None:
    seen = list[tuple[Tensor, StepBatch]]()
    loss = preference_loss(
        DpoConfig(), 2, 64, observe=lambda losses, batch: seen.append((losses, batch))
    )
    hidden, head = torch.randn(2, LENGTH, 6), nn.Linear(6, VOCABULARY, bias=False)
    loss(hidden, head, pair_batch())
    assert not seen
    loss(hidden, head, replace(pair_batch(), row_ids=torch.arange(2, dtype=torch.int32)))
    [(losses, batch)] = seen
    answered = batch.targets != IGNORE_INDEX
    assert torch.equal(batch.loss_weight > 0, answered)
    want = F.cross_entropy(head(hidden).flatten(0, 1), batch.targets.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), want)
    assert batch.loss_weight.sum() == answered.sum()


def test_rows_of_padding_alone_cost_nothing_and_give_no_gradient() -> None:
    batch = pair_batch()
    empty = replace(
        batch, targets=torch.full_like(batch.targets, IGNORE_INDEX),
        loss_weight=torch.zeros(2, LENGTH), document_ids=torch.zeros(2, LENGTH, dtype=torch.int32),
    )  # fmt: skip
    hidden, head = torch.randn(2, LENGTH, 6, requires_grad=True), nn.Linear(6, VOCABULARY)
    total, sums = preference_loss(DpoConfig(), 2, 64)(hidden, head, empty)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert total.item() == 0.0
    assert not gradient.any()
    assert not any(value.any() for value in sums.values())


def test_a_loss_that_is_not_finite_stays_so() -> None:
    batch = replace(pair_batch(), loss_weight=pair_batch().loss_weight * torch.nan)
    total, _ = preference_loss(DpoConfig(), 2, 64)(
        torch.randn(2, LENGTH, 6), nn.Linear(6, VOCABULARY, bias=False), batch
    )
    assert total.isnan()


def test_the_host_does_not_wait_for_what_a_device_was_given() -> None:
    batch, hidden = as_copied(pair_batch()), torch.randn(2, LENGTH, 6, requires_grad=True)
    head, loss = nn.Linear(6, VOCABULARY, bias=False), preference_loss(DpoConfig(), 2, 64)
    with NoHostWait():
        total, _ = loss(hidden, head, batch)
        total.backward()
    assert hidden.grad is not None
