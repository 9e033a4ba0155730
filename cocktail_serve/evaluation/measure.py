"""One system on one task: from its answers to the metrics of every row.

Likelihood: each choice is scored behind the prompt as examples are when models are weighed (`scoring.decoder`), joined
as they are, and the largest counts as the answer. The end token that closes examples is left out, as lm-evaluation-
harness does: only fine-tuned models know that an answer ends there, and the base would be judged by that alone. `sum`
compares log-probabilities of the whole choice: the default, the harness's `acc`. `token` divides by the number of
tokens, `byte` by the choice's bytes of UTF-8, the harness's `acc_norm`.

Generation: greedy, up to the end token or `max_new_tokens`; what stands before the first line break is the answer.

Loss: mean token cross-entropy of the output given the prompt, as when models are weighed.

In-context examples stand before the prompt, "input output" each, an empty line after each, as many of the first as the
context holds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import numpy as np

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.evaluation.backend import Backend, DecoderBackend, EncoderBackend, EnsemblePart
from cocktail_serve.evaluation.calibration import brier_score, calibration_terms
from cocktail_serve.evaluation.cells import CellStore
from cocktail_serve.evaluation.metrics import (
    DECODER_METRICS,
    DEPTH,
    ENCODER_METRICS,
    NOT_OF_CHOICES,
    OF_CHOICES,
    TIES,
    Metric,
    answer_metrics,
    ranking_metrics,
)
from cocktail_serve.evaluation.systems import Contender
from cocktail_serve.evaluation.tasks import DecoderRow, DecoderTask, EncoderTask, Task
from cocktail_serve.examples import ExampleSet, TextExample
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.decoder import LOSS_VERSION, mean_loss, tokenize_examples
from cocktail_serve.scoring.options import log_probabilities

MAX_REMEMBERED = 12
"""Likelihoods or embeddings of a model on a task that are kept in memory: an ensemble's members at another temperature
are the same models."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Measuring:
    """How systems are measured.

    Attributes:
        metrics: which, the first that a task has being its own in tables; None: all that the task has.
        max_new_tokens: of an answer.
        choice_norm: what a choice's log-probability is divided by, see the module.
        example_separator: what joins a prompt and its answer, as of `parse_examples`; a pool's own.
    """

    metrics: tuple[Metric, ...] | None = None
    max_new_tokens: int = 64
    choice_norm: Literal["sum", "token", "byte"] = "sum"
    example_separator: str | None = None


