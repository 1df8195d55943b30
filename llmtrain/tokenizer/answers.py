"""Which tokens of a conversation are answers: what a model learns to write.

An answer is what the template writes for an assistant's message behind the prompt of that message,
the token that ends the turn included. A template with ``{% generation %}`` blocks says it itself.
Of any other, beginnings of the conversation are laid out and compared: the text up to a message,
with the generation prompt, has to begin the text with the message, and that the whole (but for an
EOS that closes every text); where it does not, the template is refused.
Invariant: ids are those of the whole text at once, as transformers' ``apply_chat_template`` has it.

    encoder = AnswerEncoder("tokenizer")
    encoder.conversation([{"role": "user", "content": "Hello"}, ...]).answered
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError
from llmtrain.tokenizer.chat import (
    Message,
    Rendered,
    has_answer_blocks,
    render_marked,
    required_template,
)
from llmtrain.tokenizer.prompts import PromptEncoder

ASSISTANT = "assistant"
"""Role of the messages a model learns to write."""
_NO_PROMPT = (
    "the conversation begins with the assistant, and the chat template does not say what stands "
    "before a first message of that role; put a system message before it"
)


class AnsweredText(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    """Its tokens, without the EOS of a document."""
    answered: npt.NDArray[np.bool_]
    """Whether each is part of an answer."""
    is_ended: bool
    """Whether it does not stop in an answer whose end its template left open: then EOS ends it."""


class AnswerEncoder:
    """A tokenizer and a chat template that tell answers from the rest."""

    def __init__(
        self,
        path: Path | str,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the tokenizer at ``path``, its own template or ``template``, and its variables.

        Raises:
            DataError: there is no tokenizer.
        """
        self.prompts = PromptEncoder(path)
        self._template = template
        self._names = {**self.prompts.names, **(arguments or {})}

    @property
    def template(self) -> str:
        """Jinja source of the template.

        Raises:
            DataError: none is given and the tokenizer has none.
        """
        if self._template is None:
            self._template = required_template(self.prompts.folder)
        return self._template

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        first: int = 0,
        last_only: bool = False,
    ) -> AnsweredText:
        """Lay messages out and tell the answers among messages ``first`` and on, or the last one.

        Raises:
            DataError: the template refuses them, or its answers cannot be told.
        """
        spoken = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        wanted = [i for i in spoken if i >= first][-1 if last_only else 0 :]
        whole = render_marked(self.template, messages, self._names, tools=tools)
        if not wanted:
            spans = []
        elif has_answer_blocks(self.template):
            spans = whole.answers
            if wanted[0] != spoken[0]:
                before = render_marked(
                    self.template, messages[: wanted[0]], self._names, tools=tools
                )
                spans = spans[len(before.answers) :]
        else:
            spans = [self._added(whole, messages, i, tools) for i in wanted]
        return self._encoded(
            whole.text, spans, prefix=False, is_closed=self._closes(whole.text, messages)
        )

    def completion(self, prompt: str, completion: str) -> AnsweredText:
        """Encode a plain text whose end is the answer."""
        span = (len(prompt), len(prompt) + len(completion))
        return self._encoded(prompt + completion, [span], prefix=True, is_closed=False)

    def _added(
        self,
        whole: Rendered,
        messages: Sequence[Message],
        number: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, int]:
        """Return the characters that message ``number`` adds behind its prompt."""
        try:
            prompt = render_marked(
                self.template, messages[:number], self._names, add_generation_prompt=True,
                tools=tools,
            ).text  # fmt: skip
        except DataError:
            if number > 0:
                raise
            raise _untold(_NO_PROMPT) from None
        turn = whole.text
        if number + 1 < len(messages):
            turn = render_marked(
                self.template, messages[: number + 1], self._names, tools=tools
            ).text
        closing = str(self._names.get("eos_token", ""))
        if closing and not whole.text.startswith(turn):
            turn = turn.removesuffix(closing)
        if number == 0 and not turn.startswith(prompt):
            raise _untold(_NO_PROMPT)
        if not turn.startswith(prompt) or not whole.text.startswith(turn):
            raise _untold(
                f"the chat template writes what stands before the end of message {number + 1} of "
                f"{len(messages)} otherwise when the conversation goes on, so this answer cannot "
                "be told from the rest"
            )
        return len(prompt), len(turn)

    def _closes(self, text: str, messages: Sequence[Message]) -> bool:
        """Whether a laid out text ends in a special token that is not the last message's own."""
        said = str(messages[-1].get("content") or "").rstrip()
        end = text.rstrip()
        return end.endswith(tuple(self.prompts.control)) and not (said and end.endswith(said))

    def _encoded(
        self, text: str, spans: Sequence[tuple[int, int]], *, prefix: bool, is_closed: bool
    ) -> AnsweredText:
        ids, starts, ends = self.prompts.encode_with_spans(text, prefix=prefix)
        answered = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            answered |= (starts < end) & (ends > start)
        is_open = len(ids) > 0 and bool(answered[-1])
        return AnsweredText(ids, answered, is_closed or not is_open)


def _untold(why: str) -> DataError:
    """Say that an answer cannot be told from the rest, and what helps."""
    return DataError(
        f"{why}; put {{% generation %}} and {{% endgeneration %}} around answers in the template, "
        "or learn the last one alone (train_on=last)"
    )
