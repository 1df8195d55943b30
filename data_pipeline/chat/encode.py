"""A conversation or a pair as the tokens of one document, each with its role.

A text ends with EOS: with the one its template wrote, or with one put behind it, which is answered
for only where no other token ends the answer. A pair is the chosen text, then the rejected one,
each with its prompt. What is too long or has no answer is not cut or padded, its reason is told.

    encoded(encoder, example, ChatRules(sequence_length=4096))
"""

from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.chat.messages import Example, Turns
from data_pipeline.config.chat import Kind
from llmtrain.data.roles import ANSWER, SECOND, RoleArray
from llmtrain.tokenizer.answers import AnsweredText, AnswerEncoder


@dataclass(frozen=True, kw_only=True)
class ChatRules:
    """How rows become documents; plain values, so that workers can be sent it."""

    sequence_length: int
    """Most tokens of a document."""
    kind: Kind = "messages"
    """What a row holds."""
    last_only: bool = False
    """Whether the last turn of the assistant alone is learned."""
    template: str | None = None
    """Jinja source; None takes the tokenizer's own."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template."""
    day: str | None = None
    """Day that a template is told as today."""

    def encoder(self, tokenizer: str) -> AnswerEncoder:
        """Open the tokenizer with the template.

        Raises:
            DataError: there is no tokenizer.
        """
        given = dict(self.arguments)
        if self.day is not None:
            given["strftime_now"] = date.fromisoformat(self.day).strftime
        return AnswerEncoder(tokenizer, self.template, given)


class EncodedExample(NamedTuple):
    """One document."""

    ids: list[int]
    """Its tokens, EOS included."""
    roles: RoleArray
    """One of each."""
    dropped: str
    """Why it is left out, or nothing."""


def encoded(encoder: AnswerEncoder, example: Example, rules: ChatRules) -> EncodedExample:
    """Lay an example out and encode it.

    Raises:
        DataError: the template refuses it, or its answers cannot be told.
    """
    eos_id = encoder.prompts.tokenizer.eos_id
    ids, roles = list[int](), list[RoleArray]()
    for number, answer in enumerate(example.answers):
        text = _text(encoder, example, answer, rules.last_only)
        own, answered = _closed(text, eos_id)
        ids += own
        roles.append(np.where(answered, ANSWER, 0).astype(np.uint8) | np.uint8(SECOND * number))
    dropped = ""
    if len(ids) > rules.sequence_length:
        dropped = "too_long"
    elif not all((part & ANSWER).any() for part in roles):
        dropped = "no_answer"
    elif len(example.answers) == 2 and example.answers[0] == example.answers[1]:
        dropped = "equal_answers"
    return EncodedExample(ids, np.concatenate(roles), dropped)


def _text(encoder: AnswerEncoder, example: Example, answer: Turns, last_only: bool) -> AnsweredText:
    prompt = example.prompt
    if isinstance(answer, str) and isinstance(prompt, str):
        return encoder.completion(prompt, answer)
    messages = [*_listed(prompt), *_listed(answer)]
    return encoder.conversation(messages, example.tools, first=len(prompt), last_only=last_only)


def _listed(turns: Turns) -> tuple[dict[str, Any], ...]:
    if isinstance(turns, str):
        raise TypeError("a text stands beside messages")
    return turns


def _closed(text: AnsweredText, eos_id: int) -> tuple[list[int], Any]:
    """Return the tokens of a text with EOS as the last, and which are answered for."""
    if text.ids and text.ids[-1] == eos_id:
        return text.ids, text.answered
    return [*text.ids, eos_id], np.append(text.answered, not text.is_ended)
