"""The one table from errors to HTTP statuses, and the one body that every error has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from cocktail_serve import errors
from cocktail_serve.errors import CapacityError, CocktailError, InvalidRequestError, StorageError
from cocktail_serve.gateway.exchange import note_error


class HTTPError(NamedTuple):
    """What a class of errors looks like over HTTP.

    Attributes:
        status: the HTTP status.
        type: `error.type` of the body, in OpenAI's words.
    """

    status: int
    type: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

HTTP_ERRORS: Mapping[type[CocktailError], HTTPError] = {
    errors.CocktailError: HTTPError(500, _SERVER),
    errors.ClientError: HTTPError(400, _INVALID),
    errors.InvalidRequestError: HTTPError(400, _INVALID),
    errors.InvalidExamplesError: HTTPError(400, _INVALID),
    errors.InvalidMixError: HTTPError(400, _INVALID),
    errors.MethodNotServedError: HTTPError(422, _INVALID),
    errors.WeightingNotServedError: HTTPError(422, _INVALID),
    errors.WrongModelKindError: HTTPError(400, _INVALID),
    errors.ContextLengthError: HTTPError(400, _INVALID),
    # the operator's mistake, not the caller's: it can only show once the server runs if a file changed under it
    errors.ConfigError: HTTPError(500, _SERVER),
    errors.AuthenticationError: HTTPError(401, "authentication_error"),
    errors.PermissionDeniedError: HTTPError(403, "permission_error"),
    errors.NotFoundError: HTTPError(404, _INVALID),
    errors.ConflictError: HTTPError(409, _INVALID),
    errors.PayloadTooLargeError: HTTPError(413, _INVALID),
    errors.NotServedError: HTTPError(501, _INVALID),
    errors.CheckpointError: HTTPError(422, _INVALID),
    errors.ModelChangedError: HTTPError(422, _INVALID),
    errors.IncompatibleModelsError: HTTPError(422, _INVALID),
    errors.NotFiniteError: HTTPError(422, _INVALID),
    errors.CapacityError: HTTPError(503, _SERVER),
    errors.ModelNotReadyError: HTTPError(503, _SERVER),
    errors.QueueTimeoutError: HTTPError(503, _SERVER),
    errors.DrainedError: HTTPError(503, _SERVER),
    errors.RateLimitError: HTTPError(429, "rate_limit_error"),
    errors.QuotaExceededError: HTTPError(429, "rate_limit_error"),
    errors.ServerError: HTTPError(500, _SERVER),
    errors.EngineError: HTTPError(502, _SERVER),
    errors.EngineTimeoutError: HTTPError(504, _SERVER),
    errors.StorageError: HTTPError(503, _SERVER),
}

_RETRIED_BY_CLIENTS = frozenset({409, 429, *range(500, 600)})
"""Statuses that the OpenAI clients retry unless `x-should-retry` says otherwise."""


def http_error(error: CocktailError) -> HTTPError:
    """Status and type of an error: those of its nearest class in `HTTP_ERRORS`."""
    return next(HTTP_ERRORS[cls] for cls in type(error).__mro__ if cls in HTTP_ERRORS)


def error_body(error: CocktailError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it."""
    return _body(error.message, type=http_error(error).type, param=error.param, code=error.code)


def error_response(error: CocktailError) -> Response:
    """The whole answer: body, `Retry-After` where waiting helps, `x-should-retry: false` where repeating does not."""
    status = http_error(error).status
    headers: dict[str, str] = {}
    if isinstance(error, CapacityError | StorageError):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if status in _RETRIED_BY_CLIENTS and not error.retryable:
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return _response(status, error_body(error), headers)


def internal_error() -> errors.ServerError:
    """For an error that is ours: says nothing about it, since the log does."""
    return errors.ServerError("the server hit an internal error; its log has the details")


def stopping_error() -> errors.ModelNotReadyError:
    """For what a server that ends can begin, or finish, no more."""
    return errors.ModelNotReadyError("the server is stopping; ask again")


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error that a route, FastAPI or the router raises the same shape."""
    app.add_exception_handler(CocktailError, _on_cocktail_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


# the handlers are coroutines since Starlette runs plain functions on a thread each


async def _on_cocktail_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CocktailError)
    note_error(request.scope, error.code)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    invalid = InvalidRequestError(f"{where or first['loc'][0]}: {first['msg']}", param=where or None)
    return await _on_cocktail_error(request, invalid)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    message, code = {
        404: (f"there is no route {path}; /docs lists them", "route_not_found"),
        405: (f"{path} is not allowed; see the Allow header for what is", "method_not_allowed"),
    }.get(error.status_code, (error.detail, None))
    note_error(request.scope, code or "")
    type_ = _SERVER if error.status_code >= 500 else _INVALID
    return _response(error.status_code, _body(message, type=type_, param=None, code=code), dict(error.headers or {}))


def _body(message: str, *, type: str, param: str | None, code: str | None) -> dict[str, Any]:  # noqa: A002 # the field's name
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _response(status: int, body: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), status_code=status, headers=headers, media_type="application/json")
