"""The model list, in OpenAI's form with the pool and the kind added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

from cocktail_serve.pool import Kind

ModelType = Literal["chat", "embedding", "rerank"]
"""Together's and LM Studio's word, and the `mode` of LiteLLM."""

Capability = Literal["completion", "tools", "embedding", "rerank"]
"""Ollama's and llama.cpp's words; Infinity's for rerankers."""

OF_KIND: Mapping[Kind, tuple[ModelType, Capability]] = {
    "decoder": ("chat", "completion"),
    "encoder": ("embedding", "embedding"),
    "reranker": ("rerank", "rerank"),
}
"""What the served kinds are called by clients that look for a model of theirs."""


class Model(BaseModel):
    id: str = Field(
        description="`<pool>`, `<pool>/<expert>`, `<cocktail>` or `<cocktail>@<digest8>`.", examples=["flan/ag-news"]
    )
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time, seconds.")
    owned_by: str = Field(description="`operator` for pools and experts, the tenant's name for its cocktails.")
    kind: Kind = Field(description="Which requests it answers: decoder, encoder or reranker.")
    type: ModelType = Field(description="The same in the words of lists that hold models of many kinds.")
    capabilities: list[Capability] = Field(
        description="`completion`: chat and text completions; `tools`: calls of tools that the model decides on; "
        "`embedding`; `rerank`."
    )
    pool: str
    max_model_len: int | None = Field(
        description="Tokens that it takes, special ones included: of decoders with what it answers, of rerankers of a "
        "pair. Null until its engine has told."
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
