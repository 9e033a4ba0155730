"""How requests come to an engine whose recipes share a batch: bound to their row of coefficients, or not at all."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

import orjson

from cocktail_serve.errors import EngineError, InvalidMixError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.fence import ASGIMessage, ASGIScope, Receive
from vllm_cocktail.replies import DECIDE_PATH, RESPONSES_PATH, SCORE_PATH
from vllm_cocktail.unmerged.row import ROW_ARG, XARGS, bind

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.sampling_params import SamplingParams

BOUND_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", RESPONSES_PATH, SCORE_PATH, DECIDE_PATH})
"""Exact paths whose bodies bring coefficients as far as the worker. No other path of vLLM is let in."""

_bound_row: ContextVar[list[str | float] | None] = ContextVar("cocktail_bound_row", default=None)
"""The coefficients of the request that is being answered."""


class RequestBinder:
    """Binds the requests of one server; see `row.bind`.

    Args:
        base: the recipe that is the base alone.
        require_loaded: makes sure that the workers have a recipe's experts, or raises.
    """

    def __init__(self, base: Recipe, require_loaded: Callable[[Recipe], Awaitable[None]]) -> None:
        self._base = base
        self._require_loaded = require_loaded

    async def __call__(self, scope: ASGIScope, receive: Receive, recipe_digest: str | None) -> tuple[str, Receive]:
        """Reads a request's body.

        Returns:
            The digest of its recipe, and what the app receives in place of what the client sent.

        Raises:
            CocktailError: it cannot be bound; see `bind` and `UnmergedControl.require_loaded`.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path not in BOUND_PATHS or scope["method"] != "POST":
            raise InvalidMixError(
                f"{path} brings no coefficients; an engine whose recipes share a batch answers "
                f"{', '.join(sorted(BOUND_PATHS))}",
                code="invalid_recipe",
            )
        content = await _read(receive)
        try:
            body = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise InvalidMixError(f"the body is not JSON: {error}", code="invalid_recipe") from error
        if not isinstance(body, dict):
            raise InvalidMixError("the body must be a JSON object", code="invalid_recipe")
        recipe, bound = bind(body, recipe_digest, base=self._base)
        _bound_row.set(bound[XARGS][ROW_ARG])  # a request is answered in a context of its own
        await self._require_loaded(recipe)
        return recipe.digest, _replayed(orjson.dumps(bound), receive, scope)


def require_rows(engine: EngineClient) -> None:
    """Lets nothing reach an engine's workers without coefficients: there it would end the engine for everybody.

    What vLLM asks of itself to answer a request (beam search: each beam's next token) gets those of the request.
    """
    generate: Callable[..., AsyncGenerator[Any, None]] = engine.generate

    @wraps(generate)
    def generate_with_row(
        prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        if ROW_ARG not in (sampling_params.extra_args or {}):
            row = _bound_row.get()
            if row is None:
                raise EngineError("a request for the engine comes from none that was bound to its coefficients")
            sampling_params = sampling_params.clone()
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), ROW_ARG: row}
        return generate(prompt, sampling_params, *args, **kwargs)

    engine.generate = generate_with_row


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # the client is gone, and nobody reads that this is no JSON
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replayed(content: bytes, receive: Receive, scope: ASGIScope) -> Receive:
    """Gives a body in one piece, and then whatever comes from the client."""
    scope["headers"] = [
        *((name, value) for name, value in scope["headers"] if name != b"content-length"),
        (b"content-length", str(len(content)).encode()),
    ]
    pending = [content]

    async def replay() -> ASGIMessage:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