class Measurer:
    """Measures contenders on tasks of one pool.

    Args:
        store: where finished measurements are kept.
    """

    def __init__(self, backend: Backend, store: CellStore, how: Measuring) -> None:
        self._backend = backend
        self._store = store
        self._how = how
        self._remembered: OrderedDict[tuple[str, ...], Any] = OrderedDict()

    def measure(self, contender: Contender, task: Task) -> tuple[dict[Metric, list[float]], dict[str, Any]]:
        """Values by metric, one for each row that fits the model's context, and what is to be said about them.

        Raises:
            InvalidRequestError: no row fits, or the task has none of the metrics wanted.
        """
        if isinstance(task, EncoderTask):
            return self._measure_rankings(contender, task)
        return self._measure_texts(contender, task)

    def _measure_rankings(
        self, contender: Contender, task: EncoderTask
    ) -> tuple[dict[Metric, list[float]], dict[str, Any]]:
        wanted = self._wanted(ENCODER_METRICS, task)
        found = self._kept(contender, task, "rankings", {"ties": TIES}, lambda: self._rank(contender, task))
        return {metric: found[metric] for metric in wanted}, {}

    def _rank(self, contender: Contender, task: EncoderTask) -> dict[Metric, list[float]]:
        queries, documents = list(task.queries), list(task.corpus)
        scores = np.zeros((len(queries), len(documents)))
        for part in contender.parts:
            of_queries, of_documents = self._embeddings(cast(Recipe, part.recipe), task)
            scores += part.share * (of_queries.astype(np.float64) @ of_documents.astype(np.float64).T)
        depth = min(DEPTH, len(documents))
        rankings = {}
        for query, of_query in zip(queries, scores, strict=True):
            last = np.partition(of_query, -depth)[-depth]
            best = np.flatnonzero(of_query >= last)
            rankings[query] = {documents[index]: float(of_query[index]) for index in best}
        return ranking_metrics(rankings, task.qrels)

    def _embeddings(self, recipe: Recipe, task: EncoderTask) -> tuple[np.ndarray, np.ndarray]:
        backend = cast(EncoderBackend, self._backend)

        def embed() -> tuple[np.ndarray, np.ndarray]:
            vectors = backend.embed(recipe, [*task.queries.values(), *task.corpus.values()])
            return vectors[: len(task.queries)], vectors[len(task.queries) :]

        return self._remember((recipe.digest, task.digest), embed)

    def _measure_texts(
        self, contender: Contender, task: DecoderTask
    ) -> tuple[dict[Metric, list[float]], dict[str, Any]]:
        backend = cast(DecoderBackend, self._backend)
        by_likelihood = {*OF_CHOICES, "loss"}
        wanted = self._wanted(
            tuple(m for m in DECODER_METRICS if m in (by_likelihood if task.has_choices else NOT_OF_CHOICES)), task
        )
        separator = self._how.example_separator
        rows = fitting_rows(backend, task, separator)
        prompts, num_shots = with_shots(
            backend, rows, contender.shots, reserve=self._how.max_new_tokens, separator=separator
        )
        about: dict[str, Any] = {"num_too_long": len(task.rows) - len(rows)}
        if num_shots is not None:
            about["num_shots"] = num_shots
        metrics: dict[Metric, list[float]] = {}
        if by_likelihood & set(wanted):
            norm = {
                "choice_norm": self._how.choice_norm,
                "end_token": False,
                "losses": LOSS_VERSION,
                "separator": separator,
                "probabilities": "verbatim",
            }
            metrics |= self._kept(
                contender, task, "likelihood", norm, lambda: self._likelihoods(contender, task, rows, prompts)
            )
        if {"exact_match", "f1", "rouge_l"} & set(wanted):
            limit = {"max_new_tokens": self._how.max_new_tokens}
            metrics |= self._kept(contender, task, "answers", limit, lambda: self._answers(contender, rows, prompts))
        return {metric: metrics[metric] for metric in wanted}, about

    def _likelihoods(
        self, contender: Contender, task: DecoderTask, rows: Sequence[DecoderRow], prompts: Sequence[str]
    ) -> dict[Metric, list[float]]:
        backend = cast(DecoderBackend, self._backend)
        candidates = [candidates_of(row) for row in rows]
        examples = ExampleSet.of(
            TextExample.joined(prompt, candidate, self._how.example_separator)
            for prompt, of_row in zip(prompts, candidates, strict=True)
            for candidate in of_row
        )
        tokenized = tokenize_examples(backend.tokenizer, examples, max_tokens=backend.max_tokens - 1)
        of_parts = [
            self._remember((recipe.digest, examples.digest), partial(backend.log_probs, recipe, tokenized))
            for recipe in (part.recipe for part in contender.parts)
        ]
        told = iter(averaged(of_parts, contender.parts))
        eos = backend.tokenizer.eos_token_id
        is_closed = iter([example.token_ids[-1] == eos for example in tokenized])
        right: list[float] = []
        losses: list[float] = []
        probabilities: list[list[float]] = []
        outputs: list[int] = []
        for row, of_row in zip(rows, candidates, strict=True):
            log_probs = [next(told) for _ in of_row]
            output = of_row.index(row.output)
            outputs.append(output)
            probabilities.append(np.exp(log_probabilities([math.fsum(values) for values in log_probs])).tolist())
            losses.append(mean_loss(log_probs[output]))
            scores = [
                self._score(values[:-1] if next(is_closed) and len(values) > 1 else values, text)
                for values, text in zip(log_probs, of_row, strict=True)
            ]
            right.append(float(scores.index(max(scores)) == output))
        if not task.has_choices:
            return {"loss": losses}
        return {
            "accuracy": right,
            "loss": losses,
            "brier": [brier_score(*of_row) for of_row in zip(probabilities, outputs, strict=True)],
            "ece": calibration_terms(probabilities, outputs),
        }

    def _score(self, log_probs: np.ndarray, text: str) -> float:
        total = math.fsum(log_probs)
        return total / {"sum": 1, "token": len(log_probs), "byte": len(text.encode())}[self._how.choice_norm]

    def _answers(
        self, contender: Contender, rows: Sequence[DecoderRow], prompts: Sequence[str]
    ) -> dict[Metric, list[float]]:
        backend = cast(DecoderBackend, self._backend)
        token_ids = [prompt_ids(backend.tokenizer, prompt) for prompt in prompts]
        texts = backend.generate(contender.parts, token_ids, max_new_tokens=self._how.max_new_tokens)
        measured = [
            answer_metrics(first_line(text), row.references or (row.output,))
            for text, row in zip(texts, rows, strict=True)
        ]
        return {metric: [of_row[metric] for of_row in measured] for metric in measured[0]}

    def _wanted(self, possible: Sequence[Metric], task: Task) -> tuple[Metric, ...]:
        wanted = tuple(m for m in self._how.metrics or possible if m in possible)
        if not wanted:
            raise InvalidRequestError(
                f"{task.name} has none of the metrics asked for; it has: {', '.join(possible)}", param="metric"
            )
        return wanted

    def _kept(
        self, contender: Contender, task: Task, what: str, settings: dict[str, Any], measure: Callable[[], _T]
    ) -> _T:
        key = {
            "measured": what,
            "contender": contender.key,
            "task": task.digest,
            "text": self._backend.pool.text_digest,
            "max_tokens": getattr(self._backend, "max_tokens", None),
            **settings,
        }
        kept = self._store.get(key)
        if kept is None:
            kept = measure()
            self._store.put(key, kept)
        return cast(_T, kept)

    def _remember(self, key: tuple[str, ...], make: Callable[[], _T]) -> _T:
        if key not in self._remembered:
            self._remembered[key] = make()
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return cast(_T, self._remembered[key])


