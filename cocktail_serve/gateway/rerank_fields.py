"""Checks of a rerank request that need no model, and the encoding of its answer."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import orjson

from cocktail_serve.engines.base import Reranked
from cocktail_serve.errors import InvalidRequestError, NotFiniteError
from cocktail_serve.gateway.schemas.reranking import MAX_DOCUMENTS


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a request.

    Attributes:
        text: what is read of it.
        given: as it was sent, if it is an object.
    """

    text: str
    given: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**(self.given or {}), "text": self.text}


_NO_TEXT = ("image", "image_url", "images", "audio", "video", "video_url", "content")
"""Fields that clients of multimodal models send, which would change the score if they were read."""


def check_documents(value: Any, *, rank_fields: Sequence[str] | None = None) -> list[Document]:
    """A request's documents, in order.

    Args:
        value: a text or an object, or a list of them.
        rank_fields: the fields of objects that are read, in order; None: `text`.

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
    return [_document(item, index, rank_fields) for index, item in enumerate(items)]


def _document(item: Any, index: int, rank_fields: Sequence[str] | None) -> Document:
    name, param = f"documents[{index}]", f"documents.{index}"
    if isinstance(item, dict):
        document = Document(_text_of(item, name, param, rank_fields), item)
    elif isinstance(item, str):
        document = Document(item)
    else:
        raise InvalidRequestError(f'{name} must be a text or {{"text": ...}}, got {type(item).__name__}', param=param)
    if not document.text:
        raise InvalidRequestError(f"{name} is empty", param=param)
    return document


def _text_of(item: Mapping[str, Any], name: str, param: str, rank_fields: Sequence[str] | None) -> str:
    unread = [key for key in _NO_TEXT if item.get(key) is not None]
    if rank_fields is None and unread:
        raise InvalidRequestError(
            f"{name} has {unread[0]!r}, which no model here reads: a document is its 'text', or the fields that "
            "rank_fields names",
            param=param,
        )
    keys = ("text",) if rank_fields is None else rank_fields
    texts = {key: item[key] for key in keys if item.get(key) is not None}
    if not texts:
        raise InvalidRequestError(
            f"{name} has none of the fields that are read, {', '.join(map(repr, keys))}; it has "
            f"{', '.join(map(repr, sorted(item))) or 'none at all'}. Name others in rank_fields",
            param=param,
        )
    for key, text in texts.items():
        if not isinstance(text, str):
            raise InvalidRequestError(f"{name}.{key} must be a text, got {type(text).__name__}", param=f"{param}.{key}")
    return "\n".join(texts.values())


def encode_ranking(
    reranked: Reranked,
    documents: Sequence[Document],
    *,
    model_id: str,
    top_n: int,
    return_documents: bool,
    as_voyage: bool = False,
) -> bytes:
    """The body of the answer.

    Args:
        documents: in the order of the scores.
        top_n: how many results; 0: all.
        as_voyage: the results are in `data` too, where Voyage's clients look for them.

    Raises:
        NotFiniteError: a score is not, which JSON could not even say.
    """
    if not np.isfinite(reranked.scores).all():
        raise NotFiniteError(
            f"model {model_id!r} gave scores that are not finite: what it computes of them is beyond the range "
            "of engine.dtype; have it set to bfloat16 or float32, or take smaller merging_weights"
        )
    best_first = np.argsort(-reranked.scores, kind="stable")[: top_n or None].tolist()

    def results(document_of: Callable[[Document], Any]) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                **({"document": document_of(documents[index])} if return_documents else {}),
                "relevance_score": float(reranked.scores[index]),
            }
            for index in best_first
        ]

    answer = {
        "id": f"rerank-{secrets.token_hex(16)}",
        "model": model_id,
        "usage": {"prompt_tokens": reranked.num_tokens, "total_tokens": reranked.num_tokens},
        "results": results(Document.to_json),
    }
    if as_voyage:
        answer |= {"object": "list", "data": results(attrgetter("text"))}
    return orjson.dumps(answer)
