"""The model list, in OpenAI's form with the pool and the kind added."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from cocktail_serve.pool import Kind


class Model(BaseModel):
    id: str = Field(
        description="`<pool>`, `<pool>/<expert>`, `<cocktail>` or `<cocktail>@<digest8>`.", examples=["flan/ag-news"]
    )
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time, seconds.")
    owned_by: str = Field(description="`operator` for pools and experts, the tenant's name for its cocktails.")
    kind: Kind = Field(description="Which requests it answers: decoder, encoder or reranker.")
    pool: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
