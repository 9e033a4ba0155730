"""Probabilities of the options of a question, from a decoder's log-probabilities of the tokens that say them.

The same tokens are scored inside a running vLLM engine and, offline, with transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cocktail_serve.decision_rows import DecisionExample
from cocktail_serve.decisions import LABELS, PosedQuestion, default_form, pose
from cocktail_serve.errors import ContextLengthError, InvalidRequestError
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.scoring.decoder import Row, TokenizedExample, mean_loss, token_log_probs, tokenize_example
from cocktail_serve.scoring.exported_tokenizer import ExampleTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TokenizedOptions:
    """The options of a question as the model sees them: read by labels, or verbatim.

    Attributes:
        prompt: the tokens that all of them begin with.
        labels: of each option, the token behind the prompt that stands for it; empty: they are read verbatim.
        continuations: of each option, its tokens behind the prompt, special ones included; empty: read by labels.
        output_starts: of each option, the index in prompt and continuation of the first token that counts.
    """

    prompt: list[int]
    labels: list[int]
    continuations: list[list[int]]
    output_starts: list[int]

    @property
    def num_tokens(self) -> int:
        """What is read of them: the prompt once, and behind it what each option adds."""
        return len(self.prompt) + sum(map(len, self.continuations))

    @property
    def sequences(self) -> list[TokenizedExample]:
        """What a model is given of options that are read verbatim, each by itself."""
        pairs = zip(self.continuations, self.output_starts, strict=True)
        return [TokenizedExample(self.prompt + rest, start) for rest, start in pairs]


def tokenize_options(
    tokenizer: ExampleTokenizer,
    question: PosedQuestion,
    *,
    index: int,
    max_tokens: int,
    chat_template: ChatTemplate | None = None,
) -> TokenizedOptions:
    """Turns the options of a question into tokens, as `tokenize_examples` does with their examples.

    Args:
        index: of the question in its request.
        max_tokens, chat_template: as of `tokenize_examples`.

    Raises:
        ContextLengthError: an option is too long with what it answers; `param` is `questions.{index}`.
        InvalidRequestError: as `tokenize_examples`; or the letters are not told apart by one token each.
    """
    place = _Place(index)
    sequences = [
        tokenize_example(tokenizer, example, place, max_tokens, chat_template) for example in question.examples
    ]
    return _by_labels(sequences, place) if question.reading == "labels" else _verbatim(sequences)


@dataclass(frozen=True, slots=True)
class TokenizedDecision:
    """An example that is a decision, as the model sees it.

    Attributes:
        answer: index of the option that is right.
    """

    options: TokenizedOptions
    answer: int

    def loss(self, log_probs: Sequence[float]) -> float:
        """Cross-entropy (nats) of the answer from the log-probabilities of the options; NaN where one is not finite."""
        if not np.isfinite(log_probs).all():
            return math.nan
        return -float(log_probabilities(log_probs)[self.answer])


ScoredExample = TokenizedExample | TokenizedDecision
"""What a decoder has a loss of."""


def tokenize_scored(
    tokenizer: ExampleTokenizer,
    examples: ExampleSet,
    *,
    max_tokens: int,
    chat_template: ChatTemplate | None = None,
) -> list[ScoredExample]:
    """Turns examples of a decoder into tokens, decisions into those of their options, read verbatim.

    Args, Raises:
        As `tokenize_examples`.
    """
    form = default_form(chat_template)
    scored: list[ScoredExample] = []
    for number, example in enumerate(examples, start=1):
        row = Row(number, examples)
        if isinstance(example, DecisionExample):
            turns = (("user", example.input),)
            posed = pose(turns, example.question, reading="verbatim", form=form, separator=example.separator)
            options = _verbatim(
                [tokenize_example(tokenizer, each, row, max_tokens, chat_template) for each in posed.examples]
            )
            scored.append(TokenizedDecision(options, example.answer))
        else:
            scored.append(tokenize_example(tokenizer, example, row, max_tokens, chat_template))
    return scored


def losses_with_transformers(model: PreTrainedModel, scored: Sequence[ScoredExample]) -> list[float]:
    """Loss (nats) of each example, with the model where it is and as it is."""
    sequences = [
        sequence
        for each in scored
        for sequence in (each.options.sequences if isinstance(each, TokenizedDecision) else [each])
    ]
    of_sequences = iter(token_log_probs(model, sequences))
    losses = []
    for each in scored:
        if isinstance(each, TokenizedDecision):
            losses.append(each.loss([math.fsum(next(of_sequences)) for _ in each.options.continuations]))
        else:
            losses.append(mean_loss(next(of_sequences)))
    return losses


def log_probabilities(log_probs: Sequence[float]) -> np.ndarray:
    """`[K]` float64, in nats: of each option that it is the answer, given that one of them is.

    Args:
        log_probs: `[K]`, in nats: of each option among all that the model might say.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    shifted = values - values.max()
    normalised: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return normalised


class _Place:
    """Says which question a message is about."""

    def __init__(self, index: int) -> None:
        self._name, self._param = f"questions[{index}]", f"questions.{index}"

    def invalid(self, message: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self._name}: {message}", param=self._param)

    def too_long(self, num_tokens: int, max_tokens: int) -> ContextLengthError:
        return ContextLengthError(
            f"{self._name}: the input, the question and an option have {num_tokens} tokens together, and at most "
            f"{max_tokens} can be read; shorten one of them",
            param=self._param,
        )


def _verbatim(sequences: Sequence[TokenizedExample]) -> TokenizedOptions:
    num_common = _num_common(sequences)
    return TokenizedOptions(
        prompt=sequences[0].token_ids[:num_common],
        labels=[],
        continuations=[sequence.token_ids[num_common:] for sequence in sequences],
        output_starts=[sequence.output_start for sequence in sequences],
    )


def _by_labels(sequences: Sequence[TokenizedExample], place: _Place) -> TokenizedOptions:
    num_common = _num_common(sequences)
    labels = [sequence.token_ids[num_common] for sequence in sequences if len(sequence.token_ids) > num_common]
    if len(set(labels)) < len(sequences):
        raise place.invalid(
            f"the model's tokenizer has no token for each of the letters {LABELS[: len(sequences)]} behind this "
            "question, so options cannot be read by labels; ask for reading 'verbatim'"
        )
    return TokenizedOptions(sequences[0].token_ids[:num_common], labels, [], [])


def _num_common(sequences: Sequence[TokenizedExample]) -> int:
    """How many tokens all of them begin with."""
    token_ids = [sequence.token_ids for sequence in sequences]
    # of lists in order, what the first and the last have in common is common to all
    first, last = min(token_ids), max(token_ids)
    return next((index for index, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
