"""LangChain's own tests of its integrations, over its OpenAI classes; run by `test_clients` in a process with them.

`COCKTAIL_URL`, `COCKTAIL_CHAT` and `COCKTAIL_EMBEDDINGS` say where, and which models.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

SERVER = {"base_url": os.environ["COCKTAIL_URL"], "api_key": "none"}


class TestChat(ChatModelIntegrationTests):
    """Of a model that was trained for nothing: what it says is not looked at, and it calls no tools."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        model = {"model": os.environ["COCKTAIL_CHAT"], "temperature": 0, "max_completion_tokens": 12}
        return {**SERVER, **model, "stream_usage": True}  # which it asks OpenAI alone for, if nobody says it

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {**SERVER, "model": os.environ["COCKTAIL_EMBEDDINGS"], "check_embedding_ctx_length": False}
