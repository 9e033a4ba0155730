"""LangChain and LlamaIndex through their OpenAI classes, as docs/how-to/langchain-llamaindex.md shows them; and what
OpenAI's own client can do in its newest release."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests import other_packages
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


def test_decisions_by_openais_newest_client(stack: Stack) -> None:
    """The one installed has no such resource yet."""
    models = [stack.model_ids["tied", mixture] for mixture in ("base", "north", "half-north")]
    script = str(Path(__file__).with_name("decision_client.py"))
    told = json.loads(other_packages.run(other_packages.OPENAI, [script, stack.base_url, *models]))
    assert [each["model"] for each in told] == models
    assert len({json.dumps(each["answers"]) for each in told}) == len(models)


def test_langchains_own_tests(stack: Stack, tmp_path: Path) -> None:
    """By its newest release, and OpenAI's."""
    # its clients outlive a test, and so must their loop
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_test_loop_scope = session\n"
        "asyncio_default_fixture_loop_scope = session\n"
    )
    said = other_packages.run(
        other_packages.LANGCHAIN_TESTS,
        [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            str(tmp_path / "pytest.ini"),
            # a benchmark of recorded answers, by a plugin of its own
            "-k",
            "not test_stream_time",
            str(Path(__file__).with_name("langchain_standard.py")),
        ],
        environ={
            "COCKTAIL_URL": stack.base_url,
            "COCKTAIL_CHAT": stack.model_ids["tied", "half-north"],
            "COCKTAIL_EMBEDDINGS": "mini/faq",
        },
    )
    assert int(re.findall(r"(\d+) passed", said)[0]) >= 20
