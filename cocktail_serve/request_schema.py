"""A value checked against a schema of ours: what is wrong with it, in one way whatever it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.suggestions import did_you_mean

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
            known = fields_beside(schema, first["loc"])
            message = (
                f"unknown field {where!r}; known are {', '.join(known)}{did_you_mean(str(first['loc'][-1]), known)}"
            )
        elif first["type"] == "missing":
            message = f"{where!r} is required"
        raise InvalidRequestError(message, param=where or None) from error


def fields_beside(schema: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The fields that a schema has where an unknown one stands, sorted.

    Args:
        loc: where that is, as pydantic says it: fields, indexes, keys of mappings, and of a union the member's tag.
    """
    models = [schema]
    for part in loc[:-1]:
        inner = [found for model in models if part in model.model_fields for found in _models_of(model, str(part))]
        tagged = [model for model in models if (tag := model.model_fields.get("type")) and tag.default == part]
        models = inner or tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _models_of(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    return list(_models_in(model.model_fields[field].annotation))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
