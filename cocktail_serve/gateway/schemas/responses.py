"""Responses, documented loosely: they are vLLM's, and all but the fields of the policy pass through."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.cocktails.parsing import InlineBody


class ResponseRequest(BaseModel):
    """OpenAI's and vLLM's request for a response; see the field policy in the reference."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="A model id of a decoder pool; with `cocktail`, the pool's id.")
    input: str | list[dict[str, Any]] = Field(description="A text, or the turns so far.")
    instructions: str | None = Field(None, description="What goes before them, as the system's.")
    max_output_tokens: int | None = None
    stream: bool | None = Field(False, description="Answer as server-sent events.")
    store: Literal[False] | None = Field(None, description="Nothing is kept: false, or left out.")
    cocktail: InlineBody | None = Field(None, description="Mix for this request, or find the same mixture again.")


class ResponseView(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int | float
    model: str = Field(description="The version that answered.")
    status: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    store: Literal[False] = Field(description="Nothing is kept of it.")
