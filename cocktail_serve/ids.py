"""Ids that sort by the moment they were made, so that a place in a list outlives what stood there."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from cocktail_serve.errors import InvalidRequestError

Order = Literal["asc", "desc"]

_T = TypeVar("_T")


def new_id(prefix: str) -> str:
    """`prefix-` and 28 hex digits: nanoseconds since the epoch, then 48 random bits."""
    return f"{prefix}-{time.time_ns():016x}{secrets.token_hex(6)}"


def is_id(value: str, prefix: str) -> bool:
    """Whether a value can be an id of this kind. What cannot be one need not be looked up."""
    return re.fullmatch(f"{prefix}-[0-9a-f]{{28}}", value) is not None


def check_cursor(after: str | None, prefix: str) -> None:
    """Checks the `after` of a list. It need not exist any more: a client may delete what it has listed.

    Raises:
        InvalidRequestError: it cannot be an id of this kind.
    """
    if after is not None and not is_id(after, prefix):
        raise InvalidRequestError(
            f"after: {after!r} is not an id of this list; give the last one you got", param="after"
        )


@dataclass(frozen=True, slots=True)
class Page(Generic[_T]):
    """A part of a list, and whether more of it follows."""

    data: Sequence[_T]
    has_more: bool

    @classmethod
    def of(cls, found: Sequence[_T], limit: int) -> Page[_T]:
        """The first `limit` of what was looked up with a limit of one more."""
        return cls(data=found[:limit], has_more=len(found) > limit)
