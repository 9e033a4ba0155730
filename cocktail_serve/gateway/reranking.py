"""Checks of a rerank request that need no model, and the encoding of its answer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from cocktail_serve.engines.base import Reranked
from cocktail_serve.errors import EngineError, InvalidRequestError
from cocktail_serve.gateway.schemas.reranking import MAX_DOCUMENTS


def check_documents(value: Any) -> list[str]:
    """The texts of a request's documents, in order.

    Args:
        value: a text or `{"text": ...}`, or a list of them.

    Raises:
        InvalidRequestError: none, too many, one that is empty or of another type; `param` is `documents.{index}`.
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise InvalidRequestError("documents is empty: give at least one text", param="documents")
    if len(items) > MAX_DOCUMENTS:
        raise InvalidRequestError(
            f"documents holds {len(items)} texts, at most {MAX_DOCUMENTS} go into one request", param="documents"
        )
    texts = []
    for index, item in enumerate(items):
        text = item.get("text") if isinstance(item, dict) and item.keys() == {"text"} else item
        param = f"documents.{index}"
        if not isinstance(text, str):
            raise InvalidRequestError(
                f'documents[{index}] must be a text or {{"text": ...}}, got {type(item).__name__}', param=param
            )
        if not text:
            raise InvalidRequestError(f"documents[{index}] is empty", param=param)
        texts.append(text)
    return texts


def encode_answer(
    reranked: Reranked, documents: Sequence[str], *, model_id: str, top_n: int, return_documents: bool
) -> bytes:
    """The body of the answer.

    Args:
        documents: the texts, in the order of the scores.
        top_n: how many results; 0: all.

    Raises:
        EngineError: a score is not finite, which JSON could not even say.
    """
    if not np.isfinite(reranked.scores).all():
        raise EngineError(f"model {model_id!r} gave scores that are not finite; its mixture is broken")
    best_first = np.argsort(-reranked.scores, kind="stable")[: top_n or None]
    return orjson.dumps(
        {
            "id": f"rerank-{secrets.token_hex(16)}",
            "model": model_id,
            "usage": {"prompt_tokens": reranked.num_tokens, "total_tokens": reranked.num_tokens},
            "results": [
                {
                    "index": index,
                    **({"document": {"text": documents[index]}} if return_documents else {}),
                    "relevance_score": float(reranked.scores[index]),
                }
                for index in best_first.tolist()
            ],
        }
    )
