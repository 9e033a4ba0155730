"""What the OpenAPI document needs beyond what FastAPI reads from the routes: errors, bodies read by hand, the key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute

from cocktail_serve.gateway.schemas.errors import ErrorBody

ERROR_STATUSES: dict[int, str] = {
    400: "Malformed, or unfit for the model.",
    401: "No API key, or one that is not valid.",
    403: "The key lacks the scope; or it is the operator's.",
    404: "Unknown, or another tenant's.",
    405: "Not this method.",
    409: "Conflicts with what exists; `x-should-retry: false`.",
    413: "A body over `server.max_request_bytes`.",
    422: "Models that cannot be mixed: names the tensor, both shapes and the fix.",
    429: "Over a limit; see `Retry-After`.",
    500: "An error of the server.",
    501: "Not served here; says what to use instead.",
    502: "The engine failed while it held the request.",
    503: "Not now: starting, mixing, or too many models in turn; see `Retry-After`.",
    504: "The engine did not answer in time.",
}

_HEADERS: dict[int, dict[str, Any]] = {
    409: {"x-should-retry": {"schema": {"type": "string", "enum": ["false"]}}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 1, "maximum": 120}}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 1, "maximum": 120}}},
}

_RATE_HEADERS: dict[str, Any] = {
    f"x-ratelimit-{what}-{of}": {"description": meaning, "schema": {"type": kind}}
    for of in ("requests", "tokens")
    for what, kind, meaning in (
        ("limit", "integer", f"{of.capitalize()} a minute that the tenant may use; sent where it has such a limit."),
        ("remaining", "integer", "What is left of them now."),
        ("reset", "string", "How long until all are there again, as `6m0s` or `20ms`."),
    )
}
_HEADERS[429] |= _RATE_HEADERS

_EVERYWHERE = (400, 401, 403, 500)
_ENGINE = (404, 409, 413, 422, 429, 502, 503, 504)

ErrorResponses = dict[int | str, dict[str, Any]]


def error_responses(*statuses: int) -> ErrorResponses:
    """The `responses` of a route that answers these errors beside those that every route does."""
    return {
        status: {
            "model": ErrorBody,
            "description": ERROR_STATUSES[status],
            **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        }
        for status in sorted({*_EVERYWHERE, *statuses})
    }


def engine_errors(*statuses: int) -> ErrorResponses:
    """The `responses` of a route that may make a cocktail and ask an engine."""
    return error_responses(*_ENGINE, *statuses)


def json_request(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body by hand."""
    return _request("application/json", schema)


def form_request(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a form by hand."""
    return _request("multipart/form-data", schema)


class _Reference(dict[str, str]):
    """To the schema of a body, which FastAPI does not see; the document gets it from here."""

    def __init__(self, schema: type[BaseModel]) -> None:
        super().__init__({"$ref": f"#/components/schemas/{schema.__name__}"})
        self.schema = schema


def _request(media_type: str, schema: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": _Reference(schema)}}}}


def _bodies(routes: Iterable[BaseRoute]) -> Iterator[type[BaseModel]]:
    for route in routes:
        if isinstance(route, APIRoute) and route.openapi_extra is not None:
            for content in route.openapi_extra["requestBody"]["content"].values():
                yield content["schema"].schema


def add_openapi(app: FastAPI) -> None:
    """Completes the document of an app, whose routes are all there: made once, on first use."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
            )
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for body in _bodies(app.routes):
                schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[body.__name__] = schema
            # FastAPI's own 422 is never sent: malformed is 400
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            components["securitySchemes"] = {"APIKey": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _without_validation_error(operation["responses"])
                    if "401" in operation["responses"]:
                        # a server may do without keys, but not what is the operator's
                        optional: list[dict[str, list[str]]] = [] if path.startswith("/admin/") else [{}]
                        operation["security"] = [{"APIKey": []}, *optional]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _without_validation_error(responses: dict[str, Any]) -> None:
    content = responses.get("422", {}).get("content", {}).get("application/json", {})
    if content.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]
