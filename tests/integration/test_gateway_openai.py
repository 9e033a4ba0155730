"""The official client notices no difference: generation, embeddings, models and errors over a real socket."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.gateways import EMBEDDING_ATOL, EXAMPLES, PAIRS, LiveGateway

QUESTION = [{"role": "user", "content": "what is the capital of france"}]


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="flan", messages=QUESTION, max_tokens=4)
    assert answer.model == "flan"
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer._request_id


def test_experts_answer_by_their_own_parameters(client: OpenAI) -> None:
    def ask(model: str) -> str | None:
        return client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8).choices[0].message.content

    answers = {model: ask(model) for model in ("flan", "flan/ag-news", "flan/nq")}
    assert len(set(answers.values())) == 3
    assert {model: ask(model) for model in answers} == answers


def test_stream_without_usage_hides_it(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="flan/nq", messages=QUESTION, max_tokens=6)
    chunks = list(client.chat.completions.create(model="flan/nq", messages=QUESTION, max_tokens=6, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert {chunk.model for chunk in chunks} == {"flan/nq"}
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stream_with_usage_shows_it_last(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="flan", messages=QUESTION, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert len(chunks) >= 6
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 6
    assert last.model == "flan"


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(model="flan", prompt="paris is", max_tokens=5)
    stream = client.completions.create(model="flan", prompt="paris is", max_tokens=5, stream=True)
    assert answer.object == "text_completion"
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


async def test_async_client(gateway: LiveGateway) -> None:
    async with AsyncOpenAI(base_url=gateway.base_url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="flan", messages=QUESTION, max_tokens=6)
        stream = await client.chat.completions.create(model="flan", messages=QUESTION, max_tokens=6, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == answer.choices[0].message.content
        assert {model.id async for model in client.models.list()} >= {"flan", "bge/quora"}
        embedded = await client.embeddings.create(model="bge", input=["paris", "berlin"])
        assert [item.index for item in embedded.data] == [0, 1]


def test_embeddings_agree_in_both_encodings(client: OpenAI) -> None:
    texts = ["what is the capital of france", "paris", "a dog"]
    default = client.embeddings.create(model="bge/quora", input=texts)
    as_float = client.embeddings.create(model="bge/quora", input=texts, encoding_format="float")
    as_base64 = client.embeddings.create(model="bge/quora", input=texts, encoding_format="base64")
    vectors = np.array([item.embedding for item in as_float.data], dtype=np.float32)
    assert vectors.shape == (3, 32)
    np.testing.assert_array_equal(vectors, np.array([item.embedding for item in default.data], dtype=np.float32))
    for row, item in zip(vectors, as_base64.data, strict=True):
        assert isinstance(item.embedding, str)
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item.embedding), dtype="<f4"), row)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert default.model == "bge/quora"
    assert default.usage.total_tokens == default.usage.prompt_tokens > len(texts)


def test_embeddings_keep_the_order_of_many_inputs(client: OpenAI) -> None:
    words = ["paris", "a dog", "my card was stolen", "open account"]
    alone = {
        word: client.embeddings.create(model="bge", input=word, encoding_format="float").data[0].embedding
        for word in words
    }
    inputs = [words[index % len(words)] for index in range(2048)]
    together = client.embeddings.create(model="bge", input=inputs)
    for word, item in zip(inputs, together.data, strict=True):
        np.testing.assert_allclose(item.embedding, alone[word], atol=1e-5)


def test_dimensions_cut_and_normalise_again(client: OpenAI) -> None:
    full = np.array(client.embeddings.create(model="bge", input="paris").data[0].embedding)
    cut = np.array(client.embeddings.create(model="bge", input="paris", dimensions=8).data[0].embedding)
    np.testing.assert_allclose(cut, full[:8] / np.linalg.norm(full[:8]), atol=1e-5)
    whole = client.embeddings.create(model="bge", input="paris", dimensions=32).data[0].embedding
    np.testing.assert_array_equal(whole, full)


def test_prompt_names(client: OpenAI) -> None:
    named = client.embeddings.create(model="bge", input="paris", extra_body={"prompt_name": "query"})
    spelt = client.embeddings.create(model="bge", input="find : paris")
    np.testing.assert_allclose(named.data[0].embedding, spelt.data[0].embedding, atol=1e-6)


def test_truncation_is_asked_for(client: OpenAI) -> None:
    long = "dog " * 500
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="bge", input=["dog", long])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "input.1"
    cut = client.embeddings.create(model="bge", input=long, extra_body={"truncate_prompt_tokens": -1})
    shorter = client.embeddings.create(model="bge", input=long, extra_body={"truncate_prompt_tokens": 16})
    assert cut.usage.prompt_tokens == 128
    assert shorter.usage.prompt_tokens == 16


def test_models(client: OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == sorted(ids)
    assert {"flan", "flan/ag-news", "flan/nq", "bge", "bge/hotpotqa", "bge/quora"} <= set(ids)
    expert = client.models.retrieve("flan/nq")
    assert (expert.id, expert.object, expert.owned_by) == ("flan/nq", "model", "operator")
    # what clients that list models of many kinds look for
    lengths = {model.id: model.max_model_len for model in client.models.list()}  # type: ignore[attr-defined]
    assert (lengths["flan"], lengths["flan/nq"], lengths["bge"]) == (256, 256, 128)
    told = {model.id: (model.type, model.capabilities) for model in client.models.list()}  # type: ignore[attr-defined]
    assert told["flan/nq"] == ("chat", ["completion"])
    assert told["bge/quora"] == ("embedding", ["embedding"])
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("flan/none")
    assert missing.value.code == "model_not_found"
    for operators in ("flan", "flan/nq"):
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete(operators)


def test_a_cocktail_is_a_model(client: OpenAI, gateway: LiveGateway) -> None:
    made = client.post(
        "/cocktails",
        body={"name": "client-fruit", "pool": "flan", "examples": EXAMPLES},
        options={"params": {"wait": 20}},
        cast_to=dict[str, object],
    )
    version = str(made["id"])
    assert made["status"] == "ready"
    assert {"client-fruit", version} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(version).id == version
    answer = client.chat.completions.create(model="client-fruit", messages=QUESTION, max_tokens=4)
    assert answer.model == version
    assert client.models.delete(version).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=version, messages=QUESTION)


def test_inline_cocktail(client: OpenAI) -> None:
    inline = {"cocktail": {"examples": EXAMPLES, "temperature": 0.5}}
    first = client.chat.completions.create(model="flan", messages=QUESTION, max_tokens=6, extra_body=inline)
    again = client.chat.completions.create(model="flan", messages=QUESTION, max_tokens=6, extra_body=inline)
    assert first.model.startswith("flan@")
    assert again.model == first.model
    assert again.choices[0].message.content == first.choices[0].message.content
    by_id = client.chat.completions.create(model=first.model, messages=QUESTION, max_tokens=6)
    assert by_id.choices[0].message.content == first.choices[0].message.content
    assert first.model not in {model.id for model in client.models.list()}


def test_inline_embeddings(client: OpenAI) -> None:
    inline = {"cocktail": {"examples": PAIRS, "temperature": 0.1}}
    first = client.embeddings.create(model="bge", input="paris", extra_body=inline)
    assert first.model.startswith("bge@")
    by_id = client.embeddings.create(model=first.model, input="paris")
    np.testing.assert_allclose(by_id.data[0].embedding, first.data[0].embedding, rtol=0, atol=EMBEDDING_ATOL)


def test_error_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as wrong_kind:
        client.chat.completions.create(model="bge", messages=QUESTION)
    assert wrong_kind.value.code == "wrong_model_kind"
    with pytest.raises(openai.BadRequestError) as other_way:
        client.embeddings.create(model="flan/nq", input="paris")
    assert other_way.value.code == "wrong_model_kind"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="flan", messages=QUESTION, extra_body={"priority": 1})
    assert (refused.value.code, refused.value.param) == ("field_not_accepted", "priority")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="flan", messages=QUESTION, max_tokens=10_000)
    assert too_long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("inputs", "param"),
    [("", "input.0"), (["paris", ""], "input.1"), ([], "input"), (["x"] * 2049, "input")],
    ids=["empty", "one empty", "none", "too many"],
)
def test_bad_inputs_are_named(client: OpenAI, inputs: str | list[str], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="bge", input=inputs)
    assert caught.value.param == param


def test_token_arrays_are_refused_with_the_remedy(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="bge", input=[[1, 2, 3]])
