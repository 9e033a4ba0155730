"""Rerank requests and answers, as vLLM's, Jina's and Cohere's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

MAX_DOCUMENTS = 2048
"""Documents of one request."""

_DOCUMENT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "object", "properties": {"text": {"type": "string", "minLength": 1}}, "required": ["text"]},
    ]
}
_DOCUMENTS_SCHEMA = {
    "anyOf": [*_DOCUMENT["anyOf"], {"type": "array", "items": _DOCUMENT, "minItems": 1, "maxItems": MAX_DOCUMENTS}]
}


class RerankRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr = Field(description="A model id of a reranker pool.")
    query: StrictStr = Field(min_length=1, description="What the documents are scored for.")
    # checked by `check_documents`, whose errors name the index
    documents: Annotated[Any, WithJsonSchema(_DOCUMENTS_SCHEMA)] = Field(
        description=f'Up to {MAX_DOCUMENTS} texts, each alone or as {{"text": ...}}; or a single one.'
    )
    top_n: StrictInt | None = Field(None, ge=0, description="How many results to send, the best; 0 or omitted: all.")
    return_documents: StrictBool | None = Field(True, description="Whether results carry the text of their document.")
    truncate_prompt_tokens: StrictInt | None = Field(
        None,
        ge=-1,
        description="Cut query and document to this many tokens together, the longer first; -1: the model's limit.",
    )
    use_activation: StrictBool | None = Field(
        True, description="Apply the model's activation (mostly the sigmoid); false: scores are raw logits."
    )
    user: StrictStr | None = Field(None, description="Accepted and left aside.")
    cocktail: dict[str, Any] | None = Field(None, description="An inline cocktail; `model` is then the pool.")


class RerankDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int = Field(description="Position of the document in the request.")
    document: RerankDocument | None = Field(None, description="Left out where `return_documents` is false.")
    relevance_score: float


class RerankUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    id: str
    model: str = Field(description="The version that answered.")
    usage: RerankUsage
    results: list[RerankResult] = Field(description="The best first; equal scores in the order of the request.")
