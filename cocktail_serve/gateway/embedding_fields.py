"""Checks of an embedding request that need no model, and the encoding of its answer."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import orjson

from cocktail_serve.config import PoolConfig
from cocktail_serve.errors import InvalidRequestError, NotFiniteError
from cocktail_serve.gateway.schemas.embeddings import MAX_INPUTS
from cocktail_serve.suggestions import did_you_mean

Inputs = list[str] | list[list[int]]


def check_inputs(value: Any, *, token_inputs: bool) -> Inputs:
    """The inputs of a request as a list, in order.

    Args:
        value: a text, a list of texts, an array of token ids, or a list of those.
        token_inputs: whether the pool takes token ids.

    Raises:
        InvalidRequestError: none, too many, one that is empty or of another type; `param` is `input.{index}`.
    """
    if isinstance(value, str):
        items: list[Any] = [value]
    elif isinstance(value, list) and value and _is_token(value[0]):
        items = [value]
    elif isinstance(value, list):
        items = value
    else:
        raise InvalidRequestError("input must be a text or a list of texts", param="input")
    if not items:
        raise InvalidRequestError("input is empty: give at least one text", param="input")
    if len(items) > MAX_INPUTS:
        raise InvalidRequestError(
            f"input holds {len(items)} texts, at most {MAX_INPUTS} go into one request", param="input"
        )
    takes = list if isinstance(items[0], list) else str
    for index, item in enumerate(items):
        param = f"input.{index}"
        if not isinstance(item, takes):
            expected = "an array of token ids, as the first is" if takes is list else "a text"
            raise InvalidRequestError(f"input[{index}] must be {expected}, got {type(item).__name__}", param=param)
        if not item:
            raise InvalidRequestError(f"input[{index}] is empty", param=param)
    if takes is list:
        _check_tokens(items, token_inputs=token_inputs)
    return items


def _check_tokens(arrays: list[list[Any]], *, token_inputs: bool) -> None:
    if not token_inputs:
        raise InvalidRequestError(
            "input holds token ids, which this pool does not take: they are those of the client's tokenizer, not the "
            "model's. Send texts; in LangChain set OpenAIEmbeddings(check_embedding_ctx_length=False). An operator can "
            "let clients in that use the model's own tokenizer, with engine.token_inputs: true",
            param="input",
        )
    for index, array in enumerate(arrays):
        if not all(_is_token(token) and token >= 0 for token in array):
            raise InvalidRequestError(f"input[{index}] must hold token ids only", param=f"input.{index}")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def prompt_of(name: str | None, pool: PoolConfig, inputs: Inputs, *, param: str = "prompt_name") -> str:
    """The text that a prompt name stands for, to be put before each input; none by default.

    Args:
        param: field of the request that the name stands in. Clients that send another than `prompt_name` always do, and
            a pool without any prompts has nothing to tell their inputs apart by.

    Raises:
        InvalidRequestError: the pool has no such prompt, or the inputs are token ids.
    """
    if name is None or (param != "prompt_name" and not pool.prompts):
        return ""
    if name not in pool.prompts:
        known = ", ".join(sorted(pool.prompts)) or "none"
        raise InvalidRequestError(
            f"pool {pool.id!r} has no prompt {name!r}; it has: {known}. If such inputs need none, its operator can add "
            f"an empty one of that name to the pool's 'prompts'{did_you_mean(name, pool.prompts)}",
            param=param,
        )
    if not isinstance(inputs[0], str):
        raise InvalidRequestError(f"a prompt goes before texts; send no {param} with token ids", param=param)
    return pool.prompts[name]


def dimensions_to_keep(wanted: int | None, *, full: int, pool: PoolConfig, param: str = "dimensions") -> int | None:
    """How many leading dimensions to keep; None: all.

    Args:
        param: field of the request that says so.

    Raises:
        InvalidRequestError: the model was not trained to be cut there.
    """
    if wanted is None or wanted == full:
        return None
    if wanted not in pool.matryoshka_dimensions or wanted > full:
        allowed = ", ".join(map(str, sorted({*pool.matryoshka_dimensions, full})))
        raise InvalidRequestError(
            f"{param} {wanted} is not supported by pool {pool.id!r}; it supports: {allowed}", param=param
        )
    return wanted


MAX_INLINE_NUMBERS = 16_384
"""Numbers of an answer that is encoded on the event loop, in a millisecond at most; larger ones go to a thread."""


def encode_embeddings(
    vectors: np.ndarray, *, model_id: str, num_tokens: int, encoding_format: Literal["float", "base64"]
) -> bytes:
    """The body of the answer.

    Args:
        vectors: `[N, D]` float32, in the order of the inputs.
        encoding_format: base64 is of little-endian float32, as OpenAI's clients decode it.

    Raises:
        NotFiniteError: a vector is not, which JSON could not even say.
    """
    if not np.isfinite(vectors).all():
        raise NotFiniteError(
            f"model {model_id!r} gave embeddings that are not finite: what it computes of them is beyond the range "
            "of engine.dtype; have it set to bfloat16 or float32, or take smaller merging_weights"
        )
    rows = np.ascontiguousarray(vectors, dtype="<f4")
    # row by row: one call for all of them would keep every other thread waiting for the interpreter
    if encoding_format == "base64":
        embeddings = [orjson.Fragment(b'"%b"' % base64.b64encode(row)) for row in rows]
    else:
        embeddings = [orjson.Fragment(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)) for row in rows]
    return orjson.dumps(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": embedding}
                for index, embedding in enumerate(embeddings)
            ],
            "model": model_id,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )
