"""Short documents in bins, whose right answer is known."""

import pytest
import torch

from llmtrain.ops.attention.bins import BIN_TOKENS, bins_of


def test_every_token_of_a_short_document_has_a_slot_beside_its_document() -> None:
    bins = bins_of((0, 40, 60, 200, 200, 230), window=0, softcap=0.0)
    assert bins is not None
    assert bins.tokens.tolist() == [*range(60), *range(200, 230)]  # 140 tokens are not short
    assert bins.slots.tolist() == [*range(60), *range(BIN_TOKENS, BIN_TOKENS + 30)]
    x = torch.randn(230, 2)
    assert torch.equal(bins.taken(bins.filled(x)), x[bins.tokens])
    seen = bins.spec.mask[:, 0]
    assert seen[0, 45].nonzero().flatten().tolist() == list(range(40, 46))
    assert seen[1, 29].nonzero().flatten().tolist() == list(range(30))
    assert not seen[1, 30:, :30].any()  # what fills up
    assert not bins.spec.blind.any()


@pytest.mark.parametrize("starts", [(0, BIN_TOKENS), (0, BIN_TOKENS + 1, 2 * BIN_TOKENS + 2)])
def test_one_short_document_alone_needs_no_bin(starts: tuple[int, ...]) -> None:
    assert bins_of(starts, window=0, softcap=0.0) is None
