"""A JSON value checked against a schema of ours: what is wrong with it, in one way whatever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cocktail_serve.errors import InvalidRequestError

Schema = TypeVar("Schema", bound=BaseModel)


def parse_as(schema: type[Schema], value: Any, *, param: str | None = None) -> Schema:
    """The value as `schema` has it.

    Args:
        param: name of the field that `value` stands in, put before the names of its own fields.

    Raises:
        InvalidRequestError: names the field, in dotted form, and what is wrong with it.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"expected a JSON object, got {type(value).__name__}", param=param)
    try:
        return schema.model_validate(dict(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = [param] if param else []
        # pydantic names a key of a mapping that is wrong itself so
        where = ".".join([*path, *(str(part) for part in first["loc"] if part != "[key]")])
        message = f"{where or 'body'}: {first['msg']}"
        if first["type"] == "extra_forbidden":
            message = f"unknown field {where!r}; known are {', '.join(sorted(schema.model_fields))}"
        elif first["type"] == "missing":
            message = f"{where!r} is required"
        raise InvalidRequestError(message, param=where or None) from error
