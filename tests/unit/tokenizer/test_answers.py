"""Which tokens are answers, by kinds of templates; transformers' mask where it has one."""

from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llmtrain.errors import DataError
from llmtrain.tokenizer.answers import AnswerEncoder
from llmtrain.tokenizer.chat import has_answer_blocks, render, render_marked
from llmtrain.tokenizer.prompts import PromptEncoder
from llmtrain.tokenizer.tokenizer import train
from tests.chats import CHATS, TEMPLATE, chat_tokenizer

SHIPPED = Path(str(distribution("trl").locate_file("trl/chat_templates")))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}"
    "<think>{% endif %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOL_TURNS = [
    {"role": "system", "content": "Be exact."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "5."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<|endoftext|>"
    )


def shown(encoder: AnswerEncoder, ids: Sequence[int], answered: Sequence[bool]) -> str:
    """The text, answers in double brackets."""
    text, inside = "", False
    for i, answer in zip([*ids, None], [*answered, False], strict=True):
        if answer != inside:
            text, inside = text + ("]]" if inside else "[["), answer
        text += "" if i is None else encoder.prompts.name_of(i)
    return text


GOLDEN = {
    "chatml": (
        CHATML, {},
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[[Hi.<|im_end|>\n]]"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4.<|im_end|>\n]]", True,
    ),
    "llama2": (
        LLAMA2, {},
        "<s>[INST] Hello [/INST][[ Hi.<|endoftext|>]]<s>[INST] 2+2? [/INST][[ 4.<|endoftext|>]]",
        True,
    ),
    "phi_closes_with_eos": (
        PHI, {},
        "<|user|>\nHello<|end|>\n<|assistant|>\n[[Hi.<|end|>\n]]<|user|>\n2+2?<|end|>\n"
        "<|assistant|>\n[[4.<|end|>\n<|endoftext|>]]", True,
    ),
    "no_token_ends_a_turn": (
        OPEN, {}, "user: Hello\nassistant: [[Hi.\n]]user: 2+2?\nassistant: [[4.\n]]", False,
    ),
    "last_turn": (
        OPEN, {"last_only": True},
        "user: Hello\nassistant: Hi.\nuser: 2+2?\nassistant: [[4.\n]]", False,
    ),
    "from_a_message_on": (
        CHATML, {"first": 2},
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4.<|im_end|>\n]]", True,
    ),
    "thinks_in_the_last_turn": (
        THINKING, {"last_only": True},
        "user: Hello\nassistant: Hi.\nuser: 2+2?\nassistant: [[<think>4.\n]]", False,
    ),
    "blocks": (
        TEMPLATE.read_text(), {},
        "[user]\nHello\n[assistant]\n[[Hi.<|endoftext|>]]\n[user]\n2+2?\n"
        "[assistant]\n[[4.<|endoftext|>]]", True,
    ),
    "blocks_last_turn": (
        TEMPLATE.read_text(), {"last_only": True},
        "[user]\nHello\n[assistant]\nHi.<|endoftext|>\n[user]\n2+2?\n"
        "[assistant]\n[[4.<|endoftext|>]]", True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_answers_by_kind_of_template(name: str, folder: Path) -> None:
    template, given, expected, is_ended = GOLDEN[name]
    encoder = AnswerEncoder(folder, template)
    found = encoder.conversation(TURNS, **given)
    assert shown(encoder, found.ids, found.answered) == expected
    assert found.is_ended == is_ended


def test_tool_calls_are_answers_and_their_results_are_not(folder: Path) -> None:
    encoder = AnswerEncoder(folder, TEMPLATE.read_text())
    found = encoder.conversation(TOOL_TURNS, TOOLS)
    text = shown(encoder, found.ids, found.answered)
    assert text.startswith('[tools] [{"type": "function", "function": {"name": "add"')
    assert text.endswith(
        '\n[system]\nBe exact.\n[user]\n2+3?\n[assistant]\n[[[call] {"name": "add", "arguments": '
        '{"a": 2, "b": 3}}<|endoftext|>]]\n[tool]\n5\n[assistant]\n[[5.<|endoftext|>]]'
    )


@pytest.mark.parametrize("turns", [TURNS, TOOL_TURNS], ids=["turns", "tools"])
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "glm4moe", "lfm2", "deepseekv3", "own"]
)
def test_blocks_are_transformers_mask(
    name: str, turns: list[dict[str, Any]], folder: Path, theirs: Any
) -> None:
    path = TEMPLATE if name == "own" else SHIPPED / f"{name}_training.jinja"
    template, tools = path.read_text(), TOOLS if turns is TOOL_TURNS else None
    assert has_answer_blocks(template)
    if name == "deepseekv3":  # takes arguments as a text
        turns = [dict(turn) for turn in turns if not turn.get("tool_calls")]
    found = AnswerEncoder(folder, template).conversation(turns, tools)
    expected = theirs.apply_chat_template(
        turns, tools=tools, chat_template=template, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert found.ids == expected["input_ids"]
    assert found.answered.astype(int).tolist() == expected["assistant_masks"]
    assert 0 < found.answered.sum() < len(found.ids)


@pytest.mark.parametrize("turns", [TURNS, TOOL_TURNS], ids=["turns", "tools"])
@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "lfm2"])
def test_without_blocks_the_answers_are_those_of_the_template_with_them(
    name: str, turns: list[dict[str, Any]], folder: Path
) -> None:
    plain, marked = ((SHIPPED / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
    assert not has_answer_blocks(plain)
    tools = TOOLS if turns is TOOL_TURNS else None
    found = AnswerEncoder(folder, plain).conversation(turns, tools)
    expected = AnswerEncoder(folder, marked).conversation(turns, tools)
    assert found.ids == expected.ids
    assert found.answered.tolist() == expected.answered.tolist()


@pytest.mark.parametrize("template", [THINKING, (SHIPPED / "qwen3.jinja").read_text()])
def test_a_template_that_rewrites_turns_is_refused(template: str, folder: Path) -> None:
    with pytest.raises(DataError, match=r"end of message 2 of 4 otherwise.*train_on=last"):
        AnswerEncoder(folder, template).conversation(TURNS)


FAULTS = {
    "{{ 1 // 0 }}": "integer division or modulo by zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{{ 'x' * (10 ** 16) }}": "MemoryError",
    "{{ '%(a)s' % {} }}": "'a'",
}


@pytest.mark.parametrize("template", FAULTS)
def test_faults_of_a_template_are_one_sentence(template: str, folder: Path) -> None:
    with pytest.raises(DataError, match=r"the chat template refuses this") as raised:
        AnswerEncoder(folder, template).conversation(TURNS)
    assert f"({FAULTS[template]})" in str(raised.value)


GREETED = [{"role": "assistant", "content": "Hi."}, *TURNS]


def test_a_conversation_that_begins_with_the_assistant(folder: Path) -> None:
    asks = "{% if messages[0].role != 'system' %}Be kind.{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"begins with the assistant.*put a system message before"):
        AnswerEncoder(folder, asks).conversation(GREETED)
    counts = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="begins with the assistant"):
        AnswerEncoder(folder, counts).conversation(GREETED)
    for given in ({"last_only": True}, {"first": 1}):
        assert AnswerEncoder(folder, asks).conversation(GREETED, **given).answered.any()
    system = {"role": "system", "content": "Be kind."}
    for template, messages in ((CHATML, GREETED), (asks, [system, *GREETED])):
        encoder = AnswerEncoder(folder, template)
        found = encoder.conversation(messages)
        text = shown(encoder, found.ids, found.answered)
        assert text.count("assistant\n[[Hi.<|im_end|>\n]]") == 2
        assert text.count("[[") == 3


def test_variables_and_the_day_are_given(folder: Path) -> None:
    template = (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}no day{% endif %}"
        "{{ voice }}"
    )
    text = render_marked(template, TURNS, {"voice": " loud"}).text
    assert text == "no day loud"
    assert render(template, TURNS, {}).isdigit()


