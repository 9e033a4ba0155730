"""Rerank requests and answers, as vLLM's, Jina's, Cohere's, SiliconFlow's and Voyage's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

from cocktail_serve.gateway.schemas.neutral import LEFT_ASIDE, Only

MAX_DOCUMENTS = 2048
"""Documents of one request."""

_TEXT = {"type": "string", "minLength": 1}
_DOCUMENT = {"anyOf": [_TEXT, {"type": "object", "properties": {"text": _TEXT}}]}
_DOCUMENTS_SCHEMA = {
    "anyOf": [*_DOCUMENT["anyOf"], {"type": "array", "items": _DOCUMENT, "minItems": 1, "maxItems": MAX_DOCUMENTS}]
}


class RerankRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(description="A model id of a reranker pool.")
    query: StrictStr = Field(min_length=1, description="What the documents are scored for.")
    # checked by `check_documents`, whose errors name the index
    documents: Annotated[Any, WithJsonSchema(_DOCUMENTS_SCHEMA)] = Field(
        description=f"Up to {MAX_DOCUMENTS} texts, or objects of which `text` is read, or what `rank_fields` names; or "
        "a single one."
    )
    rank_fields: list[StrictStr] | None = Field(
        None,
        min_length=1,
        description="Of documents that are objects: the fields that are read, in this order, a line break between two. "
        "Those that a document lacks are left out.",
    )
    top_n: StrictInt | None = Field(None, ge=0, description="How many results to send, the best; 0 or omitted: all.")
    top_k: StrictInt | None = Field(
        None,
        ge=0,
        description="The same, as Voyage calls it; where it is sent, even as null, results are in `data` too.",
    )
    return_documents: StrictBool | None = Field(
        True, description="Whether results carry their document: its text and, of an object, its other fields."
    )
    max_tokens_per_doc: StrictInt | None = Field(
        None, ge=0, description="Cut each document to this many tokens before it is read; 0 or omitted: not."
    )
    max_tokens_per_query: StrictInt | None = Field(None, ge=0, description="Likewise the query.")
    truncate_prompt_tokens: StrictInt | None = Field(
        None,
        ge=-1,
        description="Cut query and document to this many tokens together, the longer first; -1: the model's limit.",
    )
    truncation: StrictBool | None = Field(
        None,
        description="true: cut what is too long; false: refuse it, which a pool with `truncate` does not.",
    )
    use_activation: StrictBool | None = Field(
        True, description="Apply the model's activation (mostly the sigmoid); false: scores are raw logits."
    )
    max_chunks_per_doc: StrictInt | None = Field(
        None, ge=1, description="Accepted: a document is always one chunk, which no maximum excludes."
    )
    overlap_tokens: StrictInt | None = Field(None, ge=0, description="Of chunks: accepted, as there is only one.")
    user: StrictStr | None = Field(None, description=LEFT_ASIDE)
    cache_salt: StrictStr | None = Field(None, description="Accepted: nothing is kept of a request.")
    priority: Annotated[Any, Only(0, why="the order of requests is the server's to decide")] = None
    request_id: Annotated[
        Any, Only(why="ids inside the engine are the server's; send the header x-request-id instead")
    ] = None
    instruction: Annotated[
        Any, Only("", why="models here read no instruction beside the query; write it into the query")
    ] = None
    truncation_side: Annotated[Any, Only("right", why="texts are cut at their end")] = None
    padding: Annotated[Any, Only("do_not_pad", why="padding never changes a score here")] = None
    chat_template_kwargs: Annotated[Any, Only({}, why="a chat template is given the pair alone")] = None
    mm_processor_kwargs: Annotated[Any, Only({}, why="documents are texts")] = None
    cocktail: dict[str, Any] | None = Field(None, description="An inline cocktail; `model` is then the pool.")


class RerankDocument(BaseModel):
    model_config = ConfigDict(extra="allow")

    text: str = Field(description="What was read of the document, before it was cut.")


class RerankResult(BaseModel):
    index: int = Field(description="Position of the document in the request.")
    document: RerankDocument | None = Field(None, description="Left out where `return_documents` is false.")
    relevance_score: float


class VoyageResult(BaseModel):
    index: int
    document: str | None = None
    relevance_score: float


class RerankUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    id: str
    model: str = Field(description="The version that answered.")
    usage: RerankUsage
    results: list[RerankResult] = Field(description="The best first; equal scores in the order of the request.")
    object: str | None = Field(None, description="`list`, beside `data`.")
    data: list[VoyageResult] | None = Field(None, description="The same as Voyage sends it, where `top_k` was sent.")
