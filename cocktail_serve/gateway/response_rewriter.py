"""What the engine answered to `/v1/responses`, made ours, and counted."""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

from cocktail_serve.engines.token_estimates import BYTES_PER_TOKEN
from cocktail_serve.errors import CocktailError
from cocktail_serve.gateway.answer_rewriter import json_object
from cocktail_serve.gateway.error_handlers import error_body
from cocktail_serve.gateway.field_policy import Outgoing


class ResponseRewriter:
    """Rewrites the response to one request, whole or event by event, and counts its tokens.

    The engine says what it used in the last event alone. Of a stream that breaks off, each difference of a text counts
    as a token, and the input as a quarter of its bytes.
    """

    last_event: ClassVar[bytes] = b""
    """The engine's own last event ends the stream."""

    __slots__ = ("_body", "_model_id", "_num_deltas", "_num_events", "_totals")

    def __init__(self, model_id: str, outgoing: Outgoing) -> None:
        self._body = outgoing.body
        self._model_id = model_id
        self._num_deltas = 0
        self._num_events = 0
        self._totals: tuple[int, int] | None = None

    @property
    def is_counted(self) -> bool:
        """Whether the engine has begun to answer."""
        return self._totals is not None or self._num_deltas > 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens read."""
        if self._totals is None:
            return len(orjson.dumps(self._body)) // BYTES_PER_TOKEN
        return self._totals[0]

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated."""
        return self._num_deltas if self._totals is None else self._totals[1]

    def whole(self, body: bytes) -> bytes:
        """A plain answer.

        Raises:
            EngineError: the answer is no JSON object.
        """
        response = json_object(body)
        self._make_ours(response)
        return orjson.dumps(response)

    def event(self, payload: bytes) -> bytes:
        """One event as the client gets it; raises as `whole`."""
        event = json_object(payload)
        self._num_events += 1
        kind = str(event.get("type"))
        if kind.endswith(".delta"):
            self._num_deltas += 1
        response = event.get("response")
        if isinstance(response, dict):
            self._make_ours(response)
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(event))

    def error_event(self, error: CocktailError) -> bytes:
        """What ends a stream that broke off: OpenAI's event, and the error as clients raise it."""
        body = error_body(error)
        detail = body["error"]
        event = {
            "type": "error",
            "sequence_number": self._num_events,
            "code": detail["code"],
            "message": detail["message"],
            "param": detail["param"],
            **body,
        }
        return b"event: error\ndata: %b\n\n" % orjson.dumps(event)

    def _make_ours(self, response: dict[str, Any]) -> None:
        response["model"] = self._model_id
        response["store"] = False
        usage = response.get("usage")
        if isinstance(usage, dict):
            self._totals = usage.get("input_tokens") or 0, usage.get("output_tokens") or 0
