"""Tokenizers give the same ids here and in transformers, on their way in and on their way out."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers

from llmtrain.errors import ConfigError, DataError
from llmtrain.interop.tokenizer_files import TEMPLATE_FILE, bring_in, take_out
from llmtrain.tokenizer.files import CONFIG_FILE, JSON_FILE, MODEL_FILE
from llmtrain.tokenizer.tokenizer import Tokenizer, load, train
from tests.texts import TEXTS as PROSE
from tests.unit.tokenizer.test_tokenizer import HARD, TEXTS

CHECKED = [
    *(text for text in HARD if "\u2581" not in text and "<s>" not in text), *PROSE.values(),
    *TEXTS[::40], "aaaa bringingbringing  orangearea", " x" * 50, "1234567 12.5 0x0A",
]  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte_bpe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer made here."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [*TEXTS, *PROSE.values()]
    train(texts, folder, kind=request.param, vocab_size=440)
    return folder


def same_ids(ours: Tokenizer, folder: Path, texts: Sequence[str]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_id


def test_what_is_trained_here_is_read_by_transformers(trained: Path, tmp_path: Path) -> None:
    ours = load(trained)
    ids = take_out(str(trained), tmp_path, None)
    assert ids["eos_token_id"] == ours.eos_id
    same_ids(ours, tmp_path, CHECKED)


def test_out_and_in_again_is_the_same_tokenizer(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    take_out(str(trained), tmp_path / "out", None)
    path = bring_in(tmp_path / "out", tmp_path / "in")
    assert path is not None
    assert load(path).hash == load(trained).hash  # stores made with it go on


def test_foreign_files_come_and_go_as_they_are(trained: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    take_out(str(trained), source, None)
    (source / "llmtrain_tokenizer.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(source)

    path = bring_in(source, tmp_path / "in")
    assert path == tmp_path / "in" / JSON_FILE
    ours = load(path)
    assert ours.vocab_size == len(theirs)
    same_ids(ours, source, CHECKED)
    assert ours.encode("<|user|>") != [len(theirs) - 1]  # a name in a text is text

    take_out(str(path), out, None)
    copied = [p.name for p in source.iterdir()]
    assert sorted(p.name for p in out.iterdir()) == sorted(copied)
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    talk = [{"role": "user", "content": "hi"}]
    back = transformers.AutoTokenizer.from_pretrained(out)
    assert back.apply_chat_template(talk, tokenize=False) == "user: hi\n"


def test_a_chat_template_replaces_the_old(trained: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    take_out(str(trained), source, None)
    config = json.loads((source / CONFIG_FILE).read_text())
    (source / CONFIG_FILE).write_text(json.dumps({**config, "chat_template": "old"}))
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    take_out(str(source), out, str(template))
    assert (out / TEMPLATE_FILE).read_text() == TEMPLATE
    assert "chat_template" not in json.loads((out / CONFIG_FILE).read_text())
    back = transformers.AutoTokenizer.from_pretrained(out)
    assert back.chat_template == TEMPLATE
    with pytest.raises(ConfigError, match=r"chat_template=.*none is no file"):
        take_out(str(source), out, str(tmp_path / "none"))


def test_no_tokenizer_is_none_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert bring_in(tmp_path, tmp_path / "in") is None
    (tmp_path / MODEL_FILE).write_bytes(b"no model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        bring_in(tmp_path, tmp_path / "in")


def test_rank_files_are_refused(tmp_path: Path) -> None:
    import base64

    ranks = "".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (tmp_path / "x.tiktoken").write_text(ranks)
    description = {"pattern": "(?s:.)", "special_tokens": {"<e>": 256}, "eos_token": "<e>"}
    (tmp_path / "x.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="holds tiktoken ranks"):
        take_out(str(tmp_path), tmp_path, None)
