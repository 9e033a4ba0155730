"""LangChain and LlamaIndex through their OpenAI classes, as docs/how-to/langchain-llamaindex.md shows them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.conftest import Stack

pytestmark = [
    pytest.mark.vllm,
    # both bring warnings of their own making
    pytest.mark.filterwarnings("ignore"),
]

TEXT = "how do i open a new account"


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Neither library closes its connections: they are collected here, where their warnings are not errors."""
    yield
    gc.collect()


def test_langchain_chat(stack: Stack) -> None:
    from langchain_openai import ChatOpenAI

    model = stack.model_ids["tied", "half-north"]
    chat = ChatOpenAI(base_url=stack.base_url, api_key="none", model=model, max_completion_tokens=8, temperature=0)
    answer = chat.invoke("the capital of france")
    assert answer.content
    assert answer.response_metadata["model_name"] == model
    assert "".join(str(chunk.content) for chunk in chat.stream("the capital of france")) == answer.content


def test_langchain_embeddings(stack: Stack) -> None:
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        base_url=stack.base_url, api_key="none", model="mini/faq", check_embedding_ctx_length=False
    )
    own = SentenceTransformer(str(stack.encoders["faq"]), device="cpu").encode([TEXT, "my card"])
    np.testing.assert_allclose(embeddings.embed_query(TEXT), own[0], atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_documents([TEXT, "my card"]), own, atol=1e-5)


def test_langchain_told_what_to_do_about_token_arrays(stack: Stack) -> None:
    from langchain_openai import OpenAIEmbeddings
    from openai import BadRequestError

    embeddings = OpenAIEmbeddings(base_url=stack.base_url, api_key="none", model="mini/faq")
    with pytest.raises(BadRequestError, match="check_embedding_ctx_length=False"):
        embeddings.client.create(model="mini/faq", input=[[1, 2, 3]])


def test_llama_index_embedding(stack: Stack) -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding

    embeddings = OpenAIEmbedding(api_base=stack.base_url, api_key="none", model_name="mini/code")
    own = SentenceTransformer(str(stack.encoders["code"]), device="cpu").encode(TEXT)
    np.testing.assert_allclose(embeddings.get_query_embedding(TEXT), own, atol=1e-5)


def test_llama_index_chat(stack: Stack) -> None:
    from llama_index.core.base.llms.types import LLMMetadata
    from llama_index.llms.openai import OpenAI

    class Cocktail(OpenAI):
        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(context_window=256, num_output=16, is_chat_model=True, model_name=self.model)

    llm = Cocktail(api_base=stack.base_url, api_key="none", model=stack.model_ids["untied", "three-ways"], max_tokens=8)
    assert llm.complete("the capital of france").text
