"""Fill-in-the-middle: nothing but the order changes, and nobody's share of the work decides it."""

import numpy as np
import pytest
import torch

from llmtrain.config.data import FimConfig
from llmtrain.data.assemble import assemble_windows
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.fim import FillInMiddle
from llmtrain.data.order import ConcatOrder, SourceOrder
from llmtrain.data.pack_blocks import write_packing
from llmtrain.data.packing import PackedOrder
from llmtrain.errors import ConfigError
from tests.stores import EOS_ID, pack_store, write_store

WINDOW = 64
PRE, MID, SUF = 31_001, 31_002, 31_003


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceOrder]:
    """Documents of consecutive numbers, so that a row tells what was moved."""
    lengths = np.random.default_rng(0).integers(2, 90, 200)
    documents = [list(range(100 * i + 3, 100 * i + 3 + n)) for i, n in enumerate(lengths.tolist())]
    store = write_store(tmp_path_factory.mktemp("a"), documents)
    write_packing(store, pack_store(store, WINDOW))
    return {
        "concat": ConcatOrder(store, "a", seed=1, window_tokens=WINDOW),
        "best_fit": PackedOrder(store, "a", seed=1, window_tokens=WINDOW),
    }


def fim(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 1) -> FillInMiddle:
    config = FimConfig(rate=rate, spm_rate=spm_rate, prefix_id=PRE, middle_id=MID, suffix_id=SUF)
    return FillInMiddle(config, seed=seed, source_names=("a",))


def rows(
    order: SourceOrder,
    windows: np.ndarray,
    given: FillInMiddle | None,
    epoch: int = 0,
    length: int = WINDOW,
) -> StepBatch:
    return assemble_windows(
        [order], np.zeros(len(windows), np.int32), windows, unit_tokens=WINDOW,
        sequence_length=length, num_microbatches=1, fim=given,
        epochs=np.full(len(windows), epoch),
    )  # fmt: skip


def restored(text: list[int]) -> list[int]:
    """Put the parts of a rearranged text back."""
    body, ends = (text[:-1], text[-1:]) if text[-1] == EOS_ID else (text, [])
    suffix_at, middle_at = body.index(SUF), body.index(MID)
    prefix, suffix, rest = body[1:suffix_at], body[suffix_at + 1 : middle_at], body[middle_at + 1 :]
    return [*prefix, *rest, *suffix, *ends]  # the suffix first: no prefix, all of it in the rest


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
@pytest.mark.parametrize("length", [WINDOW, 32])
@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_every_document_comes_back(
    orders: dict[str, SourceOrder], kind: str, length: int, spm_rate: float
) -> None:
    order = orders[kind]
    windows = np.arange(order.num_windows)
    plain = rows(order, windows, None, length=length)
    batch = rows(order, windows, fim(spm_rate=spm_rate), length=length)
    for name in ("positions", "document_ids", "source_ids"):
        assert torch.equal(getattr(plain, name), getattr(batch, name))
    changed = 0
    for row in range(len(plain.tokens)):
        for document in plain.document_ids[row].unique().tolist():
            own = plain.document_ids[row] == document
            before, after = plain.tokens[row][own].tolist(), batch.tokens[row][own].tolist()
            targets = batch.targets[row][own].tolist()
            if len(before) < 8 or before[0] == 0:
                assert after == before
                assert targets == plain.targets[row][own].tolist()
                continue
            changed += 1
            ends = before[-1] == EOS_ID
            kept = before[: len(before) - 3 - ends] + before[len(before) - ends :]
            assert after[0] == PRE
            assert sorted(after) == sorted([*kept, PRE, MID, SUF])
            assert restored(after) == kept
            assert targets == [*after[1:], IGNORE_INDEX]
    assert changed > 50
    assert torch.equal(batch.loss_weight, (batch.targets != IGNORE_INDEX).float())


def test_it_is_the_same_whoever_reads(orders: dict[str, SourceOrder]) -> None:
    windows = np.arange(40)
    whole = rows(orders["concat"], windows, fim(0.5))
    parts = [rows(orders["concat"], part, fim(0.5)) for part in np.array_split(windows, 3)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    others = [
        rows(orders["concat"], windows, fim(0.5), epoch=1),
        rows(orders["concat"], windows, fim(0.5, seed=2)),
    ]
    assert all(not torch.equal(whole.tokens, other.tokens) for other in others)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_shares_are_those_asked_for(orders: dict[str, SourceOrder], rate: float) -> None:
    order = orders["best_fit"]
    windows = np.arange(order.num_windows)
    long = (order.pieces(windows).length >= 8).sum()
    batches = [rows(order, windows, fim(rate), epoch=epoch) for epoch in range(10)]
    turned = sum(int((batch.tokens == PRE).sum()) for batch in batches)
    first = sum(int(((b.tokens[:, :-1] == PRE) & (b.tokens[:, 1:] == SUF)).sum()) for b in batches)
    assert turned / (10 * long) == pytest.approx(rate, rel=0.15)
    assert first / turned == pytest.approx(0.5, abs=0.1)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        FimConfig(rate=0.0, spm_rate=2.0, prefix_id=5, middle_id=5, suffix_id=-1)
    text = str(caught.value)
    for part in ("rate=0.0 must be above 0", "spm_rate=2.0", "suffix_id=-1", "must differ"):
        assert part in text
