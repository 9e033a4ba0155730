"""The messages of a chat example, as OpenAI's fine-tuning rows have them, down to the answer that is scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cocktail_serve.errors import InvalidExamplesError
from cocktail_serve.example_rows import text_of

ROLES = ("system", "developer", "user", "assistant", "tool")

_NOT_SERVED = {
    "function_call": "say it as 'tool_calls', as OpenAI's API does now",
    "refusal": "write it as the content",
    "audio": "only text can be scored",
    "reasoning": "write it into the content, as the model writes it",
    "reasoning_content": "write it into the content, as the model writes it",
}
"""Fields of a message that would change what is scored."""

Message = tuple[str, str]
"""Role and content."""

Details = Mapping[str, Any]
"""What a message has beside role and content, and a chat template may render."""


def scored_messages(value: Any, number: int) -> tuple[tuple[Message, ...], tuple[Details, ...]]:
    """The messages up to the answer that is scored: the last of the assistant's whose weight is not 0.

    What follows it cannot change its loss. Details are by message, and empty where no message has any.

    Args:
        number: of the row, from 1.

    Raises:
        InvalidExamplesError: no conversation that ends with the assistant's answer to something, or nothing to score.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise InvalidExamplesError("'messages' must be a non-empty list of {role, content}", row=number)
    messages, details = [], []
    scored = None
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise InvalidExamplesError(f"{where} needs a role out of {', '.join(ROLES)} and text content", row=number)
        if _has_weight(message, where, number) and message["role"] == "assistant":
            scored = index
        details.append(_details(message, where, number))
        messages.append((message["role"], _content(message, where, number)))
    if messages[-1][0] != "assistant":
        raise InvalidExamplesError(
            "the last message must be the assistant's: it is the output that is scored", row=number
        )
    if scored is None:
        raise InvalidExamplesError(
            "every answer of the assistant has weight 0, so there is nothing to score; give one of them weight 1, or "
            "leave the row out",
            row=number,
        )
    if not scored:
        raise InvalidExamplesError("there is no message before the assistant's", row=number)
    end = scored + 1
    return tuple(messages[:end]), tuple(details[:end]) if any(details[:end]) else ()


def checked_tools(value: Any, number: int) -> tuple[Mapping[str, Any], ...]:
    """Definitions of tools, as OpenAI's API takes them; InvalidExamplesError for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidExamplesError(f"'tools' must be a list of tools, got {type(value).__name__}", row=number)
    for index, tool in enumerate(value):
        _check_function(tool, f"tools[{index}]", number)
        _check_json(tool, f"tools[{index}]", number)
    return tuple(value)


def _has_weight(message: Mapping[str, Any], where: str, number: int) -> bool:
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise InvalidExamplesError(f"{where}.weight must be 0 or 1, got {weight!r}", row=number)
    return weight != 0


def _content(message: Mapping[str, Any], where: str, number: int) -> str:
    """The text of a message. Only instructions, results of tools, and calls in place of an answer may be empty."""
    role, content = message["role"], message.get("content")
    is_call = role == "assistant" and bool(message.get("tool_calls"))
    may_be_empty = is_call or role in ("system", "developer", "tool")
    if content is None and is_call:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise InvalidExamplesError(f"{where}: only text content can be scored", row=number)
        content = "".join(text_of(part.get("text"), f"{where}.content", number) for part in content)
    return text_of(content, f"{where}.content", number, may_be_empty=may_be_empty)


def _details(message: Mapping[str, Any], where: str, number: int) -> Details:
    for key, advice in _NOT_SERVED.items():
        if message.get(key):
            raise InvalidExamplesError(f"{where}.{key} is not served: {advice}", row=number)
    details: dict[str, Any] = {}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            details[key] = text_of(message[key], f"{where}.{key}", number)
    if message.get("tool_calls"):
        if message["role"] != "assistant":
            raise InvalidExamplesError(f"{where}.tool_calls: only the assistant calls tools", row=number)
        details["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls", number)
    return details


def _calls(value: Any, where: str, number: int) -> list[dict[str, Any]]:
    """Calls of tools, their arguments as objects, which chat templates expect; the API says them as JSON text."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidExamplesError(f"{where} must be a list of calls, got {type(value).__name__}", row=number)
    calls = []
    for index, call in enumerate(value):
        here = f"{where}[{index}]"
        _check_function(call, here, number)
        _check_json(call, here, number)
        arguments = call["function"].get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise InvalidExamplesError(f"{here}.function.arguments is not JSON: {error}", row=number) from error
        if not isinstance(arguments, Mapping):
            raise InvalidExamplesError(f"{here}.function.arguments must be an object", row=number)
        _check_json(arguments, f"{here}.function.arguments", number)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return calls


def _check_function(value: Any, where: str, number: int) -> None:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or value.get("type", "function") != "function":
        raise InvalidExamplesError(
            f'{where} must be {{"type": "function", "function": {{"name": ..., ...}}}}', row=number
        )
    text_of(function.get("name"), f"{where}.function.name", number)


def _check_json(value: Any, where: str, number: int) -> None:
    """Raises InvalidExamplesError for what no text of JSON is: NaN, a lone surrogate, endless depth."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidExamplesError(f"{where} is not JSON: {error}", row=number) from error
