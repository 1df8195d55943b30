"""The fast encoder gives the ids of the reference, or is not used and says why."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.errors import DataError
from llmtrain.tokenizer import encoders
from llmtrain.tokenizer.encoders import PROBES, TokenBatch, choose_encoder, make_encoder
from llmtrain.tokenizer.patterns import NAMES
from llmtrain.tokenizer.tokenizer import Tokenizer, load, train
from tests.ranks import write_ranks
from tests.texts import TEXTS

SAMPLE = [f"{text}\n\n{i} it's {text[:40]}" for i, text in enumerate(TEXTS.values())]


@pytest.fixture(scope="module", params=[*NAMES, "ranks", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "ranks":
        write_ranks(folder)
        return load(folder)
    kind = "unigram" if request.param == "sentencepiece" else "byte_bpe"
    pattern = request.param if kind == "byte_bpe" else "gpt2"
    return train(SAMPLE * 9, folder, kind=kind, vocab_size=420, pattern=pattern)


def test_chosen_encoder_gives_the_ids_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    choice = choose_encoder(tokenizer, SAMPLE)
    assert choice.fast != tokenizer.library.startswith("sentencepiece")
    assert choice.reason == ""
    assert choice.name.startswith("fastokens" if choice.fast else "sentencepiece")
    texts = [*PROBES, *SAMPLE]
    for fast in {choice.fast, False}:
        batch = make_encoder(tokenizer, fast=fast).encode(texts)
        found = [
            batch.ids[low:high].tolist()
            for low, high in zip(batch.offsets, batch.offsets[1:], strict=False)
        ]
        assert found == tokenizer.encode_batch(texts)
        assert make_encoder(tokenizer, fast=fast).encode([]).offsets.tolist() == [0]


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte_bpe")
    return train(SAMPLE, folder, kind="byte_bpe", vocab_size=300)


def test_other_ids_are_found_and_told(byte_bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(encoders.FastEncoder):
        def encode(self, texts: Any) -> TokenBatch:
            batch = super().encode(texts)
            ids = batch.ids.copy()
            ids[batch.offsets[-2] :] += 1  # the last text alone
            return batch._replace(ids=ids)

    monkeypatch.setattr(encoders, "FastEncoder", Wrong)
    choice = choose_encoder(byte_bpe, SAMPLE)
    assert not choice.fast
    assert choice.name == byte_bpe.library
    number = len(PROBES) + len(SAMPLE)
    assert f"other ids than {byte_bpe.library} for text {number} of {number}" in choice.reason


def test_missing_package_and_small_budget(
    byte_bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "more than half of memory_gib=0.0931" in choose_encoder(byte_bpe, [], 10**8).reason
    assert choose_encoder(byte_bpe, [], 2 * 10**8).fast
    monkeypatch.setitem(sys.modules, "fastokens", None)
    choice = choose_encoder(byte_bpe, SAMPLE)
    assert not choice.fast
    assert "fastokens is not installed: pip install" in choice.reason
    with pytest.raises(DataError, match="is not installed"):
        make_encoder(byte_bpe, fast=True)


def test_a_kind_fastokens_does_not_know(tmp_path: Path) -> None:
    train(SAMPLE, tmp_path, kind="bpe", vocab_size=420)
    tokenizer = load(tmp_path)
    assert choose_encoder(tokenizer, []) == (False, tokenizer.library, "")
    with pytest.raises(DataError, match="does not encode sentencepiece models"):
        make_encoder(tokenizer, fast=True)


def test_lone_surrogate(byte_bpe: Tokenizer) -> None:
    for fast in (True, False):
        with pytest.raises(DataError, match="lone surrogate"):
            make_encoder(byte_bpe, fast=fast).encode(["a\ud800"])


def test_every_category_of_characters_is_cut_alike(byte_bpe: Tokenizer) -> None:
    """Both packages carry their own tables of Unicode: one character in 61, in five contexts."""
    points = [c for c in range(0, 0x110000, 61) if not 0xD800 <= c <= 0xDFFF]
    texts = [f"ab{chr(c)}cd {chr(c)}1{chr(c)}{chr(c)} !{chr(c)}!\n{chr(c)}\n x" for c in points]
    fast, slow = (make_encoder(byte_bpe, fast=fast).encode(texts) for fast in (True, False))
    assert np.array_equal(fast.offsets, slow.offsets)
    assert np.array_equal(fast.ids, slow.ids)
