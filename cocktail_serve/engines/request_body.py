"""Bodies of requests as the engine gets them: under the name that it serves, and salted by whose they are."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from typing import Any

import orjson

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.recipe import Recipe

BYTES_PER_TOKEN = 4
EXPECTED_OUTPUT_TOKENS = 128
"""What a request is charged at its admission: a guess, replaced by the answer's usage at its end."""


class BodyWriter:
    """Writes the bodies for one engine.

    Args:
        served_model_name: what the engine's server calls its model, whichever recipe is resident.
    """

    def __init__(self, served_model_name: str) -> None:
        self._served_model_name = served_model_name
        self._salt_key = secrets.token_bytes(32)

    def write(self, body: Mapping[str, Any], recipe: Recipe, *, tenant: str) -> bytes:
        """An OpenAI body (already under the field policy) in JSON.

        Raises:
            InvalidRequestError: an integer beyond 64 bits, or text that is no Unicode.
        """
        salt = self.cache_salt(tenant, recipe, body.get("cache_salt"))
        return _dump({**body, "model": self._served_model_name, "cache_salt": salt})

    def cache_salt(self, tenant: str, recipe: Recipe, client_salt: Any) -> str:
        """What keeps KV blocks of tenants and recipes apart: part of every block's hash inside the engine."""
        return hmac.digest(self._salt_key, _dump([tenant, recipe.digest, client_salt]), "sha256").hex()


def expected_tokens(body: Mapping[str, Any], content: bytes) -> int:
    """A guess of the tokens, read and generated, that the answer to a body will take.

    Args:
        content: the body as it is sent.
    """
    wanted = body.get("max_completion_tokens") or body.get("max_tokens")
    num_out = min(wanted, EXPECTED_OUTPUT_TOKENS) if isinstance(wanted, int) else EXPECTED_OUTPUT_TOKENS
    return len(content) // BYTES_PER_TOKEN + num_out


def _dump(value: Any) -> bytes:
    """JSON of what came in as JSON.

    Raises:
        InvalidRequestError: an integer beyond 64 bits, or text that is no Unicode.
    """
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise InvalidRequestError(f"the body cannot be passed on as JSON: {error}") from error
