"""Cocktails of the fault suite: asked for, followed, and checked by what they answer."""

from __future__ import annotations

from typing import Any

import httpx

from cocktail_serve.engines.vllm.fake import fake_text
from tests.gateway_process import GatewayProcess


def request(number: int) -> dict[str, Any]:
    """A cocktail of its own, whose scores nobody has measured yet."""
    examples = [{"input": f"is {word} {number} a fruit?", "output": "yes"} for word in ("apple", "pear", "fig")]
    return {"name": f"fruit-{number}", "pool": "flan", "temperature": 0.5, "examples": examples}


def ask(gateway: GatewayProcess, number: int) -> bool:
    """Asks for a cocktail; whether the answer came."""
    try:
        answer = gateway.http.post("/v1/cocktails", json=request(number))
    except httpx.TransportError:
        return False
    assert answer.status_code in (200, 202), answer.text
    return True


def settled(gateway: GatewayProcess, number: int) -> dict[str, Any]:
    """The cocktail when its job has ended."""
    cocktail: dict[str, Any] = {}

    def has_ended() -> bool:
        nonlocal cocktail
        answer = gateway.http.get(f"/v1/cocktails/fruit-{number}")
        assert answer.status_code == 200, answer.text
        cocktail = answer.json()
        return cocktail["status"] in ("ready", "failed", "cancelled")

    gateway.until(has_ended, "the end of the job")
    return cocktail


def lasting(cocktail: dict[str, Any]) -> dict[str, Any]:
    """What is the same whenever it is made."""
    keys = ("id", "status", "merging_weights", "losses", "mixed_loss", "recipe", "current", "error")
    return {key: cocktail[key] for key in keys}


def check_answer(gateway: GatewayProcess, cocktail: dict[str, Any]) -> None:
    """It answers by its own parameters."""
    body = {"model": cocktail["id"], "prompt": "what is", "max_tokens": 6}
    answer = gateway.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == fake_text(cocktail["recipe"]["digest"], "what is", num_tokens=6)
