"""Embedding requests and answers, as OpenAI's, with vLLM's truncation and sentence-transformers' prompt names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, WithJsonSchema

MAX_INPUTS = 2048
"""Inputs of one request, as OpenAI's limit."""

_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_INPUTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "maxItems": MAX_INPUTS,
        },
    ]
}


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(description="A model id of an encoder pool.")
    # checked by `check_inputs`, whose errors name the index where a union of types would list all it is not
    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description=f"One text or up to {MAX_INPUTS}; token arrays only where the pool's engine.token_inputs is true."
    )
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64: little-endian float32.")
    dimensions: StrictInt | None = Field(
        None, ge=1, description="The full size, or one of the pool's matryoshka_dimensions."
    )
    user: StrictStr | None = Field(None, description="Accepted and left aside.")
    truncate_prompt_tokens: StrictInt | None = Field(
        None, ge=-1, description="Cut inputs to this many tokens; -1: to what the model takes."
    )
    prompt_name: StrictStr | None = Field(None, description="One of the pool's `prompts`, put before each input.")
    cocktail: dict[str, Any] | None = Field(None, description="An inline cocktail; `model` is then the pool.")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str = Field(description="The version that answered.")
    usage: EmbeddingUsage
