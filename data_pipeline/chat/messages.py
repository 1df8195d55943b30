"""A row of chat data as messages that a chat template understands; what is wrong is said.

A row of ``kind=messages`` is ``{"messages": [...]}`` or ``{"prompt": ..., "completion": ...}``, one
of ``kind=preferences`` ``{"prompt" or "messages": ..., "chosen": ..., "rejected": ...}``; each part
is a text or a list of messages as in OpenAI's interface, and ``tools`` may stand beside them. Where
a pair has no prompt, the messages its two sides begin with are the prompt.

    example_of({"messages": [{"role": "user", "content": "Hello"}, ...]})
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who speaks."""
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "tools")
"""Fields of a row that are read."""

Turns = str | tuple[dict[str, Any], ...]
"""A plain text, or messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What one row holds."""

    prompt: Turns
    """What is not answered for; messages in it may be an assistant's."""
    answers: tuple[Turns, ...]
    """What follows it: one continuation, or the chosen and the rejected one. Where all messages of
    a conversation are learned there is no prompt."""
    tools: tuple[dict[str, Any], ...] | None
    """Tools the assistant may call."""


def example_of(row: Mapping[str, Any]) -> Example:
    """Read a row of ``kind=messages``.

    Raises:
        DataError: it holds neither messages nor a prompt and a completion, or they are wrong.
    """
    tools = _tools(row.get("tools"))
    if row.get("messages") is not None:
        return Example(prompt=(), answers=(_messages("messages", row["messages"]),), tools=tools)
    prompt, completion = _part(row, "prompt"), _part(row, "completion")
    _check_alike({"prompt": prompt, "completion": completion})
    return Example(prompt=prompt, answers=(completion,), tools=tools)


def pair_of(row: Mapping[str, Any]) -> Example:
    """Read a row of ``kind=preferences``.

    Raises:
        DataError: a side or the prompt is missing or wrong.
    """
    chosen, rejected = _part(row, "chosen"), _part(row, "rejected")
    name = "messages" if row.get("messages") is not None else "prompt"
    if row.get(name) is None and not isinstance(chosen, str) and not isinstance(rejected, str):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt: Turns = chosen[:shared]
        chosen, rejected = chosen[shared:], rejected[shared:]
    else:
        prompt = _part(row, name)
    _check_alike({name: prompt, "chosen": chosen, "rejected": rejected})
    return Example(prompt=prompt, answers=(chosen, rejected), tools=_tools(row.get("tools")))


def _part(row: Mapping[str, Any], name: str) -> Turns:
    """Return a field that is a text or messages."""
    value = row.get(name)
    if value is None:
        found = ", ".join(sorted(key for key, held in row.items() if held is not None)) or "nothing"
        raise DataError(f"it has no {name!r}, but {found}; see docs/post_training.md for its form")
    return value if isinstance(value, str) else _messages(name, value)


def _check_alike(parts: Mapping[str, Turns]) -> None:
    kinds = {name: "a text" if isinstance(p, str) else "messages" for name, p in parts.items()}
    if len(set(kinds.values())) > 1:
        said = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise DataError(f"{said}; make all of them texts or all messages")


def _messages(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{name!r} is {_named(value)}; expected a list of messages such as "
            '{"role": "user", "content": "Hello"}'
        )
    return tuple(_message(f"{name}[{i}]", message) for i, message in enumerate(value))


def _message(place: str, value: Any) -> dict[str, Any]:
    """Check one message and leave out what is null in it, as transformers does."""
    if not isinstance(value, dict):
        raise DataError(f"{place} is {_named(value)}; expected an object with role and content")
    message = {key: held for key, held in value.items() if held is not None}
    if message.get("role") not in ROLES:
        raise DataError(f"{place} has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        if not isinstance(message["tool_calls"], list):
            raise DataError(f"{place}.tool_calls is {_named(message['tool_calls'])}; give a list")
        calls = enumerate(message["tool_calls"])
        message["tool_calls"] = [_call(f"{place}.tool_calls[{i}]", call) for i, call in calls]
    if "content" in message:
        message["content"] = _content(f"{place}.content", message["content"])
    elif "tool_calls" in message:
        message["content"] = ""
    else:
        raise DataError(f"{place} has no content and no tool_calls; a message needs one")
    return message


def _content(place: str, value: Any) -> str:
    """Return a content as text; parts of a list are joined."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _named(part)
            raise DataError(f"{place} holds {kind}; this model reads text alone")
    return "".join(part["text"] for part in parts)


def _call(place: str, value: Any) -> dict[str, Any]:
    """Check a tool call; arguments given as JSON in a text become the object templates ask for."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError(
            f'{place} names no function; expected {{"type": "function", "function": {{"name": '
            '..., "arguments": {...}}}'
        )
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise DataError(f"{place} has arguments that are no JSON object; give one, or {{}}")
    function = {**inner, "arguments": arguments}
    if "function" not in value:
        return function
    given = {key: held for key, held in value.items() if held is not None}
    return {**given, "function": function}


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str):  # tables keep schemas of many shapes as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError("tools is a text that is no JSON; give a list of schemas") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"tools is {_named(value)}; expected a list of JSON schemas")
    return tuple(value)


def _named(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]