def candidates_of(row: DecoderRow) -> tuple[str, ...]:
    """What is scored behind a prompt: the choices, or the output alone."""
    return row.choices or (row.output,)


def fitting_rows(backend: DecoderBackend, task: DecoderTask, separator: str | None = None) -> list[DecoderRow]:
    """The rows that the context holds with their longest candidate, for all systems the same.

    Raises:
        InvalidRequestError: none does.
    """
    texts = [
        TextExample.joined(row.input, candidate, separator).text
        for row in task.rows
        for candidate in candidates_of(row)
    ]
    lengths = iter(_lengths(backend.tokenizer, texts))
    # one token for the end, and one that vLLM needs room for
    fits = [max(next(lengths) for _ in candidates_of(row)) <= backend.max_tokens - 2 for row in task.rows]
    rows = [row for row, is_fit in zip(task.rows, fits, strict=True) if is_fit]
    if not rows:
        raise InvalidRequestError(f"no row of {task.name} fits {backend.max_tokens} tokens", param="task")
    return rows


def with_shots(
    backend: DecoderBackend,
    rows: Sequence[DecoderRow],
    shots: ExampleSet | None,
    *,
    reserve: int,
    separator: str | None = None,
) -> tuple[list[str], float | None]:
    """The rows' prompts with as many of the first shots before them as the context holds, and the mean number of those.

    Args:
        reserve: tokens kept free for an answer, where there are no choices.
    """
    if shots is None:
        return [row.input for row in rows], None
    texts = [f"{example.text}\n\n" for example in shots if isinstance(example, TextExample)]
    # pieces apart have a few tokens more than together, special tokens for one
    sizes = _lengths(backend.tokenizer, texts)
    candidates = [candidates_of(row) for row in rows]
    joined = [TextExample.joined(row.input, c, separator).text for row in rows for c in candidates_of(row)]
    lengths = iter(_lengths(backend.tokenizer, joined))
    prompts, total = [], 0
    for row, of_row in zip(rows, candidates, strict=True):
        needed = max(next(lengths) for _ in of_row) + (0 if row.choices else reserve)
        room, count = backend.max_tokens - 2 - needed, 0
        while count < len(texts) and sizes[count] <= room:
            room -= sizes[count]
            count += 1
        prompts.append("".join(texts[:count]) + row.input)
        total += count
    return prompts, total / len(rows)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt to be continued: what the tokenizer's template puts before, and no end token."""
    ids: list[int] = list(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def first_line(text: str) -> str:
    """The answer in what a model said: what stands before the first line break, blank lines before it aside."""
    return text.strip().partition("\n")[0].strip()


def averaged(of_parts: Sequence[Sequence[np.ndarray]], parts: Sequence[EnsemblePart]) -> list[np.ndarray]:
    """Log of the share-weighted mean of the parts' token probabilities, `[T]` for each text."""
    if len(parts) == 1:
        return list(of_parts[0])
    log_shares = np.log([part.share for part in parts])[:, None]
    return [np.logaddexp.reduce(np.stack(of_text) + log_shares, axis=0) for of_text in zip(*of_parts, strict=True)]


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


def describe(how: Measuring) -> dict[str, Any]:
    """How a run measured, for its report."""
    return asdict(how)
