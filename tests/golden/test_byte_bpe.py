"""The byte-level BPE trained here is a tokenizer of transformers, with the same ids."""

from pathlib import Path

from llmtrain.tokenizer.byte_level import EOS_TOKEN, train_byte_bpe
from llmtrain.tokenizer.encoders import PROBES
from tests.texts import TEXTS


def test_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = train_byte_bpe([*TEXTS.values()] * 5, tmp_path, vocab_size=400)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.eos_token_id) == (EOS_TOKEN, ours.eos_id)
    for text in (*TEXTS.values(), *PROBES):
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
