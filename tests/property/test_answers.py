"""Any conversation: ids and answers are transformers', and roles stand with their tokens."""

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data_pipeline.chat.encode import ChatRules, encoded
from data_pipeline.chat.messages import example_of, pair_of
from llmtrain.data.roles import ANSWER, SECOND, check_roles, texts
from llmtrain.tokenizer.answers import AnswerEncoder
from tests.chats import TEMPLATE, chat_tokenizer

SHIPPED = Path(str(distribution("trl").locate_file("trl/chat_templates")))
BLOCKS = {
    "own": TEMPLATE.read_text(),
    **{
        name: (SHIPPED / f"{name}_training.jinja").read_text()
        for name in ("qwen2_5", "qwen3", "lfm2")
    },
}
LENGTH = 1 << 20

content = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
call = st.fixed_dictionaries({
    "type": st.just("function"),
    "function": st.fixed_dictionaries({
        "name": st.sampled_from(["add", "find"]),
        "arguments": st.dictionaries(st.sampled_from("abc"), st.integers() | content, max_size=2),
    }),
})  # fmt: skip
user = st.fixed_dictionaries({"role": st.just("user"), "content": content})
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": content})
calling = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.just(""), "tool_calls": st.lists(call, min_size=1)}
)
result = st.fixed_dictionaries({"role": st.just("tool"), "content": content})
turn = st.one_of(st.tuples(user, answer), st.tuples(user, calling, result, answer))
conversation = st.lists(turn, min_size=1, max_size=3).map(
    lambda turns: [m for t in turns for m in t]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<|endoftext|>"
    )


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=15)
@given(messages=conversation)
def test_answers_are_transformers_mask(
    name: str, messages: tuple[dict[str, Any], ...], folder: Path, theirs: Any
) -> None:
    found = AnswerEncoder(folder, BLOCKS[name]).conversation(messages)
    expected = theirs.apply_chat_template(
        list(messages),
        chat_template=BLOCKS[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert found.ids == expected["input_ids"]
    assert found.answered.astype(int).tolist() == expected["assistant_masks"]
    rules = ChatRules(sequence_length=LENGTH, template=BLOCKS[name])
    document = encoded(rules.encoder(str(folder)), example_of({"messages": list(messages)}), rules)
    length = len(found.ids)
    assert document.ids[:length] == found.ids
    assert document.roles[:length].astype(bool).tolist() == found.answered.tolist()
    assert len(document.roles) == len(document.ids) <= length + 1
    assert document.ids[-1] == 0


@settings(max_examples=20)
@given(prompt=conversation, chosen=answer, rejected=answer)
def test_a_pair_is_its_two_conversations(
    prompt: tuple[dict[str, Any], ...], chosen: Any, rejected: Any, folder: Path
) -> None:
    rules = ChatRules(sequence_length=LENGTH, kind="preferences", template=BLOCKS["own"])
    encoder = rules.encoder(str(folder))
    asked = [*prompt, {"role": "user", "content": "?"}]
    pair = {"prompt": asked, "chosen": [chosen], "rejected": [rejected]}
    found = encoded(encoder, pair_of(pair), rules)
    check_roles(found.roles, np.array([len(found.ids)]), "pair")
    sides = texts(found.roles)
    assert len(sides) == 2
    for side, message, bit in zip(sides, (chosen, rejected), (0, SECOND), strict=True):
        alone = encoder.conversation([*asked, message], first=len(asked))
        assert found.ids[side] == alone.ids
        answered = np.where(alone.answered, ANSWER | bit, bit)
        assert found.roles[side].tolist() == answered.tolist()
    assert found.dropped == ("equal_answers" if chosen == rejected else "")
