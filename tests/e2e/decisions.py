"""What decisions should answer: transformers on the same options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from cocktail_serve.decisions import Form, Reading, pose
from cocktail_serve.questions import Option, Question
from cocktail_serve.scoring.decoder import token_log_probs
from cocktail_serve.scoring.options import TokenizedOptions, log_probabilities, tokenize_options

PROBABILITY_TOLERANCE = 1e-4
"""float32 kernels of vLLM and transformers add in another order."""

MAX_TOKENS = 255


def question(number: int) -> dict[str, Any]:
    """A choice of three, one of them a beginning of another."""
    values = ("paris", "paris and the lazy dog", "bank")
    return {"type": "choice", "instructions": f"which {number}", "choices": [{"value": value} for value in values]}


def expected(
    model: PreTrainedModel,
    tokenizer_of: Path,
    text: str,
    questions: Sequence[Mapping[str, Any]],
    *,
    reading: Reading,
    form: Form,
) -> list[np.ndarray]:
    """Probabilities of the choices of each question, `[K]` float64."""
    posed = [
        pose(
            (("user", text),),
            Question(each["instructions"], tuple(Option(choice["value"]) for choice in each["choices"])),
            reading=reading,
            form=form,
        )
        for each in questions
    ]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenized = [
        tokenize_options(tokenizer, each, index=index, max_tokens=MAX_TOKENS) for index, each in enumerate(posed)
    ]
    return [np.exp(log_probabilities(log_likelihoods(model, options))) for options in tokenized]


def log_likelihoods(model: PreTrainedModel, options: TokenizedOptions) -> list[float]:
    """Of each option, in nats."""
    if not options.labels:
        return [float(log_probs.sum()) for log_probs in token_log_probs(model, options.sequences)]
    with torch.inference_mode():
        logits = model(torch.tensor([options.prompt])).logits[0, -1].double()
    of_labels: list[float] = logits.log_softmax(-1)[options.labels].tolist()
    return of_labels


def probabilities(answer: Mapping[str, Any]) -> list[list[float]]:
    """What a response says of the choices of each question."""
    return [[each["probability"] for each in one["probabilities"]] for one in answer["answers"]]
