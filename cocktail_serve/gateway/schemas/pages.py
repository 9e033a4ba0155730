"""Lists that come in pages, as OpenAI's clients follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field


class Listed(BaseModel):
    """What a page lists."""

    id: str


View = TypeVar("View", bound=Listed)


class PageView(BaseModel, Generic[View]):
    object: Literal["list"] = "list"
    data: list[View]
    has_more: bool = Field(description="Whether more follows: ask again with `after` = `last_id`.")
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, views: Sequence[View], *, has_more: bool) -> Self:
        return cls(
            data=list(views),
            has_more=has_more,
            first_id=views[0].id if views else None,
            last_id=views[-1].id if views else None,
        )
