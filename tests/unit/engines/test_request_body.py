"""What the engine is sent: its own name for the model, a salt for each tenant and recipe; and a guess of its tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cocktail_serve.engines.request_body import BYTES_PER_TOKEN, EXPECTED_OUTPUT_TOKENS, BodyWriter, expected_tokens
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.recipe import Recipe

ONE, OTHER = (Recipe(base="b", coefficients=((name, 1.0),), dtype="float32") for name in ("one", "other"))


def test_the_body_goes_under_the_engines_name_and_all_else_stays() -> None:
    bodies, given = BodyWriter("flan"), {"model": "acme/mine", "cache_salt": "guessed", "prompt": "a", "n": 2}
    sent = json.loads(bodies.write(given, ONE, tenant="t"))
    assert sent == {**given, "model": "flan", "cache_salt": bodies.cache_salt("t", ONE, "guessed")}
    assert given["model"] == "acme/mine"


def test_salts_keep_tenants_and_recipes_apart() -> None:
    bodies = BodyWriter("flan")
    salts = [
        bodies.cache_salt(tenant, recipe, salt)
        for tenant in ("t", "u")
        for recipe in (ONE, OTHER)
        for salt in (None, "mine", "None", ["mine"], f"mine{OTHER.digest}")
    ]
    assert len(set(salts)) == len(salts)
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)
    assert bodies.cache_salt("t", ONE, "mine") == salts[1]
    assert BodyWriter("flan").cache_salt("t", ONE, "mine") not in salts, "another life has a key of its own"


@pytest.mark.parametrize("value", [2**70, "\ud800"])
@pytest.mark.parametrize("field", ["seed", "cache_salt"])
def test_what_is_no_json_is_the_clients_fault(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="passed on as JSON"):
        BodyWriter("flan").write({field: value}, ONE, tenant="t")


@pytest.mark.parametrize(
    ("body", "num_out"),
    [
        ({}, EXPECTED_OUTPUT_TOKENS),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 10**6}, EXPECTED_OUTPUT_TOKENS),
        ({"max_tokens": "many"}, EXPECTED_OUTPUT_TOKENS),
    ],
)
def test_a_request_is_first_charged_a_guess(body: dict[str, Any], num_out: int) -> None:
    assert expected_tokens(body, b"x" * 10 * BYTES_PER_TOKEN) == 10 + num_out
