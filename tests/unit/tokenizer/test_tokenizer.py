"""No character is lost, the same texts train the same bytes, and wrong input has its sentence."""

import itertools
import json
from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.tokenizer.files import META_FILE, MODEL_FILE
from llmtrain.tokenizer.sentence_piece import BOS_ID, EOS_ID, train_sentencepiece
from llmtrain.tokenizer.tokenizer import Tokenizer, load

WORDS = [
    "area",
    "volume",
    "perimeter",
    "orange",
    "quickly",
    "bringing",
    "telephone",
    "window",
    "jazz",
]
TEXTS = [
    f"def {a}_{b}(width, height={i}):\n    return {b} * {c}\n\nThe {a} of {c} is {i}.\t{b} {a}."
    for i, (a, b, c) in enumerate(itertools.permutations(WORDS, 3))
]
HARD = [
    "",
    " ",
    "\n",
    "\n\n\n a",
    "  two leading, two trailing  ",
    "a\r\nb\tc\vd\fe",
    "\u2581",
    "x\u2581 y\u2581\u2581",
    "\u2585 \u2047 \ufffd \ufeff",
    "\0a\0",
    "<s></s><unk><0x0A>",
    "日本語の文章。 中文\u3000",
    "e\u0301 \u00e9 \u00a0 \u2028 ﬁ Å Ⅷ",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0010ffff",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXTS, path, vocab_size=340)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder)


@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert BOS_ID not in ids
    assert EOS_ID not in ids


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    texts = TEXTS[:5] + HARD
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_ids_and_newlines(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 340
    assert tokenizer.eos_id == EOS_ID
    assert tokenizer.decode([EOS_ID, BOS_ID]) == ""
    assert len(tokenizer.encode("\n\n")) == 2
    assert len(tokenizer.encode("width * height")) < 14


def test_training_is_deterministic_and_silent(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = train_sentencepiece(iter(TEXTS), tmp_path / "elsewhere", vocab_size=340)
    assert capfd.readouterr() == ("", "")
    for name in (MODEL_FILE, META_FILE):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (folder / name).read_bytes()
    meta = json.loads((folder / META_FILE).read_text())
    assert meta["hash"] == again.hash == load(folder / MODEL_FILE).hash
    assert meta["sample"] == {
        "texts": len(TEXTS),
        "bytes": sum(len(text.encode()) for text in TEXTS),
    }


def test_unigram_and_a_limited_sample(tmp_path: Path) -> None:
    limited = train_sentencepiece(
        TEXTS, tmp_path, vocab_size=320, kind="unigram", max_sample_bytes=10_000
    )
    assert limited.decode(limited.encode("a\n  b")) == "a\n  b"
    assert json.loads((tmp_path / META_FILE).read_text())["sample"]["texts"] < 200


def test_vocabularies_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=259 leaves no room"):
        train_sentencepiece(TEXTS, tmp_path, vocab_size=259)
    with pytest.raises(DataError, match=r"5000 pieces cannot be trained .* use at most 2\d\d"):
        train_sentencepiece(["too little"], tmp_path, vocab_size=5_000)
    with pytest.raises(DataError, match=r"their characters alone take 30\d; use more, or lower"):
        train_sentencepiece(TEXTS, tmp_path, vocab_size=290)
    assert list(tmp_path.iterdir()) == []


def test_nothing_there_damaged_or_changed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer; expected a folder .*check the path$"):
        load(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"SentencePiece model \(11 bytes, .*; check the path or"):
        load(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match=r"holds tiktoken ranks, .*; rename it to NAME\.tiktoken"):
        load(tmp_path)
    other = train_sentencepiece(TEXTS[:200], tmp_path, vocab_size=320)
    (tmp_path / META_FILE).write_bytes((folder / META_FILE).read_bytes())
    assert other.hash != load(folder).hash
    with pytest.raises(DataError, match="was changed after it was trained"):
        load(tmp_path)
    (tmp_path / META_FILE).write_text("{")
    with pytest.raises(DataError, match=r"llmtrain_tokenizer\.json is no JSON \(.*; copy it again"):
        load(tmp_path)


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("a\ud800")
