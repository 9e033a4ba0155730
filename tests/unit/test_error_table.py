"""Every error is mapped, every status documented, every body of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from cocktail_serve import errors
from cocktail_serve.config import Settings
from cocktail_serve.errors import (
    CapacityError,
    CocktailError,
    ConflictError,
    EngineError,
    ModelNotReadyError,
    StorageError,
)
from cocktail_serve.gateway.app import create_app
from cocktail_serve.gateway.error_handlers import HTTP_ERRORS, error_response, http_error
from cocktail_serve.gateway.openapi import ERROR_STATUSES


def _tree(cls: type[CocktailError]) -> Iterator[type[CocktailError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _tree(child)


ALL = list(dict.fromkeys(_tree(CocktailError)))


def test_every_class_is_in_the_table_itself() -> None:
    assert set(HTTP_ERRORS) == set(ALL)


@pytest.mark.parametrize("cls", ALL)
def test_body_and_headers(cls: type[CocktailError]) -> None:
    error = cls("what is wrong", param="examples")
    response = error_response(error)
    body = orjson.loads(response.body)
    assert response.status_code == HTTP_ERRORS[cls].status
    assert list(body) == ["error"]
    assert body["error"] == {
        "message": error.message,
        "type": HTTP_ERRORS[cls].type,
        "param": "examples",
        "code": cls.code,
    }
    assert ("retry-after" in response.headers) == isinstance(error, CapacityError | StorageError)
    if response.status_code in (429, 503):
        assert 1 <= int(response.headers["retry-after"]) <= 120


def test_a_subclass_answers_as_its_nearest_class() -> None:
    class Special(EngineError):
        pass

    assert http_error(Special("x")).status == 502


def test_clients_are_told_what_not_to_retry() -> None:
    assert error_response(ConflictError("x")).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in error_response(ModelNotReadyError("x")).headers
    assert "x-should-retry" not in error_response(EngineError("x")).headers


def openapi_document(base: Path) -> dict[str, Any]:
    pool = {"id": "flan", "kind": "decoder", "base": str(base), "engine": {"type": "fake"}}
    return create_app(Settings.model_validate({"pools": [pool]})).openapi()


def test_every_status_is_documented(tmp_path: Path) -> None:
    document = openapi_document(tmp_path)
    documented = {
        int(status)
        for operations in document["paths"].values()
        for operation in operations.values()
        for status in operation["responses"]
    }
    answered = {http_error.status for http_error in HTTP_ERRORS.values()}
    assert answered <= documented
    assert answered <= set(ERROR_STATUSES)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "HTTPValidationError" not in orjson.dumps(operation).decode()
            if path.startswith("/v1/"):
                assert {"400", "401", "500"} <= set(operation["responses"])
    references = orjson.dumps(document).decode().split('"#/components/schemas/')[1:]
    assert {reference.partition('"')[0] for reference in references} <= set(document["components"]["schemas"])


def test_schemas_have_names_of_their_own(tmp_path: Path) -> None:
    """Two classes of one name would be told apart by the path of their module, which generated clients then show."""
    names = openapi_document(tmp_path)["components"]["schemas"]
    assert {"RecipeView", "EngineRecipeView", "JobEventView", "AuditEventView"} <= names.keys()
    assert not [name for name in names if "__" in name]
