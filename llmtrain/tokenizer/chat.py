"""Conversations as text, by the chat template that came with a tokenizer.

A template is Jinja, as transformers reads it: ``chat_template.jinja`` beside the tokenizer, else
``chat_template`` in ``tokenizer_config.json`` (a string, or several with names), else in
``chat_template.json``. It runs in Jinja's sandbox, for templates come from others, and sees plain
data alone.

    template = find_template(Path("tokenizer"))
    text = render(template, [{"role": "user", "content": "Hello"}], {"bos_token": "<s>"})
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.tokenizer.files import CONFIG_FILE, read_object

TEMPLATE_FILE = "chat_template.jinja"
JSON_TEMPLATE_FILE = "chat_template.json"

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
    from jinja2.exceptions import TemplateError

    try:
        return str(_environment().from_string(template).render(
            messages=_plain(messages), tools=_plain(tools), documents=None,
            add_generation_prompt=add_generation_prompt, **names,
        ))  # fmt: skip
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the chat template refuses this conversation of {len(messages)} messages ({error}); "
            "give the roles and fields it expects"
        ) from None


def _plain(value: Any) -> Any:
    """Copy what a template sees as JSON's own types."""
    return json.loads(json.dumps(value))


def _environment() -> Any:
    """Make the sandbox, with what templates expect in it."""
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
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_blocks(), loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _generation_blocks() -> Any:
    """Make the extension for ``{% generation %}`` blocks, which mark answers; they print as is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return GenerationBlocks
