"""The short way to the endpoints of the hot path."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from cocktail_serve.errors import CocktailError
from cocktail_serve.gateway.error_handlers import error_response


class DirectRoute(APIRoute):
    """A documented POST route whose path has no parameters and whose endpoint takes the request and nothing else, so
    that `DirectRouting` can call it."""


class DirectRouting:
    """Calls the endpoints of direct routes before the router, FastAPI and what wraps them have been asked.

    The innermost middleware. Other methods on their paths go on to the router, which refuses them.
    """

    def __init__(self, app: ASGIApp, *, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if isinstance(route, DirectRoute)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = None
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._routes.get(scope["path"])
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as the router does
        try:
            response = await route.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)
        except CocktailError as error:
            await error_response(error)(scope, receive, send)
