"""What the engine answered, made ours: the version's id as `model`, usage as asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import orjson

from cocktail_serve.engines.token_estimates import num_choices
from cocktail_serve.errors import CocktailError, EngineError
from cocktail_serve.gateway.error_handlers import error_body
from cocktail_serve.gateway.field_policy import Outgoing
from cocktail_serve.generation_settings import hidden_stop_reasons


class AnswerRewriter:
    """Rewrites the answer of one request, and counts its tokens as the engine says them.

    Every chunk of a stream tells how many tokens its choice has so far, so that one that breaks off is counted too.

    Args:
        end_token_ids: of the model; see `hidden_stop_reasons`.
    """

    last_event: ClassVar[bytes] = b"data: [DONE]\n\n"

    __slots__ = (
        "_hidden_stop_reasons",
        "_model_id",
        "_num_choices",
        "_num_tokens_by_choice",
        "_shows_each",
        "_shows_usage",
        "_totals",
    )

    def __init__(self, model_id: str, outgoing: Outgoing, *, end_token_ids: Collection[int] = ()) -> None:
        self._model_id = model_id
        self._hidden_stop_reasons = hidden_stop_reasons(outgoing.body, end_token_ids)
        self._shows_usage = outgoing.shows_usage
        self._shows_each = outgoing.shows_usage_in_chunks
        self._num_choices = num_choices(outgoing.body)
        self._num_tokens_by_choice: dict[int, tuple[int, int]] = {}
        self._totals: tuple[int, int] | None = None

    @property
    def is_counted(self) -> bool:
        """Whether the engine has said anything of tokens."""
        return self._totals is not None or bool(self._num_tokens_by_choice)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens read, as far as the engine has said."""
        if self._totals is not None:
            return self._totals[0]
        # several prompts have `n` choices each, which repeat the size of theirs
        num_in_by_prompt = {
            index // self._num_choices: num_in for index, (num_in, _) in self._num_tokens_by_choice.items()
        }
        return sum(num_in_by_prompt.values())

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated, as far as the engine has said."""
        if self._totals is not None:
            return self._totals[1]
        return sum(num_out for _, num_out in self._num_tokens_by_choice.values())

    def whole(self, body: bytes) -> bytes:
        """A plain answer.

        Raises:
            EngineError: the answer is no JSON object.
        """
        answer = json_object(body)
        answer["model"] = self._model_id
        self._hide_stop_reasons(answer.get("choices") or ())
        self._totals = _num_tokens(answer.get("usage"))
        return orjson.dumps(answer)

    def event(self, payload: bytes) -> bytes | None:
        """One event as the client gets it; None: not at all. Raises as `chunk`."""
        chunk = self.chunk(payload)
        return None if chunk is None else b"data: %b\n\n" % chunk

    def error_event(self, error: CocktailError) -> bytes:
        """What ends a stream that broke off, in place of `last_event`."""
        return b"data: %b\n\n" % orjson.dumps(error_body(error))

    def chunk(self, payload: bytes) -> bytes | None:
        """The data of one event; None for the usage chunk that the client did not ask for.

        With `include_usage`, OpenAI sends `usage: null` in every chunk but the last and usage without choices in the
        last; without, no chunk has the field. vLLM's `continuous_usage_stats` puts it into every chunk.

        Raises:
            EngineError: the event is no JSON object.
        """
        chunk = json_object(payload)
        chunk["model"] = self._model_id
        choices = chunk.get("choices")
        self._hide_stop_reasons(choices or ())
        num_tokens = _num_tokens(chunk.get("usage"))
        if not choices:
            self._totals = num_tokens or self._totals
            if num_tokens is not None and not self._shows_usage:
                return None
        elif num_tokens is not None:
            self._num_tokens_by_choice[choices[0]["index"]] = num_tokens
        if not self._shows_usage:
            chunk.pop("usage", None)
        elif choices and not self._shows_each:
            chunk["usage"] = None
        return orjson.dumps(chunk)

    def _hide_stop_reasons(self, choices: Iterable[dict[str, Any]]) -> None:
        for choice in choices:
            if choice.get("stop_reason") in self._hidden_stop_reasons:
                choice["stop_reason"] = None


def _num_tokens(usage: Any) -> tuple[int, int] | None:
    """Tokens read and generated; None where the engine does not say."""
    if not isinstance(usage, dict):
        return None
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


def json_object(raw: bytes) -> dict[str, Any]:
    """What the engine said.

    Raises:
        EngineError: it is no JSON object.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise EngineError(f"the engine's answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise EngineError(f"the engine's answer is no JSON object but {type(value).__name__}")
    return value
