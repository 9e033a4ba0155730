"""One option that clients call by several names."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from cocktail_serve.errors import InvalidRequestError


def given(wanted: BaseModel, *names: str) -> tuple[str, Any]:
    """The one of these fields that a request gives, by its name, and its value; the first and None where none is.

    Raises:
        InvalidRequestError: two of them are given, with different values.
    """
    values = [(name, value) for name in names if (value := getattr(wanted, name)) is not None]
    for name, value in values:
        if value != values[0][1]:
            raise InvalidRequestError(
                f"{values[0][0]} and {name} mean the same and have different values; send one of them", param=name
            )
    return values[0] if values else (names[0], None)
