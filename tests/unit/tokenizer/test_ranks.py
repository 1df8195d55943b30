"""Rank files give the ids tiktoken gives, and what is wrong with one is a sentence."""

import base64
import json
from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.tokenizer.encoders import PROBES
from llmtrain.tokenizer.tokenizer import Tokenizer, load
from tests.ranks import SPECIAL, write_ranks

TEXTS = ["It's 12345 tokens,\n\n  the theme then.", "日本語 <|endoftext|> \u2581", *PROBES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    write_ranks(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load(folder)


def test_ids_are_those_of_tiktoken(folder: Path, tokenizer: Tokenizer) -> None:
    import tiktoken

    lines = (folder / "small.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    pattern = (  # as tiktoken_ext.openai_public has it for cl100k_base
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
        r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    theirs = tiktoken.Encoding(
        "reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens=SPECIAL
    )
    assert tokenizer.encode_batch(TEXTS) == [theirs.encode_ordinary(text) for text in TEXTS]
    assert any(max(ids, default=0) > 255 for ids in tokenizer.encode_batch(TEXTS))


def test_round_trip_and_special_tokens(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
    assert tokenizer.eos_id == SPECIAL["<|endoftext|>"]
    assert tokenizer.vocab_size == max(SPECIAL.values()) + 1
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_hash_covers_ranks_and_description(folder: Path, tmp_path: Path) -> None:
    write_ranks(tmp_path)
    assert load(tmp_path / "small.tiktoken").hash == load(folder).hash
    write_ranks(tmp_path, pattern="gpt2")
    assert load(tmp_path).hash != load(folder).hash


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (None, r"small\.json is missing; a rank file needs it"),
        ("[]", r"does not describe a rank file"),
        ('{"pattern": "gpt4", "special_tokens": {}, "eos_token": "<eos>"}', r"none of its special"),
        ('{"pattern": "(", "special_tokens": {"e": 999}, "eos_token": "e"}', r"tiktoken refuses"),
    ],
)
def test_what_is_wrong_with_the_description(
    tmp_path: Path, description: str | None, said: str
) -> None:
    write_ranks(tmp_path)
    (tmp_path / "small.json").unlink()
    if description is not None:
        (tmp_path / "small.json").write_text(description)
    with pytest.raises(DataError, match=said):
        load(tmp_path)


def test_damaged_ranks_and_several(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    path = tmp_path / "small.tiktoken"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:200]))
    with pytest.raises(DataError, match="has no token for 56 of the 256 bytes"):
        load(tmp_path)
    path.write_text("".join([*lines[:7], "?? 7\n"]))
    with pytest.raises(DataError, match=r"line 8: found b'\?\? 7'"):
        load(tmp_path)
    (tmp_path / "other.tiktoken").write_text(json.dumps(0))
    with pytest.raises(DataError, match=r"holds 2 rank files \(other.tiktoken, small.tiktoken\)"):
        load(tmp_path)
