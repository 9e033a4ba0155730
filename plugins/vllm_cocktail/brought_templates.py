"""Requests to `/v1/responses` are rendered by the chat template that they bring, as chats are.

A recipe's chat template is part of what was asked for, and comes with the request. vLLM reads it in the bodies of chats
alone: a response would silently be rendered by the template of the base. And it lets the tokenizer add its special
tokens to what a template made of a response, which has its own already, as it does not with chats.
"""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any


def take_brought_templates() -> bool:
    """Has vLLM's Responses API take `chat_template` from a body. May be called many times.

    Returns:
        False where this vLLM renders them in another way: then nobody may ask there.
    """
    try:
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        build, tokenize = ResponsesRequest.build_chat_params, ResponsesRequest.build_tok_params
    except (ImportError, AttributeError):
        return False
    if getattr(build, "__wrapped__", None) is None:

        @wraps(build)
        def build_chat_params(self: Any, default_template: str | None, *args: Any, **kwargs: Any) -> Any:
            brought = (self.model_extra or {}).get("chat_template")
            return build(self, default_template if brought is None else brought, *args, **kwargs)

        @wraps(tokenize)
        def build_tok_params(self: Any, *args: Any, **kwargs: Any) -> Any:
            return replace(tokenize(self, *args, **kwargs), add_special_tokens=False)

        ResponsesRequest.build_chat_params = build_chat_params
        ResponsesRequest.build_tok_params = build_tok_params
    return True
