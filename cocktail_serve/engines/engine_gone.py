"""An engine that is not there any more: what it did not get, it cannot have been lost to."""

from __future__ import annotations

from cocktail_serve.errors import EngineError


class EngineGoneError(EngineError):
    """Nobody listens where the engine was: the request has not reached it."""
