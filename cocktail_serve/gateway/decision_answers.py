"""Answers of decisions from the log-probabilities of their options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from cocktail_serve.engines.base import Decided
from cocktail_serve.errors import NotFiniteError
from cocktail_serve.gateway.schemas.decisions import AnyQuestion, ChoiceQuestion, PredicateQuestion
from cocktail_serve.scoring.options import log_probabilities


def encode_decision(decided: Decided, questions: Sequence[AnyQuestion], *, model_id: str) -> bytes:
    """The body of the answer.

    Args:
        questions: in the order of the log-probabilities.

    Raises:
        NotFiniteError: a log-probability is not finite, which is no probability.
    """
    if not all(math.isfinite(value) for options in decided.log_probs for value in options):
        raise NotFiniteError(
            f"model {model_id!r} gave log-probabilities that are not finite: what it computes of them is beyond the "
            "range of engine.dtype; have it set to bfloat16 or float32, or take smaller merging_weights"
        )
    answers = [_answer(question, options) for question, options in zip(questions, decided.log_probs, strict=True)]
    usage = {
        "input_tokens": decided.num_tokens,
        "input_tokens_details": {"cached_tokens": decided.num_cached, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": decided.num_tokens,
    }
    return orjson.dumps({"model": model_id, "answers": answers, "usage": usage})


def _answer(question: AnyQuestion, log_probs: Sequence[float]) -> dict[str, Any]:
    probabilities = np.exp(log_probabilities(log_probs)).tolist()
    head = {"type": question.type, "name": question.name}
    if isinstance(question, PredicateQuestion):
        return {**head, "probability": probabilities[0]}
    best = int(np.argmax(log_probs))
    # a rounded sum of log-probabilities may be a little above 0
    confidence = min(1.0, math.exp(log_probs[best]))
    if isinstance(question, ChoiceQuestion):
        values = [choice.value for choice in question.choices]
        return {
            **head,
            "choice": values[best],
            "confidence": confidence,
            "probabilities": [
                {"value": value, "probability": probability}
                for value, probability in zip(values, probabilities, strict=True)
            ],
        }
    return {
        **head,
        "score": math.fsum(place * probability for place, probability in enumerate(probabilities)),
        "confidence": confidence,
        "probabilities": [
            {"value": place, "label": level.label, "probability": probability}
            for place, (level, probability) in enumerate(zip(question.levels, probabilities, strict=True))
        ],
    }