def test_marks_are_no_character_of_the_text(folder: Path) -> None:
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}."
    content = "".join(map(chr, range(0xE000, 0xE010)))
    found = render_marked(template, [{"role": "assistant", "content": content}], {})
    assert found == (f"{content}.", [(0, 16)])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_spans_of_sentencepiece(kind: Any, tmp_path: Path) -> None:
    train(CHATS.read_text().splitlines(), tmp_path, kind=kind, vocab_size=400)
    check_spans(PromptEncoder(tmp_path))


def test_spans_of_byte_level_bpe(folder: Path) -> None:
    check_spans(PromptEncoder(folder))


def test_spans_of_ranks(tmp_path: Path) -> None:
    import base64
    import json

    ranks = [bytes([byte]) for byte in range(256)] + [b"He", b"Hel", "é".encode(), b" w"]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(ranks)]
    (tmp_path / "t.tiktoken").write_text("\n".join(lines))
    described: Mapping[str, Any] = {
        "pattern": "gpt4", "special_tokens": {"</s>": 300}, "eos_token": "</s>",
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(described))
    check_spans(PromptEncoder(tmp_path))


def check_spans(prompts: PromptEncoder) -> None:
    """Spans are those of what the ids decode to, and cover the text without a gap."""
    eos = prompts.names["eos_token"]
    text = f"Hello  wörld é日本 x{eos}\n\tnext \u2581 {eos}"
    ids, starts, ends = prompts.encode_with_spans(text, prefix=False)
    assert ids == prompts.encode(text, prefix=False)
    assert starts[0] == 0
    assert ends[-1] == len(text)
    assert (starts[1:] <= ends[:-1]).all()
    assert (starts < ends).all()
    for i, start, end in zip(ids, starts.tolist(), ends.tolist(), strict=True):
        name = prompts.name_of(i)
        assert name == text[start:end] or "\ufffd" in name
    assert text[starts[-1] : ends[-1]] == eos


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CHATS.read_text().splitlines()), model_writer=model,
        vocab_size=400, minloglevel=2, byte_fallback=True, character_coverage=0.99,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    prompts = PromptEncoder(tmp_path)
    ids, starts, _ = prompts.encode_with_spans("What is it?", prefix=True)
    assert (ids[0], starts[0]) == (prompts.bos_id, 0)
    with pytest.raises(DataError, match=r"changes texts.*use its tokenizer\.json"):
        prompts.encode_with_spans("two  spaces")
