"""Byte-level BPE loses nothing, and the same texts train the same bytes."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.tokenizer.byte_level import train_byte_bpe
from llmtrain.tokenizer.encoders import PROBES
from llmtrain.tokenizer.files import CONFIG_FILE, JSON_FILE, META_FILE
from llmtrain.tokenizer.patterns import NAMES, PatternName
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
    f"def {a}_{b}(width={i}):\n    return {b} * {c}\n\nIt's the {a} of 2024, {i}.\t{b} {a}."
    for i, (a, b, c) in enumerate(itertools.permutations(WORDS, 3))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte_bpe")
    train_byte_bpe(TEXTS, path, vocab_size=340)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder)


@pytest.mark.parametrize("text", PROBES)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids  # the name of a special token is text


def test_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (340, 0)
    assert tokenizer.decode([0]) == ""
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode(" perimeter")) == 1
    assert tokenizer.encode_batch(TEXTS[:9]) == [tokenizer.encode(text) for text in TEXTS[:9]]


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_keeps_every_character(name: PatternName, tmp_path: Path) -> None:
    trained = train_byte_bpe(TEXTS[:50], tmp_path, vocab_size=280, pattern_name=name)
    for text in PROBES:
        assert trained.decode(trained.encode(text)) == text
    digits = len(trained.encode("\u0663" * 3))  # 2 bytes each, without merges
    assert digits == 6


def test_pattern_splits_digits(tmp_path: Path) -> None:
    texts = ["2024 2024 2024"] * 9
    grouped = train_byte_bpe(texts, tmp_path / "a", vocab_size=259, pattern_name="gpt4")
    single = train_byte_bpe(["ab ab 2024"] * 9, tmp_path / "b", vocab_size=259)
    assert len(grouped.encode("202")) == 1
    assert len(single.encode("202")) == 3


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    """Also in a process with another number of threads."""
    program = (
        "import json, sys; from llmtrain.tokenizer.byte_level import train_byte_bpe\n"
        "train_byte_bpe(json.load(sys.stdin), sys.argv[1], vocab_size=340)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], input=json.dumps(TEXTS), text=True,
        check=True, env={"RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    for name in (JSON_FILE, CONFIG_FILE, META_FILE):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    meta = json.loads((folder / META_FILE).read_text())
    assert meta["hash"] == load(tmp_path).hash
    assert meta["sample"]["texts"] == len(TEXTS)


def test_vocabularies_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size=257 leaves no room beside 257"):
        train_byte_bpe(TEXTS, tmp_path, vocab_size=257)
    with pytest.raises(DataError, match=r"5000 tokens cannot be .* on 1 texts .* use at most 262"):
        train_byte_bpe(["little"], tmp_path, vocab_size=5_000)
    assert list(tmp_path.iterdir()) == []


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_eos_of_a_foreign_json(folder: Path, tmp_path: Path) -> None:
    plain = json.loads((folder / JSON_FILE).read_text())
    plain["model"]["vocab"]["<|end|>"] = 345
    plain["added_tokens"].append({**plain["added_tokens"][0], "id": 345, "content": "<|end|>"})
    path = tmp_path / JSON_FILE
    path.write_text(json.dumps(plain))
    assert (load(path).vocab_size, load(path).eos_id) == (346, 0)  # ids may leave gaps
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": {"content": "<|end|>"}}')
    assert load(path).eos_id == 345
    (tmp_path / CONFIG_FILE).write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(DataError, match=r"has no end-of-text piece \(<\|im_end\|>\)"):
        load(path)
    (tmp_path / CONFIG_FILE).write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is no JSON object; copy it again"):
        load(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer.json"):
        load(path)
