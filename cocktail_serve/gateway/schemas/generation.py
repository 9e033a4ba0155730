"""Generation bodies, documented loosely: they are vLLM's, and all but the fields of the policy pass through."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.cocktails.parsing import InlineBody


class _Generation(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = Field(description="A model id of a decoder pool; with `cocktail`, the pool's id.")
    stream: bool | None = Field(False, description="Answer as server-sent events.")
    stream_options: dict[str, Any] | None = Field(None, description='`{"include_usage": true}` for usage at the end.')
    cocktail: InlineBody | None = Field(None, description="Mix for this request, or find the same mixture again.")


class ChatCompletionRequest(_Generation):
    """OpenAI's and vLLM's chat completion request; see the field policy in the reference."""

    messages: list[dict[str, Any]]


class CompletionRequest(_Generation):
    """OpenAI's and vLLM's completion request; see the field policy in the reference."""

    prompt: str | list[str] | list[int] | list[list[int]]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    created: int
    model: str = Field(description="The version that answered.")
    choices: list[dict[str, Any]]
    usage: dict[str, Any] | None = None


class ChatCompletion(_Answer):
    object: Literal["chat.completion"]


class Completion(_Answer):
    object: Literal["text_completion"]
