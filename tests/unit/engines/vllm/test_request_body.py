"""What the engine is sent: its own name for the model, a salt for each tenant and recipe; and a guess of its tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cocktail_serve.engines.base import RESPONSES_PATH
from cocktail_serve.engines.token_estimates import BYTES_PER_TOKEN, EXPECTED_OUTPUT_TOKENS, expected_tokens
from cocktail_serve.engines.vllm.request_body import (
    BodyWriter,
)
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.generation_settings import ChatTemplate, GenerationSettings
from cocktail_serve.recipe import Recipe

FIELDS = {"model": "flan", "vllm_xargs": {"row": 3}}

ONE, OTHER = (Recipe(base="b", coefficients=((name, 1.0),), dtype="float32") for name in ("one", "other"))


def test_the_body_goes_under_the_engines_name_and_all_else_stays() -> None:
    bodies, given = BodyWriter(), {"model": "acme/mine", "cache_salt": "guessed", "prompt": "a", "n": 2}
    sent = json.loads(bodies.write(given, ONE, tenant="t", fields=FIELDS))
    assert sent == {**given, **FIELDS, "cache_salt": bodies.cache_salt("t", ONE, "guessed")}
    assert given["model"] == "acme/mine"


def test_salts_keep_tenants_and_recipes_apart() -> None:
    bodies = BodyWriter()
    salts = [
        bodies.cache_salt(tenant, recipe, salt)
        for tenant in ("t", "u")
        for recipe in (ONE, OTHER)
        for salt in (None, "mine", "None", ["mine"], f"mine{OTHER.digest}")
    ]
    assert len(set(salts)) == len(salts)
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)
    assert bodies.cache_salt("t", ONE, "mine") == salts[1]
    assert BodyWriter().cache_salt("t", ONE, "mine") not in salts, "another life has a key of its own"


@pytest.mark.parametrize("value", [2**70, "\ud800"])
@pytest.mark.parametrize("field", ["seed", "cache_salt"])
def test_what_is_no_json_is_the_clients_fault(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="passed on as JSON"):
        BodyWriter().write({field: value}, ONE, tenant="t", fields=FIELDS)


@pytest.mark.parametrize(
    ("body", "num_out"),
    [
        ({}, EXPECTED_OUTPUT_TOKENS),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": 10**6}, EXPECTED_OUTPUT_TOKENS),
        ({"max_tokens": "many"}, EXPECTED_OUTPUT_TOKENS),
        ({"max_tokens": -(10**9)}, EXPECTED_OUTPUT_TOKENS),
    ],
)
def test_a_request_is_first_charged_a_guess(body: dict[str, Any], num_out: int) -> None:
    assert expected_tokens(body, num_bytes=10 * BYTES_PER_TOKEN) == 10 + num_out


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
OWN = GenerationSettings((2,), (2, 5), {"temperature": 0.6, "max_tokens": 100}, ChatTemplate("base's"))
EXPERT = GenerationSettings((7,), (2, 5, 7, 8), {"top_p": 0.8, "top_k": 20}, ChatTemplate("expert's", "with tools"))


def completed(body: dict[str, Any], path: str = COMPLETION, settings: GenerationSettings = EXPERT) -> dict[str, Any]:
    """What is added to a body."""
    before = dict(body)
    whole = BodyWriter(own=OWN).complete(body, path, settings, max_model_len=64)
    assert body == before
    assert whole.items() >= {key: value for key, value in body.items() if whole[key] == value}.items()
    return {key: value for key, value in whole.items() if key not in body or body[key] != value}


def test_a_model_that_is_called_as_the_base_gets_the_very_body() -> None:
    body = {"prompt": "a"}
    bodies = BodyWriter(own=OWN)
    assert bodies.complete(body, COMPLETION, replace(OWN), max_model_len=64) is body


def test_what_the_base_would_do_otherwise_is_said() -> None:
    sampling = {"temperature": 1.0, "top_p": 0.8, "top_k": 20}
    assert completed({}) == {"stop_token_ids": [7, 8], **sampling}
    # the base's length of a chat's answer is no default of this model: it may take the room that is left
    assert completed({}, CHAT) == {
        "stop_token_ids": [7, 8],
        "chat_template": "expert's",
        "max_tokens": 64,
        **sampling,
    }


def test_what_the_request_says_goes_before() -> None:
    said = {"temperature": 0.0, "top_p": 1.0, "top_k": None, "max_tokens": 5, "chat_template": "own"}
    assert completed(said, CHAT) == {"stop_token_ids": [7, 8], "top_k": 20}
    assert "max_tokens" not in completed({"max_completion_tokens": 5}, CHAT)


@pytest.mark.parametrize(
    ("given", "sent"), [(None, [7, 8]), ([], [7, 8]), ([9, 7], [9, 7, 8]), ([5], [5, 7, 8]), ("x", None)], ids=str
)
def test_tokens_to_stop_at_are_joined(given: Any, sent: list[int] | None) -> None:
    assert completed({"stop_token_ids": given}).get("stop_token_ids") == sent


def test_who_ignores_the_end_ignores_this_one_too() -> None:
    assert "stop_token_ids" not in completed({"ignore_eos": True})
    assert completed({"ignore_eos": False})["stop_token_ids"] == [7, 8]


def test_requests_with_tools_get_the_template_for_tools() -> None:
    assert completed({"tools": [{"type": "function"}]}, CHAT)["chat_template"] == "with tools"
    assert completed({"tools": []}, CHAT)["chat_template"] == "expert's"
    one = replace(EXPERT, chat_template=ChatTemplate("expert's"))
    assert completed({"tools": [{"type": "function"}]}, CHAT, one)["chat_template"] == "expert's"


def test_a_default_length_never_exceeds_the_context() -> None:
    long = replace(OWN, sampling={"temperature": 0.6, "max_tokens": 10_000})
    assert completed({}, CHAT, long) == {"max_tokens": 64}
    bodies = BodyWriter(own=OWN)
    assert bodies.complete({}, CHAT, long, max_model_len=None) == {"max_tokens": 10_000}
    assert completed({}, COMPLETION, long) == {}, "a completion's is OpenAI's, 16"


def test_a_response_is_completed_as_a_chat_is_under_its_own_name_for_the_length() -> None:
    template = ChatTemplate("{{ own }}", tool_use="{{ tools }}")
    settings = GenerationSettings(sampling={"max_tokens": 9, "top_k": 3}, chat_template=template)
    bodies = BodyWriter()
    sent = bodies.complete({"input": "hi"}, RESPONSES_PATH, settings, max_model_len=100)
    assert sent == {"input": "hi", "top_k": 3, "chat_template": "{{ own }}", "max_output_tokens": 9}
    asked = {"input": "hi", "max_output_tokens": 50, "tools": [{"type": "function"}]}
    sent = bodies.complete(asked, RESPONSES_PATH, settings, max_model_len=100)
    assert (sent["max_output_tokens"], sent["chat_template"]) == (50, "{{ tools }}")
    assert "max_tokens" not in sent


def test_a_tokenizer_renders_chats_by_the_models_template() -> None:
    settings = GenerationSettings(chat_template=ChatTemplate("{{ own }}"), stop_token_ids=(3,))
    bodies = BodyWriter()
    chat = json.loads(bodies.write_for_tokenizer({"messages": []}, settings, fields={"model": "flan"}))
    assert chat == {"messages": [], "model": "flan", "chat_template": "{{ own }}"}
    text = json.loads(bodies.write_for_tokenizer({"prompt": "a"}, settings, fields={"model": "flan"}))
    assert text == {"prompt": "a", "model": "flan"}
