"""Conversations as text, by the chat template that came with a tokenizer.

A template is Jinja, as transformers reads it: ``chat_template.jinja`` beside the tokenizer, else
``chat_template`` in ``tokenizer_config.json`` (a string, or several with names), else in
``chat_template.json``. It runs in Jinja's sandbox, for templates come from others, and sees plain
data alone. What stands between ``{% generation %}`` and ``{% endgeneration %}`` is an answer;
``render_marked`` tells where, ``llmtrain.tokenizer.answers`` finds answers in any template.

    template = find_template(Path("tokenizer"))
    text = render(template, [{"role": "user", "content": "Hello"}], {"bos_token": "<s>"})
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.errors import DataError
from llmtrain.tokenizer.files import CONFIG_FILE, read_object

TEMPLATE_FILE = "chat_template.jinja"
JSON_TEMPLATE_FILE = "chat_template.json"

_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_FAULTS = (
    TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError, MemoryError,
)  # fmt: skip
"""What a template raises besides Jinja's own errors: it is a program, with a program's faults."""
_PRIVATE = range(0xE000, 0xF900)
"""Code points without a meaning of their own, from which the marks of blocks are taken."""

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else a template asks for (``tool_calls`` and so on)."""


def find_template(folder: Path) -> str | None:
    """Return the chat template of a tokenizer folder; None where it has none.

    Raises:
        DataError: it has several, none of which is called "default".
    """
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    for name in (CONFIG_FILE, JSON_TEMPLATE_FILE):
        found = read_object(folder / name) if (folder / name).is_file() else {}
        template = found.get("chat_template")
        if isinstance(template, list):
            template = _default(template, folder / name)
        if template is not None:
            return str(template)
    return None


def _default(templates: Sequence[Mapping[str, str]], path: Path) -> str:
    by_name = {entry["name"]: entry["template"] for entry in templates}
    if "default" not in by_name:
        raise DataError(
            f"{path} has the chat templates {', '.join(by_name)} and none called default; put the "
            f"one to use into {TEMPLATE_FILE} beside it"
        )
    return by_name["default"]


def required_template(folder: Path) -> str:
    """Return the chat template of a tokenizer folder.

    Raises:
        DataError: it has none.
    """
    template = find_template(folder)
    if template is None:
        raise DataError(
            f"the tokenizer in {folder} has no chat template, and a conversation needs one; put "
            f"{TEMPLATE_FILE} there, or give plain prompts"
        )
    return template


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    """What the template wrote."""
    answers: list[tuple[int, int]]
    """Characters [start, end) of every generation block, in order."""


def has_answer_blocks(template: str) -> bool:
    """Whether a template says itself what is an answer."""
    return _BLOCK.search(template) is not None


def render(
    template: str,
    messages: Sequence[Message],
    names: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Lay a conversation out as text.

    Args:
        template: Jinja source.
        messages: the conversation.
        names: spelling of special tokens by the name templates know (``bos_token`` ...).
        add_generation_prompt: end with what comes before an answer.
        tools: JSON schemas of the tools a model may call.

    Raises:
        DataError: the template refuses the conversation, or is none.
    """
    given = {"strftime_now": lambda form: datetime.now().strftime(form), **names}
    return _written(template, messages, tools, add_generation_prompt, given, ("", ""))


def render_marked(
    template: str,
    messages: Sequence[Message],
    names: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Rendered:
    """Lay a conversation out as text and tell where its generation blocks stand.

    ``names`` may hold any further variable of the template. The day is not told where they have no
    ``strftime_now``: equal data gives equal text, with the date a template has for this.

    Raises:
        DataError: the template refuses the conversation, or is none.
    """
    given = json.dumps([messages, tools], ensure_ascii=False)
    begin, end = islice((mark for mark in map(chr, _PRIVATE) if mark not in given), 2)
    marked = _written(template, messages, tools, add_generation_prompt, names, (begin, end))
    parts = re.split(f"([{begin}{end}])", marked)
    text, starts, answers = "", list[int](), list[tuple[int, int]]()
    for part in parts:
        if part == begin:
            starts.append(len(text))
        elif part == end:
            answers.append((starts.pop(), len(text)))
        else:
            text += part
    return Rendered(text, answers)


def _written(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    names: Mapping[str, Any],
    marks: tuple[str, str],
) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(_compiled(template, marks).render(
            messages=_plain(messages), tools=_plain(tools), documents=None,
            add_generation_prompt=add_generation_prompt, **names,
        ))  # fmt: skip
    except (TemplateError, *_FAULTS) as error:
        raise DataError(
            f"the chat template refuses this conversation of {len(messages)} messages "
            f"({str(error) or type(error).__name__}); give the roles and fields it expects"
        ) from None


def _plain(value: Any) -> Any:
    """Copy what a template sees as JSON's own types."""
    return json.loads(json.dumps(value))


@lru_cache(maxsize=8)
def _compiled(template: str, marks: tuple[str, str]) -> Any:
    return _environment(marks).from_string(template)


def _environment(marks: tuple[str, str]) -> Any:
    """Make the sandbox, with what templates expect in it; ``marks`` frame generation blocks."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_blocks(marks), loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _generation_blocks(marks: tuple[str, str]) -> Any:
    """Make the extension for ``{% generation %}`` blocks, which print as is between ``marks``."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
            return nodes.Scope([begin, *body, end]).set_lineno(line)

    return GenerationBlocks
