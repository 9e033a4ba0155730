"""Embedding requests and answers, as OpenAI's, with what vLLM's, Jina's, Cohere's and Voyage's clients send beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

from cocktail_serve.gateway.schemas.neutral import LEFT_ASIDE, Only

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
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float if left out; base64: little-endian float32."
    )
    embedding_type: Literal["float", "base64"] | None = Field(None, description="The same, as Jina calls it.")
    dimensions: StrictInt | None = Field(
        None, ge=1, description="The full size, or one of the pool's matryoshka_dimensions."
    )
    output_dimension: StrictInt | None = Field(None, ge=1, description="The same, as Voyage calls it.")
    truncate_prompt_tokens: StrictInt | None = Field(
        None, ge=-1, description="Cut inputs to this many tokens; -1: to what the model takes."
    )
    truncation: StrictBool | None = Field(
        None,
        description="true: cut inputs to what the model takes; false: refuse longer ones, which a pool with `truncate` "
        "does not.",
    )
    truncate: StrictBool | None = Field(None, description="The same, as Jina calls it.")
    prompt_name: StrictStr | None = Field(None, description="One of the pool's `prompts`, put before each input.")
    input_type: StrictStr | None = Field(
        None,
        description="The same, as Voyage (`query`, `document`) and Cohere (`search_query`, `search_document`) call it: "
        "the name of a prompt. A pool without any prompts treats all inputs alike.",
    )
    task: StrictStr | None = Field(None, description="Likewise, as Jina calls it (`retrieval.query`).")
    user: StrictStr | None = Field(None, description=LEFT_ASIDE)
    cache_salt: StrictStr | None = Field(None, description="Accepted: nothing is kept of a request.")
    priority: Annotated[Any, Only(0, why="the order of requests is the server's to decide")] = None
    request_id: Annotated[
        Any, Only(why="ids inside the engine are the server's; send the header x-request-id instead")
    ] = None
    output_dtype: Annotated[Any, Only("float", why="embeddings are float32")] = None
    embed_dtype: Annotated[Any, Only("float32", why="embeddings are float32")] = None
    endianness: Annotated[Any, Only("native", "little", why="base64 is of little-endian numbers")] = None
    add_special_tokens: Annotated[Any, Only(True, why="the model was trained with its special tokens")] = None
    use_activation: Annotated[Any, Only(True, why="a model's modules are applied as it was saved with them")] = None
    normalized: Annotated[Any, Only(why="a model normalises as it was saved to; do so in the client")] = None
    late_chunking: Annotated[Any, Only(False, why="every input gets one embedding")] = None
    return_multivector: Annotated[Any, Only(False, why="every input gets one embedding")] = None
    truncation_side: Annotated[Any, Only("right", why="texts are cut at their end")] = None
    padding: Annotated[Any, Only("do_not_pad", why="padding never changes an embedding here")] = None
    mm_processor_kwargs: Annotated[Any, Only({}, why="inputs are texts")] = None
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
