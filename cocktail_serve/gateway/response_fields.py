"""What `/v1/responses` asks for beside an answer, and is not served: state, and tools that run on the server.

The engine would leave such fields aside in silence, and answer something else than was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cocktail_serve.errors import InvalidRequestError, NotServedError
from cocktail_serve.gateway.field_policy import Outgoing, as_boolean, passed_on

_SEND_TURNS = "send the turns so far in `input`, as they came in `output`"

NOT_SERVED: Mapping[str, str] = {
    "background": "ask without it and wait for the answer, or ask many things as a batch: POST /v1/batches",
    "context_management": f"{_SEND_TURNS}, and leave out what is too long",
    "conversation": _SEND_TURNS,
    "previous_response_id": _SEND_TURNS,
    "prompt": "write the prompt into `instructions` and `input`",
    "store": "leave it out, or send false, and keep the answers that are needed",
}
"""Fields that lean on what a server keeps, and what to do instead. Null and false are as good as absent."""

SERVED_TOOLS = frozenset({"custom", "function", "namespace"})
"""Types of tools that run with the client."""


def apply_response_policy(body: Mapping[str, Any], *, allow_chat_template: bool) -> Outgoing:
    """Lays the field policy over a request to `/v1/responses`. `body` is left unchanged.

    Raises:
        InvalidRequestError: as `apply_field_policy`; an answer of before that the engine would read in part.
        NotServedError: state, or tools that run on a server; says what to use instead.
    """
    for field, instead in NOT_SERVED.items():
        if body.get(field) not in (None, False):
            raise NotServedError(
                f"{field!r} is not served, as nothing is kept of a response here: {instead}", param=field
            )
    _check_tools(body)
    _check_input(body.get("input"))
    outgoing = passed_on(body, allow_chat_template=allow_chat_template)
    as_boolean(body, "stream")
    outgoing.pop("stream_options", None)  # what it offers hides lengths of a stream, and the engine has no such thing
    return Outgoing(outgoing, shows_usage=True)


def _check_tools(body: Mapping[str, Any]) -> None:
    tools = body.get("tools")
    asked = list(tools) if isinstance(tools, list) else []
    choice = body.get("tool_choice")
    for name, tool in [*(("tools", tool) for tool in asked), ("tool_choice", choice)]:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if isinstance(kind, str) and kind not in SERVED_TOOLS and (name, kind) != ("tool_choice", "allowed_tools"):
            raise NotServedError(
                f"the tool {kind!r} runs on a server, and none runs here: describe it as a tool of type 'function', "
                "and run it in the client",
                param=name,
            )


def _check_input(items: Any) -> None:
    for index, item in enumerate(items if isinstance(items, list) else []):
        content = item.get("content") if isinstance(item, Mapping) else None
        if isinstance(content, list) and item.get("role") == "assistant" and len(content) > 1:
            raise InvalidRequestError(
                f"input[{index}] is an answer in {len(content)} parts, of which the engine would read the first alone: "
                "send it as one text",
                param=f"input.{index}.content",
            )
