"""Prompts and conversations give the ids and texts that transformers gives."""

import json
from pathlib import Path

import pytest
import transformers

from llmtrain.errors import DataError
from llmtrain.interop.tokenizer_files import take_out
from llmtrain.tokenizer.chat import find_template, render
from llmtrain.tokenizer.files import META_FILE
from llmtrain.tokenizer.prompts import PromptEncoder
from llmtrain.tokenizer.tokenizer import train

TEXTS = ["A store holds the tokens of a source.\nIt is written once.", "def read(path):\n" * 4]
PROMPTS = ["A store", "</s>A store</s>", " a<s>b", "<|endoftext|>\nx <|endoftext|>"]
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}
{% if message.role not in ("system", "user", "assistant") %}
{{ raise_exception("unknown role " + message.role) }}
{% endif %}
<{{ message.role }}>{{ message.content | trim }}
{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{% if message.role == "assistant" %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}
{% if loop.index > 8 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Where is \u00c9vora?"},
    {
        "role": "assistant",
        "content": "There.",
        "tool_calls": [{"name": "map", "at": "<x> & \u00e9"}],
    },
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture(scope="module", params=["bpe", "byte_bpe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder with a chat template, and its export beside it."""
    root = tmp_path_factory.mktemp(request.param)
    train(TEXTS, root / "ours", kind=request.param, vocab_size=286)
    (root / "ours" / "chat_template.jinja").write_text(TEMPLATE)
    (root / "theirs").mkdir()
    take_out(str(root / "ours"), root / "theirs", None)
    (root / "theirs" / META_FILE).unlink()
    return root


def test_ids_and_conversations_are_those_of_transformers(folder: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "theirs")
    for path in (folder / "ours", folder / "theirs" / "tokenizer.json"):
        ours = PromptEncoder(path)
        for prompt in PROMPTS:
            ids = theirs(prompt).input_ids
            assert ours.encode(prompt) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        for length, open_end in ((4, True), (3, False), (1, True)):
            chat = CHAT[:length]
            expected = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=open_end
            )
            assert ours.chat(chat, add_generation_prompt=open_end) == expected
        assert ours.bos_id == theirs.bos_token_id


def test_a_token_in_front_of_every_text(folder: Path, tmp_path: Path) -> None:
    fields = json.loads((folder / "theirs" / "tokenizer.json").read_text())
    eos = fields["added_tokens"][-1]
    special = {
        eos["content"]: {"id": eos["content"], "ids": [eos["id"]], "tokens": [eos["content"]]}
    }
    single = [{"SpecialToken": {"id": eos["content"], "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}]  # fmt: skip
    fields["post_processor"] = {"type": "TemplateProcessing", "single": single,
                                "pair": single, "special_tokens": special}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos["content"]}))
    ours = PromptEncoder(tmp_path)
    assert ours.prefix == [eos["id"]]
    assert ours.encode("A store")[:1] == [eos["id"]]
    assert ours.encode("A store", prefix=False) == ours.encode("A store")[1:]


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert find_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tools", "template": "b"}, {"name": "default", "template": "a"}]
    for value, found in (("a", "a"), (named, "a")):
        config.write_text(json.dumps({"chat_template": value}))
        assert find_template(tmp_path) == found
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(DataError, match="has the chat templates tools and none called default"):
        find_template(tmp_path)


def test_refusals(folder: Path) -> None:
    with pytest.raises(DataError, match="unknown role judge"):
        PromptEncoder(folder / "ours").chat([{"role": "judge", "content": "x"}])
    with pytest.raises(DataError, match="refuses this conversation of 1 messages"):
        render("{{ ''.__class__.mro() }}", CHAT[:1], {})
    bare = folder / "bare"
    train(TEXTS, bare, kind="bpe", vocab_size=286)
    with pytest.raises(DataError, match="has no chat template"):
        PromptEncoder(bare).chat(CHAT)
