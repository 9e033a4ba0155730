"""Lists that come in pages, as OpenAI's clients follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, Protocol, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

AfterQuery = Annotated[str | None, Query(description="Id to begin behind.")]


class Listed(BaseModel):
    """What a page lists."""

    id: str


class HasId(Protocol):
    """What can stand at the end of a page."""

    @property
    def id(self) -> str: ...


View = TypeVar("View", bound=Listed)


class PageView(BaseModel, Generic[View]):
    object: Literal["list"] = "list"
    data: list[View]
    has_more: bool = Field(description="Whether more follows: ask again with `after` = `last_id`.")
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, views: Sequence[View], *, has_more: bool) -> Self:
        return cls(data=list(views), has_more=has_more, **_ends(views))

    @classmethod
    def without_data(cls, listed: Sequence[HasId], *, has_more: bool) -> Self:
        """The page but for what it lists, for `list_response`."""
        return cls(data=[], has_more=has_more, **_ends(listed))


def _ends(listed: Sequence[HasId]) -> dict[str, str | None]:
    return {"first_id": listed[0].id if listed else None, "last_id": listed[-1].id if listed else None}
