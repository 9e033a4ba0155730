"""The short way to the endpoints of the hot path."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cocktail_serve.errors import CocktailError
from cocktail_serve.gateway.error_handlers import error_response
from cocktail_serve.gateway.exchange import note_error


class DirectRequest(Request):
    """A request whose endpoint sends the answer itself, so that it knows when it was sent and to whom no more."""

    async def send(self, message: Message) -> None:
        """One ASGI message of the answer."""
        await self._send(message)

    async def answer(self, response: Response) -> None:
        """A whole answer."""
        await response(self.scope, self.receive, self._send)


class DirectRoute(APIRoute):
    """A POST route that `DirectRouting` calls past FastAPI, which only documents it: its path has no parameters, its
    endpoint takes a `DirectRequest` and nothing else, and answers it. What the endpoint raises is answered for it."""


class DirectRouting:
    """Calls the endpoints of direct routes before the router, FastAPI and what wraps them have been asked.

    Inside of all middleware that a POST passes. Other methods on their paths go on to the router, which refuses them.
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
        request = DirectRequest(scope, receive, send)
        try:
            await route.endpoint(request)
        except CocktailError as error:
            note_error(request.scope, error.code)
            await request.answer(error_response(error))
