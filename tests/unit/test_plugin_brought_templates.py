"""The chat template that a request for a response brings, over vLLM's own way to render it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from vllm_cocktail.brought_templates import take_brought_templates

NAME = "vllm.entrypoints.openai.responses.protocol"


@dataclass(frozen=True)
class TokenizeParams:
    max_total_tokens: int
    add_special_tokens: bool = True


class Request:
    """As vLLM's, which keeps fields that it does not know in `model_extra`."""

    def __init__(self, **extra: Any) -> None:
        self.model_extra = extra or None

    def build_chat_params(self, default_template: str | None, default_format: str) -> tuple[str | None, str]:
        return default_template, default_format

    def build_tok_params(self, max_total_tokens: int) -> TokenizeParams:
        return TokenizeParams(max_total_tokens)


@pytest.fixture
def request_type(monkeypatch: pytest.MonkeyPatch) -> type[Request]:
    module: Any = ModuleType(NAME)
    module.ResponsesRequest = type("ResponsesRequest", (Request,), {})
    parts = NAME.split(".")
    for index in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:index]), ModuleType(parts[index - 1]))
    monkeypatch.setitem(sys.modules, NAME, module)
    found: type[Request] = module.ResponsesRequest
    return found


def test_what_a_request_brings_goes_before_the_servers_own(request_type: type[Request]) -> None:
    assert take_brought_templates()
    assert take_brought_templates(), "again changes nothing"
    assert request_type(chat_template="brought").build_chat_params("own", "auto") == ("brought", "auto")
    assert request_type(chat_template="brought").build_chat_params(None, default_format="auto") == ("brought", "auto")
    assert request_type().build_chat_params("own", "auto") == ("own", "auto")
    assert request_type(other=1).build_chat_params(None, "auto") == (None, "auto")


def test_the_tokenizer_adds_nothing_to_what_a_template_made(request_type: type[Request]) -> None:
    assert take_brought_templates()
    assert request_type().build_tok_params(128) == TokenizeParams(128, add_special_tokens=False)


def test_a_vllm_that_renders_otherwise_is_told_apart(request_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Request, "build_chat_params")
    assert not take_brought_templates()
    monkeypatch.setitem(sys.modules, NAME, None)
    assert not take_brought_templates()
