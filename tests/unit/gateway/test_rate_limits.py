"""How limits look over HTTP: durations as OpenAI writes them, and the estimate that is reserved."""

from __future__ import annotations

from typing import Any

import pytest

from cocktail_serve.engines.token_estimates import reserved_tokens
from cocktail_serve.gateway.rate_limits import format_duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0ms"),
        (0.0001, "1ms"),
        (0.02, "20ms"),
        (0.999, "999ms"),
        (1.0, "1s"),
        (1.45, "1.5s"),
        (59.99, "1m0s"),
        (60.0, "1m0s"),
        (72.5, "1m12.5s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
        (3725.0, "1h2m5s"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("body", "estimate"),
    [
        ({}, 100),
        ({"max_tokens": 50}, 150),
        ({"max_tokens": 50, "max_completion_tokens": 20}, 120),
        ({"max_tokens": 50, "n": 3}, 250),
        ({"max_tokens": "50", "n": "3"}, 100),
        ({"max_tokens": -5, "n": 0}, 100),
    ],
)
def test_estimates(body: dict[str, Any], estimate: int) -> None:
    assert reserved_tokens(body, num_bytes=400) == estimate
