"""Pairs keep together in batches, and each is told to the loss once, with its own reference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.mixture import ConstantMixture
from llmtrain.data.batch import StepBatch
from llmtrain.data.indexed import Int64Array
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.loader import Batches
from llmtrain.data.mixture import Mixture
from llmtrain.data.packing import PackedOrder
from llmtrain.data.pairs import PairBatches, PairStore, _count_unpaired, places_of
from llmtrain.data.plan import BatchPlan, StepSchedule
from llmtrain.data.roles import ANSWER, SECOND, RoleArray, texts
from llmtrain.data.shares import share_schedule
from llmtrain.data.store import ShardWriter, TokenStore, write_manifest
from llmtrain.errors import DataError
from tests.preferences import make_pairs

LENGTH = 32


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """Pairs whose reference tells their number: pair p has -p - 1 and -p - 1.5."""
    found = PairStore(make_pairs(tmp_path_factory.mktemp("pairs"), 3), LENGTH)
    chosen = -1.0 - np.arange(found.num_pairs, dtype=np.float32)
    found.reference = np.stack([chosen, chosen - 0.5], axis=1)
    return found


def seen_in(batch: StepBatch, pairs: PairStore) -> list[int]:
    """Numbers of the pairs a batch tells of, after looking at all that it says of them."""
    assert batch.reference is not None
    numbers = []
    for row, column in batch.loss_weight.nonzero().tolist():
        number = int(-1 - batch.reference[row, column].item())
        numbers.append(number)
        first = int(batch.document_ids[row, column])
        start, end = pairs.store.document_span(number)
        tokens, roles = pairs.store.tokens(start, end), pairs.store.roles(start, end)
        for second, part in enumerate(texts(roles)):
            own = (batch.document_ids[row] == first + second).nonzero()[:, 0]
            assert batch.tokens[row, own].tolist() == tokens[part].tolist()
            answers = tokens[part][(roles[part] & ANSWER) > 0].tolist()
            targets = batch.targets[row, own]
            assert targets[targets >= 0].tolist() == answers
            said = batch.reference[row, own]
            assert said[said != 0].tolist() == [-1 - number - 0.5 * second]
            assert said[int((targets >= 0).nonzero().max())] != 0
    assert set(batch.loss_weight.unique().tolist()) <= {0.0, 1.0}
    assert int((batch.reference != 0).sum()) == 2 * len(numbers)
    return numbers


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_held_out_batches_show_every_pair_once(pairs: PairStore, dp_size: int) -> None:
    found = []
    for rank in range(dp_size):
        batches = PairBatches(
            {"held": pairs}, sequence_length=LENGTH, micro_batch_size=2, num_microbatches=2,
            dp_rank=rank, dp_size=dp_size,
        )  # fmt: skip
        for index, batch in enumerate(batches):
            assert batch.tokens.shape == (4, LENGTH)
            numbers = seen_in(batch, pairs)
            parts = [places_of(batch, one, pieces) for one, pieces in batches.parts(index)]
            assert sorted(numbers) == sorted(n for p in parts for n in p.documents.tolist())
            found += numbers
    assert sorted(found) == list(range(pairs.num_pairs))


def test_an_epoch_of_training_shows_every_pair_once(pairs: PairStore) -> None:
    order = PackedOrder(pairs.store, "pairs", seed=1, window_tokens=LENGTH)
    schedule = share_schedule(
        ConstantMixture(), {"pairs": order.num_windows}, unit_tokens=LENGTH, num_tokens=10**6
    )
    steps = StepSchedule(LENGTH, LENGTH, (), ())
    plan = BatchPlan({"pairs": order}, Mixture(schedule), steps, seed=1)
    batches = Batches(plan, micro_batch_size=1, prefetch=0, pairs=[pairs])
    found = [n for step in range(order.num_windows) for n in seen_in(batches.at(step), pairs)]
    assert sorted(found) == list(range(pairs.num_pairs))
    assert found != sorted(found)


def test_no_more_windows_than_asked_for(pairs: PairStore) -> None:
    batches = PairBatches(
        {"held": pairs}, sequence_length=LENGTH, micro_batch_size=2, max_windows=3
    )
    rows = sum(int(batch.loss_weight.any(dim=1).sum()) for batch in batches)
    assert rows == 3


def store_of(folder: Path, roles: Sequence[Sequence[int]]) -> TokenStore:
    with ShardWriter(folder, 0, vocab_size=9, eos_id=2) as writer:
        for number, own in enumerate(roles):
            writer.add([5] * (len(own) - 1), DocumentRecord(id=f"{number:032x}"), own)
    write_manifest(folder, [writer.info], tokenizer_hash="0" * 64, vocab_size=9, eos_id=2)
    return TokenStore.open(folder)


GOOD = [0, ANSWER, SECOND, SECOND | ANSWER]


@pytest.mark.parametrize(
    "bad",
    [
        [0, ANSWER, ANSWER],
        [0, 0, SECOND, SECOND | ANSWER],
        [0, ANSWER, SECOND, SECOND],
        [ANSWER, 0, SECOND, SECOND | ANSWER],
    ],
    ids=["one text", "no chosen answer", "no rejected answer", "only a first token"],
)
@pytest.mark.parametrize("block_tokens", [1, 8, 1 << 22])
def test_documents_that_are_no_pair_are_counted(
    tmp_path: Path, bad: list[int], block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.data.pairs._BLOCK_TOKENS", block_tokens)
    PairStore(store_of(tmp_path / "good", [GOOD, GOOD]), LENGTH)
    with pytest.raises(DataError, match="2 of 3 documents that are no pair of answers"):
        PairStore(store_of(tmp_path / "bad", [bad, GOOD, bad]), LENGTH)


def test_no_more_roles_than_a_block_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sizes = store_of(tmp_path, [GOOD] * 9), list[int]()

    def count(roles: RoleArray, starts: Int64Array) -> int:
        sizes.append(len(roles))
        return _count_unpaired(roles, starts)

    monkeypatch.setattr("llmtrain.data.pairs._BLOCK_TOKENS", 10)
    monkeypatch.setattr("llmtrain.data.pairs._count_unpaired", count)
    PairStore(store, LENGTH)
    assert sizes == [8, 8, 8, 8, 4]


def test_pairs_longer_than_a_window_are_counted(tmp_path: Path) -> None:
    store = store_of(tmp_path / "long", [GOOD, [0, *GOOD], GOOD])
    PairStore(store, 5)
    with pytest.raises(DataError, match=r"1 of 3 pairs .* longer than .*=4, the longest of 5 tok"):
        PairStore(store, 4)
