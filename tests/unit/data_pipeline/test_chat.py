"""Chat data to stores: roles, pairs, what is left out, what is refused, and the way back."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from data_pipeline.chat.encode import ChatRules, encoded
from data_pipeline.chat.messages import example_of, pair_of
from data_pipeline.cli import main
from llmtrain.data.pack_blocks import read_packing
from llmtrain.data.roles import ANSWER, SECOND, texts
from llmtrain.data.store import TokenStore, verify
from llmtrain.tokenizer.prompts import PromptEncoder
from tests.chats import CHATS, PAIRS, TEMPLATE, chat_tokenizer, rows

WINDOW = 512
HELLO = {
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
    ]
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATE.read_text())


def chat(tokenizer: Path, source: str | Path, out: Path, *more: str) -> int:
    words = [f"input={source}", f"tokenizer={tokenizer}", f"out={out}"]
    if not any(word.startswith("sequence_length=") for word in more):
        words.append(f"sequence_length={WINDOW}")
    return main(["chat", *words, *more])


def write(path: Path, *given: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    return path


def spelled(tokenizer: Path, ids: Any) -> str:
    prompts = PromptEncoder(tokenizer)
    return "".join(map(prompts.name_of, np.asarray(ids).tolist()))


def answers(tokenizer: Path, store: TokenStore, document: int) -> list[str]:
    """The learned part of each text of a document."""
    span = store.document_span(document)
    ids, roles = store.tokens(*span), store.roles(*span)
    return [
        spelled(tokenizer, ids[text][(roles[text] & ANSWER).astype(bool)]) for text in texts(roles)
    ]


def test_the_shipped_conversations(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(tokenizer, CHATS, tmp_path / "chat") == 0
    told = json.loads(capsys.readouterr().out)
    store, data = verify(tmp_path / "chat"), rows(CHATS)
    assert told["documents"] == store.num_documents == len(data)
    assert told["tokens"] == store.num_tokens
    assert told["dropped"] == {}
    roles = store.roles(0, store.num_tokens)
    assert told["answered_tokens"] == (roles & ANSWER).sum()
    assert not (roles & SECOND).any()
    for document, row in enumerate(data):
        expected = row.get("completion", "")
        for message in row.get("messages", ()):
            if message["role"] == "assistant":
                expected += (message["content"] or "") + "".join(
                    f"[call] {json.dumps(call['function']['arguments'])}"
                    for call in message.get("tool_calls", ())
                )
        (found,) = answers(tokenizer, store, document)
        if "tool_calls" not in json.dumps(row):
            assert found.replace("<|endoftext|>", "") == expected
        assert found.endswith("<|endoftext|>")
        assert store.tokens(*store.document_span(document)).tolist().count(0) >= 1
        assert store.record(document).member_offset == document
    assert read_packing(store, "chat", WINDOW).cut_documents == 0


def test_the_shipped_pairs(tokenizer: Path, tmp_path: Path) -> None:
    assert chat(tokenizer, PAIRS, tmp_path / "pairs", "kind=preferences") == 0
    store, data = verify(tmp_path / "pairs"), rows(PAIRS)
    assert store.num_documents == len(data)
    for document, row in enumerate(data):
        span = store.document_span(document)
        ids, roles = store.tokens(*span), store.roles(*span)
        first, second = texts(roles)
        assert ids[first][-1] == ids[second][-1] == 0
        shared = int(np.argmax((roles[first] & ANSWER) > 0))
        assert ids[first][:shared].tolist() == ids[second][:shared].tolist()
        sides = [
            row[side] if isinstance(row[side], str) else row[side][-1]["content"]
            for side in ("chosen", "rejected")
        ]
        assert answers(tokenizer, store, document) == [f"{side}<|endoftext|>" for side in sides]


def test_two_runs_and_several_workers_give_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    data = rows(CHATS)
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", *data[number::3])
    given = ("validation_share=0.2", "part_bytes=1500")
    for name, workers in (("chat", 1), ("again/chat", 2)):
        source = f"{tmp_path}/*.jsonl"
        assert chat(tokenizer, source, tmp_path / name, f"num_workers={workers}", *given) == 0
    one, two = tmp_path / "chat", tmp_path / "again" / "chat"
    names = [p.relative_to(one) for p in one.rglob("part-*")]
    assert len(names) > 15
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    kept, held = verify(one), verify(one / "validation")
    assert kept.num_documents + held.num_documents == len(data)
    assert held.num_documents > 0
    assert chat(tokenizer, f"{tmp_path}/*.jsonl", one, *given) == 0  # is left as it is
    assert chat(tokenizer, f"{tmp_path}/*.jsonl", one, "train_on=last", *given) == 2


def test_what_is_left_out_is_counted(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = {"messages": [{"role": "user", "content": "Anyone?"}]}
    long = {"prompt": "a " * 60, "completion": " b"}
    data = write(tmp_path / "a.jsonl", HELLO, silent, long, {"prompt": "x", "completion": ""})
    assert chat(tokenizer, data, tmp_path / "s", "sequence_length=40") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["documents"] == 1
    assert told["dropped"] == {"no_answer": 2, "too_long": 1}
    assert told["longest"] > 60
    same = {"prompt": "x", "chosen": "y", "rejected": "y"}
    data = write(tmp_path / "b.jsonl", same, {**same, "rejected": "z"}, {**same, "chosen": ""})
    assert chat(tokenizer, data, tmp_path / "p", "kind=preferences") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dropped"] == {"equal_answers": 1, "no_answer": 1}


def test_a_document_of_exactly_the_length_stays(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", HELLO)
    assert chat(tokenizer, data, tmp_path / "a") == 0
    length = json.loads(capsys.readouterr().out)["longest"]
    assert chat(tokenizer, data, tmp_path / "b", f"sequence_length={length}") == 0
    assert chat(tokenizer, data, tmp_path / "c", f"sequence_length={length - 1}") == 2
    assert "no document with text is left" in capsys.readouterr().err


def test_train_on_last(tokenizer: Path, tmp_path: Path) -> None:
    turns = [*HELLO["messages"], *HELLO["messages"][:1], {"role": "assistant", "content": "Bye"}]
    data = write(tmp_path / "a.jsonl", {"messages": turns})
    assert chat(tokenizer, data, tmp_path / "all") == 0
    assert chat(tokenizer, data, tmp_path / "last", "train_on=last") == 0
    found = [answers(tokenizer, TokenStore.open(tmp_path / n), 0)[0] for n in ("all", "last")]
    assert found == ["Hi.<|endoftext|>Bye<|endoftext|>", "Bye<|endoftext|>"]


def test_prompts_and_completions_of_messages(tokenizer: Path, tmp_path: Path) -> None:
    greeted = {"prompt": [*HELLO["messages"], {"role": "user", "content": "Bye"}]}
    greeted["completion"] = [{"role": "assistant", "content": "Bye!"}]
    assert chat(tokenizer, write(tmp_path / "a.jsonl", greeted), tmp_path / "a") == 0
    assert answers(tokenizer, TokenStore.open(tmp_path / "a"), 0) == ["Bye!<|endoftext|>"]


def test_eos_is_learned_only_where_nothing_else_ends_the_answer(tokenizer: Path) -> None:
    ends = {
        "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}": [True, True, False],
        "{% for m in messages %}{{ m.content }}\n{% endfor %}": [True, True, True],
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}": [True, True, True],
    }
    for template, expected in ends.items():
        rules = ChatRules(sequence_length=99, template=template)
        found = encoded(rules.encoder(str(tokenizer)), example_of(HELLO), rules)
        assert found.ids[-1] == 0
        assert found.roles[-3:].astype(bool).tolist() == expected
        assert found.ids.count(0) == (2 if "eos_token" in template else 1)


def test_words_and_what_a_message_says_end_no_answer(tmp_path: Path) -> None:
    """As in TRL: EOS stands behind a completion, whatever that ends with."""
    folder = chat_tokenizer(tmp_path)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_tokens([AddedToken("</tool_call>", special=False)])
    file.save(str(folder / "tokenizer.json"))
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    ended = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"

    def eos_is_learned(row: dict[str, Any], template: str) -> bool:
        rules = ChatRules(sequence_length=99, template=template)
        found = encoded(rules.encoder(str(folder)), example_of(row), rules)
        assert found.ids[-1] == 0
        return bool(found.roles[-1])

    for said in ("x</tool_call>", "x<|im_end|>", "x<|im_end|>\n", "x</tool_call> ", "x"):
        turns = [HELLO["messages"][0], {"role": "assistant", "content": said}]
        assert eos_is_learned({"prompt": "go ", "completion": said}, plain), said
        assert eos_is_learned({"messages": turns}, plain), said
        assert not eos_is_learned({"messages": turns}, ended), said


def test_a_pair_without_a_prompt_shares_its_beginning() -> None:
    turn = HELLO["messages"]
    found = pair_of({"chosen": turn, "rejected": [turn[0], {"role": "assistant", "content": "?"}]})
    assert found.prompt == (turn[0],)
    assert [answer[0]["content"] for answer in found.answers] == ["Hi.", "?"]  # type: ignore[index]


def test_messages_are_read_as_the_interface_gives_them() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    example = example_of({"messages": [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ], "tools": '[{"type": "function"}]'})  # fmt: skip
    assert example.answers[0] == (
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
        ]},
        {"role": "assistant", "content": "x"},
    )  # fmt: skip
    assert example.tools == ({"type": "function"},)


def test_tables_give_the_documents_of_lines(tokenizer: Path, tmp_path: Path) -> None:
    data = [row for row in rows(CHATS) if "messages" in row][24:34]
    for row in data:
        row["tools"] = json.dumps(row.get("tools") or [])
    lines = write(tmp_path / "lines.jsonl", *data)
    table = datasets.Dataset.from_list(data)
    table.to_parquet(str(tmp_path / "table.parquet"))
    table.save_to_disk(str(tmp_path / "disk"))
    stores = []
    for source in (lines, tmp_path / "table.parquet", f"hf:{tmp_path / 'disk'}"):
        out = tmp_path / f"store{len(stores)}"
        assert chat(tokenizer, source, out) == 0
        stores.append(TokenStore.open(out))
    one = stores[0]
    assert one.num_documents == len(data)
    for other in stores[1:]:
        assert np.array_equal(one.tokens(0, one.num_tokens), other.tokens(0, other.num_tokens))
        assert np.array_equal(one.roles(0, one.num_tokens), other.roles(0, other.num_tokens))


USER = {"role": "user", "content": "x"}
REFUSED: list[tuple[str, Any, str]] = [
    ("messages", [1], "line 2: line is no JSON object"),
    ("messages", {"text": "x"}, "it has no 'prompt', but text"),
    ("messages", {"messages": []}, "'messages' is []; expected a list of messages"),
    ("messages", {"messages": ["x"]}, 'messages[0] is "x"; expected an object'),
    ("messages", {"messages": [{"role": "human", "content": "x"}]}, "role 'human'; use one of"),
    ("messages", {"messages": [{"role": "user"}]}, "messages[0] has no content and no tool_calls"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content holds image_url; this model reads text alone",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": {}}]},
        "messages[1].tool_calls is {}; give a list",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages[1].tool_calls[0] names no function",
    ),
    (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "arguments that are no JSON object",
    ),
    ("messages", {**HELLO, "tools": "x"}, "tools is a text that is no JSON"),
    ("messages", {**HELLO, "tools": {}}, "tools is {}; expected a list of JSON schemas"),
    ("messages", {"prompt": "x"}, "it has no 'completion', but prompt"),
    ("messages", {"prompt": "x", "completion": [USER]}, "prompt is a text, completion is messages"),
    ("messages", {"prompt": "\ud800", "completion": "x"}, "half of a surrogate pair"),
    ("preferences", {"prompt": "x", "chosen": "y"}, "it has no 'rejected', but chosen, prompt"),
    ("preferences", {"chosen": "x", "rejected": "y"}, "it has no 'prompt', but chosen, rejected"),
]


@pytest.mark.parametrize(("kind", "row", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_bad_rows_are_one_sentence_with_file_and_line(
    kind: str, row: Any, message: str, tokenizer: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good = HELLO if kind == "messages" else {"prompt": "x", "chosen": "y", "rejected": "z"}
    data = write(tmp_path / "a.jsonl", good, row)
    assert chat(tokenizer, data, tmp_path / "s", f"kind={kind}") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: {data}, line 2: ")
    assert message in said
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat_template=absent.jinja"], "chat_template=absent.jinja does not exist"),
        (["date=tomorrow"], "date=tomorrow is no day"),
        (["sequence_length=0"], "sequence_length=0"),
        (
            ["template_arguments={{eos_token: x, tools: y, loud: true}}"],
            "template_arguments.eos_token is no further variable, the tokenizer gives it",
        ),
        (["template_arguments.strftime_now=x"], "date=YYYY-MM-DD gives it; leave it out"),
        (["id_field=key"], "line 1: it has no 'key'"),
        (["chat_template={bad}"], "line 1: the chat template refuses this conversation"),
        (["chat_template={dated}"], "say which with date=YYYY-MM-DD"),
        (["chat_template={moving}"], "end of message 2 of 4 otherwise"),
    ],
)
def test_wrong_settings(
    words: list[str], message: str, tokenizer: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    texts_of = {
        "bad": "{{ raise_exception('no') }}",
        "dated": "{{ strftime_now('%Y') }}",
        "moving": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    paths = {name: str(tmp_path / name) for name in texts_of}
    for name, text in texts_of.items():
        Path(paths[name]).write_text(text)
    data = write(tmp_path / "a.jsonl", {"messages": [*HELLO["messages"], *HELLO["messages"]]})
    assert chat(tokenizer, data, tmp_path / "s", *(w.format(**paths) for w in words)) == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_a_template_takes_plain_texts_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    plain = write(tmp_path / "a.jsonl", {"prompt": "x", "completion": " y"})
    assert chat(tokenizer, plain, tmp_path / "a") == 0
    assert chat(tokenizer, write(tmp_path / "b.jsonl", HELLO), tmp_path / "b") == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_day_and_variables_are_part_of_the_text(tokenizer: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') + voice }}{% if loud %}!{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    words = ["date=2026-01-31", "template_arguments={voice: ' calm', loud: true}"]
    data = write(tmp_path / "a.jsonl", HELLO)
    assert chat(tokenizer, data, tmp_path / "s", f"chat_template={template}", *words) == 0
    store = TokenStore.open(tmp_path / "s")
    assert spelled(tokenizer, store.document(0)) == "31 Jan 2026 calm!HelloHi.<|endoftext|>"


def test_records_are_proven_by_what_was_read(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", HELLO, *rows(CHATS)[:3])
    assert chat(tokenizer, data, tmp_path / "chat") == 0
    store = TokenStore.open(tmp_path / "chat")
    requests = []
    for document in range(store.num_documents):
        record = store.record(document)
        text = PromptEncoder(tokenizer).tokenizer.decode(store.document(document)[:-1].tolist())
        assert record.text_bytes == len(text.encode())
        assert record.extractor_name == "chat_template"
        requests.append({
            "folder": str(tmp_path / "chat" / ".pipeline"), "id": record.id, "source": "chat",
            "source_file_id": record.source_file_id, "member_offset": record.member_offset,
            "member_length": record.member_length, "payload_sha256": record.payload_sha256,
            "extracted_sha256": record.extracted_sha256,
            "extractor": {"name": record.extractor_name, "version": "", "options": ""},
        })  # fmt: skip
    requests[2]["payload_sha256"] = "0" * 64
    asked = write(tmp_path / "requests.jsonl", *requests)
    capsys.readouterr()
    assert main(["reopen", f"requests={asked}"]) == 0
    answered = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    problems = {line["id"]: line["problem"] for line in answered}
    assert [bool(problems[request["id"]]) for request in requests] == [False, False, True, False]
    assert "noted is 0000000000000000" in problems[requests[2]["id"]]
