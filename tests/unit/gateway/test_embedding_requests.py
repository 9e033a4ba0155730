"""Checks of embedding requests, and the encoding of their answers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import InvalidRequestError, NotFiniteError
from cocktail_serve.gateway.embedding_fields import check_inputs, dimensions_to_keep, encode_embeddings, prompt_of
from cocktail_serve.gateway.truncation import truncation


@pytest.fixture
def pool(tmp_path: Path) -> PoolConfig:
    return PoolConfig.model_validate(
        {
            "id": "bge",
            "kind": "encoder",
            "base": str(tmp_path),
            "engine": {"type": "sentence_transformers"},
            "prompts": {"query": "find: "},
            "matryoshka_dimensions": [8, 64],
        }
    )


@pytest.mark.parametrize(
    ("value", "inputs"),
    [("a", ["a"]), (["a", " "], ["a", " "]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_inputs(value: Any, inputs: Any) -> None:
    assert check_inputs(value, token_inputs=True) == inputs


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("", "input.0"),
        (["a", ""], "input.1"),
        ([], "input"),
        (None, "input"),
        ({"text": "a"}, "input"),
        (["a", 1], "input.1"),
        (["a", None], "input.1"),
        ([[1], "a"], "input.1"),
        ([[1], []], "input.1"),
        ([[1], [1.5]], "input.1"),
        ([[1], [-1]], "input.1"),
        ([[True]], "input.0"),
        ([True], "input.0"),
        (["a"] * 2049, "input"),
    ],
)
def test_bad_inputs(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_inputs(value, token_inputs=True)
    assert caught.value.param == param


def test_token_arrays_need_the_pools_leave() -> None:
    with pytest.raises(InvalidRequestError, match="check_embedding_ctx_length=False"):
        check_inputs([1, 2, 3], token_inputs=False)


def test_prompts(pool: PoolConfig) -> None:
    assert prompt_of(None, pool, ["a"]) == ""
    assert prompt_of("query", pool, ["a"]) == "find: "
    with pytest.raises(InvalidRequestError, match="it has: query"):
        prompt_of("passage", pool, ["a"])
    with pytest.raises(InvalidRequestError, match="token ids"):
        prompt_of("query", pool, [[1, 2]])


def test_prompts_by_the_names_of_other_clients(pool: PoolConfig) -> None:
    """Such clients always send one: it counts where the pool tells inputs apart, and nowhere else."""
    assert prompt_of("query", pool, ["a"], param="input_type") == "find: "
    with pytest.raises(InvalidRequestError, match="an empty one of that name") as caught:
        prompt_of("document", pool, ["a"], param="input_type")
    assert caught.value.param == "input_type"
    without = pool.model_copy(update={"prompts": {}})
    assert prompt_of("document", without, ["a"], param="input_type") == ""
    with pytest.raises(InvalidRequestError, match="it has: none"):
        prompt_of("document", without, ["a"])


def test_dimensions(pool: PoolConfig) -> None:
    assert dimensions_to_keep(None, full=32, pool=pool) is None
    assert dimensions_to_keep(32, full=32, pool=pool) is None
    assert dimensions_to_keep(8, full=32, pool=pool) == 8
    for wanted in (16, 64):
        with pytest.raises(InvalidRequestError, match="it supports"):
            dimensions_to_keep(wanted, full=32, pool=pool)


def test_truncation() -> None:
    assert truncation(None, max_length=128, truncate=False) is None
    assert truncation(None, max_length=128, truncate=True) == 128
    assert truncation(-1, max_length=128, truncate=False) == 128
    assert truncation(16, max_length=128, truncate=True) == 16
    assert truncation(None, max_length=128, truncate=False, whether=True) == 128
    assert truncation(None, max_length=128, truncate=False, whether=False) is None
    assert truncation(16, max_length=128, truncate=False, whether=True) == 16
    with pytest.raises(InvalidRequestError, match="this pool cuts") as caught:
        truncation(None, max_length=128, truncate=True, whether=False)
    assert caught.value.param == "truncation"
    for wanted in (0, 129):
        with pytest.raises(InvalidRequestError, match="truncate_prompt_tokens"):
            truncation(wanted, max_length=128, truncate=True)


def test_encodings() -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    as_float = orjson.loads(encode_embeddings(vectors, model_id="bge", num_tokens=9, encoding_format="float"))
    as_base64 = orjson.loads(encode_embeddings(vectors, model_id="bge", num_tokens=9, encoding_format="base64"))
    assert as_float["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert [item["index"] for item in as_float["data"]] == [0, 1, 2]
    for row, plain, packed in zip(vectors, as_float["data"], as_base64["data"], strict=True):
        np.testing.assert_array_equal(np.array(plain["embedding"], dtype=np.float32), row)
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed["embedding"]), dtype="<f4"), row)


def test_columns_of_a_larger_array_are_encoded_right() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)[:, :2]
    answer = orjson.loads(encode_embeddings(vectors, model_id="bge", num_tokens=1, encoding_format="base64"))
    second = np.frombuffer(base64.b64decode(answer["data"][1]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(second, [4.0, 5.0])


def test_vectors_that_are_not_finite_never_leave() -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        encode_embeddings(
            np.array([[np.nan, 1]], dtype=np.float32), model_id="bge", num_tokens=1, encoding_format="float"
        )
