"""What a request is taken for until the engine has said what it read and generated.

Two guesses, for two ends: a tenant's limits hold the most that a request may take in reserve, and its turn is charged
what most requests take. Both are settled when the answer has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

BYTES_PER_TOKEN = 4
"""Of a request's body."""

EXPECTED_OUTPUT_TOKENS = 128
"""What an answer takes that may take more."""


def num_choices(body: Mapping[str, Any]) -> int:
    """How many answers a request asks for to each of its prompts."""
    value = body.get("n")
    return value if isinstance(value, int) and value > 0 else 1


def reserved_tokens(body: Mapping[str, Any], *, num_bytes: int) -> int:
    """The most that a request may read and generate, as far as it says: a quarter of its bytes, and the answers that it
    asks for at their full length.

    Args:
        num_bytes: size of the body.
    """
    return _read_bytes(body, num_bytes) // BYTES_PER_TOKEN + (_most_output_tokens(body) or 0) * num_choices(body)


def expected_tokens(body: Mapping[str, Any], *, num_bytes: int) -> int:
    """What most requests like this read and generate: a quarter of its bytes, and `EXPECTED_OUTPUT_TOKENS` unless it
    asks for fewer.

    Args:
        num_bytes: size of the body.
    """
    most = _most_output_tokens(body)
    return num_bytes // BYTES_PER_TOKEN + min(most or EXPECTED_OUTPUT_TOKENS, EXPECTED_OUTPUT_TOKENS)


def _read_bytes(body: Mapping[str, Any], num_bytes: int) -> int:
    """Of decisions, each question is read with the input."""
    questions = body.get("questions")
    if not isinstance(questions, list) or len(questions) < 2:
        return num_bytes
    # nothing else is read again: a cocktail that comes with the request may be larger than all
    return num_bytes + len(orjson.dumps(body.get("input"))) * (len(questions) - 1)


def _most_output_tokens(body: Mapping[str, Any]) -> int | None:
    """Of one answer; None where the request does not say."""
    most = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    return most if isinstance(most, int) and most > 0 else None
