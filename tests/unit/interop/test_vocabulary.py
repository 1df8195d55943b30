"""An import for another tokenizer: shared tokens keep their rows, new ones get means of pieces."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.checkpoint.weights import StoredWeights
from llmtrain.cli import main
from llmtrain.interop.huggingface import load_model
from llmtrain.interop.vocabulary import new_vocabulary
from llmtrain.tokenizer.spelling import spelling_of
from llmtrain.tokenizer.tokenizer import TokenizerKind, load, train
from tests.unit.interop.folders import config_of, write_folder
from tests.unit.tokenizer.test_tokenizer import TEXTS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OLD, NEW = 340, 355
UNIGRAM = 325


def size_of(kind: TokenizerKind) -> int:
    """Ids of the new tokenizer: the texts do not give a unigram model more."""
    return UNIGRAM if kind == "unigram" else NEW


def tokenizers(root: Path, old: TokenizerKind, new: TokenizerKind) -> tuple[Path, Path]:
    """Two tokenizers, of other texts and sizes."""
    train(TEXTS, root / "old", kind=old, vocab_size=OLD)
    train(TEXTS[3:], root / "new", kind=new, vocab_size=size_of(new))
    return root / "old", root / "new"


def folder_with(root: Path, tokenizer: Path, **fields: Any) -> dict[str, Tensor]:
    """A Hugging Face folder ``root/hf`` with that tokenizer."""
    weights = write_folder(root / "hf", config_of("llama", vocab_size=OLD, **fields))
    for path in tokenizer.iterdir():
        (root / "hf" / path.name).write_bytes(path.read_bytes())
    generation = {"temperature": 0.5, "max_new_tokens": 9, "pad_token_id": 7, "eos_token_id": [2]}
    (root / "hf" / "generation_config.json").write_text(json.dumps(generation))
    return weights


def stored(run: Path) -> dict[str, Tensor]:
    weights = StoredWeights(run / "checkpoints" / "step-000000000")
    found = {name: torch.zeros(shape) for name, shape in weights.shapes.items()}
    for name, tensor in found.items():
        for offsets, piece in weights.pieces(name):
            tensor[offsets[0] : offsets[0] + len(piece)] = piece
    return found


@pytest.mark.parametrize(
    ("old", "new", "tied"),
    [("bpe", "byte_bpe", False), ("byte_bpe", "unigram", True), ("byte_bpe", "byte_bpe", False)],
)
def test_rows_are_kept_or_means_of_pieces(
    tmp_path: Path, old: TokenizerKind, new: TokenizerKind, tied: bool
) -> None:
    first, second = tokenizers(tmp_path, old, new)
    before = folder_with(tmp_path, first, tie_word_embeddings=tied)
    run, out = tmp_path / "run", tmp_path / "out"
    words = [f"from={tmp_path}/hf", f"run={run}", f"tokenizer={second}", "vocab_multiple=64"]
    assert main(["import", *words]) == 0
    after = stored(run)
    own, other = load(first), load(second)
    known, wanted = spelling_of(first), spelling_of(second)
    kept = made = 0
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        assert after[name].shape == (384, 16)
        assert not after[name][size_of(new) :].any()
        assert after[name][other.eos_id].equal(before[name][own.eos_id])
        for i, token in enumerate(wanted):
            if token in known:
                kept += 1
                assert after[name][i].equal(before[name][known.index(token)])
            elif isinstance(token, bytes) and token.isascii():
                made += 1
                rows = before[name][own.encode(token.decode())]
                torch.testing.assert_close(after[name][i], rows.mean(dim=0))
    assert kept > 250
    assert made > 2
    same = [name for name in before if name not in (EMBEDDING, HEAD)]
    assert all(after[name].equal(before[name]) for name in same)

    # the export has the new tokenizer and its ids, and no padding
    assert main(["export", f"run={run}", f"to={out}", "dtype=auto"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (size_of(new), other.eos_id)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {
        "temperature": 0.5, "max_new_tokens": 9, "eos_token_id": other.eos_id,
    }  # fmt: skip
    ids = torch.tensor([other.encode("def compute(values):")])
    assert load_model(out)(ids).shape[-1] == size_of(new)


def test_every_id_spells_what_it_decodes_to(tmp_path: Path) -> None:
    kinds: tuple[TokenizerKind, ...] = ("bpe", "unigram", "byte_bpe")
    for kind in kinds:
        tokenizer = train(TEXTS, tmp_path / kind, kind=kind, vocab_size=UNIGRAM)
        spelling = spelling_of(tmp_path / kind)
        for text in (*TEXTS[:20], "Ünïcode 漢字 \U0001f469\n\tx"):
            spelled = [spelling[i] for i in tokenizer.encode(text)]
            assert b"".join(part for part in spelled if isinstance(part, bytes)) == text.encode()


def test_a_part_of_a_character_is_cut_by_bytes(tmp_path: Path) -> None:
    train(["漢字" * 50 + "abcdef " * 50], tmp_path / "new", kind="byte_bpe", vocab_size=262)
    train(TEXTS, tmp_path / "old", kind="byte_bpe", vocab_size=OLD)
    found = new_vocabulary(tmp_path / "old", tmp_path / "new")
    known, wanted = spelling_of(tmp_path / "old"), spelling_of(tmp_path / "new")
    parts = [t for t in wanted if isinstance(t, bytes) and len(t) > 1 and not t.isascii()]
    assert parts
    for token in parts:
        pieces = [known[i] for i in found.sources[wanted.index(token)]]
        assert b"".join(part for part in pieces if isinstance(part, bytes)) == token


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["import", f"from={tmp_path}/hf", f"run={tmp_path}/run", *words]) == 2
        assert not (tmp_path / "run").exists()
        return " ".join(capsys.readouterr().err.split())

    old, new = tokenizers(tmp_path, "byte_bpe", "byte_bpe")
    folder_with(tmp_path, old)
    assert "holds no tokenizer.model and no tokenizer.json" in refused(f"tokenizer={tmp_path}/x")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert "has no tokenizer, so nothing tells which token a row" in refused(f"tokenizer={new}")
