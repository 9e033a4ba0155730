"""Bodies of requests as the engine gets them: under the name that it serves, salted by whose they are, and with what
the model takes where they do not say."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from typing import Any

import orjson

from cocktail_serve.digest import canonical_json
from cocktail_serve.engines.base import CHAT_PATH, RESPONSES_PATH
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.generation_settings import (
    MAX_TOKENS,
    NEUTRAL_SAMPLING,
    NO_SETTINGS,
    GenerationSettings,
    sent_stop_token_ids,
)
from cocktail_serve.pool import Mode
from cocktail_serve.recipe import Recipe

MOST_TOKENS: Mapping[str, tuple[str, ...]] = {
    CHAT_PATH: (MAX_TOKENS, "max_completion_tokens"),
    RESPONSES_PATH: ("max_output_tokens",),
}
"""The fields that bound an answer, of requests whose messages the server renders; the first says a model's default."""


def recipe_fields(recipe: Recipe, *, mode: Mode) -> Mapping[str, Any]:
    """What a body says so that the recipe answers it, in place of what its client said.

    Args:
        mode: of the pool. Unmerged, each request brings the coefficients of its own recipe; merged, the recipe is
            resident while its lease is held.
    """
    if mode == "merged":
        return {}
    return {"vllm_xargs": {"cocktail_recipe": canonical_json(recipe.to_json()).decode()}}


class BodyWriter:
    """Writes the bodies for one engine.

    Args:
        own: what the server itself takes where a body does not say: that of the base, which it was started with.
    """

    def __init__(self, *, own: GenerationSettings = NO_SETTINGS) -> None:
        self._own = own
        self._salt_key = secrets.token_bytes(32)

    def complete(
        self, body: Mapping[str, Any], path: str, settings: GenerationSettings, *, max_model_len: int | None
    ) -> Mapping[str, Any]:
        """The body with what a model takes otherwise than the server, as far as the body itself does not say.

        Args:
            max_model_len: the server's context length, which no default of a model may exceed; None: not known yet.
        """
        own = self._own
        if settings == own:
            return body
        more: dict[str, Any] = {}
        stop_token_ids = sent_stop_token_ids(body, settings, own)
        if stop_token_ids is not None:
            more["stop_token_ids"] = stop_token_ids
        if settings.sampling != own.sampling:
            for name, neutral in NEUTRAL_SAMPLING.items():
                wanted = settings.sampling.get(name, neutral)
                if body.get(name) is None and wanted != own.sampling.get(name, neutral):
                    more[name] = wanted
        if path in MOST_TOKENS:
            more |= self._chat_fields(body, path, settings, max_model_len)
        return {**body, **more}

    def _chat_fields(
        self, body: Mapping[str, Any], path: str, settings: GenerationSettings, max_model_len: int | None
    ) -> dict[str, Any]:
        more = self._chat_template(body, settings)
        wanted = settings.sampling.get(MAX_TOKENS)
        if wanted != self._own.sampling.get(MAX_TOKENS) and all(body.get(name) is None for name in MOST_TOKENS[path]):
            # the server cuts this to the room that the prompt leaves, and refuses what is beyond its context
            bounds = [bound for bound in (wanted, max_model_len) if bound is not None]
            if bounds:
                more[MOST_TOKENS[path][0]] = min(bounds)
        return more

    def _chat_template(self, body: Mapping[str, Any], settings: GenerationSettings) -> dict[str, Any]:
        template = settings.chat_template
        if template is None or template == self._own.chat_template or body.get("chat_template") is not None:
            return {}
        return {"chat_template": (template.tool_use if body.get("tools") else None) or template.text}

    def write_for_tokenizer(
        self, body: Mapping[str, Any], settings: GenerationSettings, *, fields: Mapping[str, Any]
    ) -> bytes:
        """A body for the server's tokenizer: messages are rendered as the model's are. Raises as `write`.

        Args:
            fields: as of `write`.
        """
        rendering = {} if body.get("messages") is None else self._chat_template(body, settings)
        return _dump({**body, **rendering, **fields})

    def write(self, body: Mapping[str, Any], recipe: Recipe, *, tenant: str, fields: Mapping[str, Any]) -> bytes:
        """An OpenAI body (already under the field policy) in JSON.

        Args:
            fields: in place of what it said.

        Raises:
            InvalidRequestError: an integer beyond 64 bits, or text that is no Unicode.
        """
        salt = self.cache_salt(tenant, recipe, body.get("cache_salt"))
        return _dump({**body, **fields, "cache_salt": salt})

    def cache_salt(self, tenant: str, recipe: Recipe, client_salt: Any) -> str:
        """What keeps KV blocks of tenants and recipes apart: part of every block's hash inside the engine."""
        return hmac.digest(self._salt_key, _dump([tenant, recipe.digest, client_salt]), "sha256").hex()


def _dump(value: Any) -> bytes:
    """JSON of what came in as JSON.

    Raises:
        InvalidRequestError: an integer beyond 64 bits, or text that is no Unicode.
    """
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise InvalidRequestError(f"the body cannot be passed on as JSON: {error}") from error
