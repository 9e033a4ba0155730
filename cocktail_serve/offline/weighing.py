"""Weighs a pool without a server: one model in memory at a time, the same checks and numbers as the server's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cocktail_serve.cocktails.cocktail import CrossValidation, WeightingResult
from cocktail_serve.cocktails.cross_validation import cross_validate
from cocktail_serve.cocktails.options import CocktailOptions, CocktailRequest
from cocktail_serve.cocktails.parsing import parse_inline
from cocktail_serve.cocktails.warnings import warnings_of_losses, warnings_of_request
from cocktail_serve.cocktails.weighting_steps import advance, recipe_of, recipe_of_trial, weighting_steps
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import ConfigError, InvalidRequestError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.imported_recipe import read_recipe
from cocktail_serve.offline import tuning
from cocktail_serve.offline.models import TransformersModels, translated
from cocktail_serve.offline.opened import open_with_progress
from cocktail_serve.offline.tuning import Tuned
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.progress import OnProgress
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring.finite import require_finite
from cocktail_serve.weighting.candidates import Trial, Trials, mean

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class OfflineWeighing:
    """A weighed request.

    Attributes:
        dtype: what the mixture rounds to: that of the pool's engine, or of the recipe that was given.
        mixed_loss: mean loss (nats) of the mixture on the examples; None without examples.
        warnings: what the request and the losses give cause for.
        cross_validation: whether the mixture is worth using, by cross-validation; None where that was not asked for.
        tuned: an adapter of the base that was tuned on the examples; None where that was not asked for.
    """

    pool: Pool
    request: CocktailRequest
    weighing: WeightingResult
    dtype: DType
    mixed_loss: float | None
    warnings: tuple[str, ...]
    cross_validation: CrossValidation | None = None
    tuned: Tuned | None = None


def weigh_offline(
    settings: Settings,
    pool_id: str,
    body: Mapping[str, Any],
    report: OnProgress,
    *,
    judge: bool = False,
    tune: bool = False,
) -> OfflineWeighing:
    """Does what `POST /v1/cocktails` would, up to the merging weights.

    A recipe is taken in its own dtype, and one that is unmerged as the merged recipe of the same coefficients.

    Args:
        body: the fields of the request, without name and pool.
        judge: whether to find out what the mixture can be expected to do, at the cost of at most five mixtures more.
        tune: whether to find out too what an adapter that is tuned on the same examples would come to.

    Raises:
        ClientError: as the server.
        EngineError: a model that transformers cannot load or run.
    """
    config = settings.pool(pool_id)
    if tune:
        _check_tunes(config, body)
    if body.get("examples") is not None:
        # opening a pool may read gigabytes: what can be refused before is
        parse_examples(body["examples"], config.kind, max_examples=config.max_examples)
    imported = None if body.get("recipe") is None else read_recipe(body["recipe"])
    pool = replace(open_with_progress(settings, config, report), mode="merged")  # one model in memory at a time
    dtype = config.engine.dtype_over(pool.base)
    if imported is not None:
        dtype = imported.recipe.dtype  # no engine has a say in it
        body = {**body, "recipe": imported.merged_json()}
    request = parse_inline(dict(body), pool=pool, settings=settings, dtype=dtype, is_served=False)
    warnings = warnings_of_request(request, pool)
    if request.examples is None:
        weighing, _ = weigh_by(pool, request.options, None, dtype, report)
        return OfflineWeighing(pool, request, weighing, dtype, mixed_loss=None, warnings=warnings)
    with open_losses(pool, config, request.examples) as losses_of:
        weighing, losses = weigh_by(pool, request.options, losses_of, dtype, report)
        recipe = recipe_of(request.options, pool, weighing.merging_weights, dtype=dtype)
        report("scoring the mixture", 0, 1)
        of_mixture = losses_of(recipe, None)
        require_finite(of_mixture, "the mixture", dtype)
        mixed_loss = mean(of_mixture)
        report("scoring the mixture", 1, 1)
        found = None
        if judge:
            trials = cross_validate(request.options, losses, weighing.chosen, kind=pool.kind)
            found = _answered(trials, pool, request.options, losses_of, dtype=dtype, report=report, what="judging")
    del losses_of  # the models go before another is loaded
    tuned = _tuned(pool, config, request, dtype, report) if tune else None
    warnings += warnings_of_losses(request.options, weighing.losses, weighing.merging_weights, mixed_loss)
    return OfflineWeighing(pool, request, weighing, dtype, mixed_loss, warnings, found, tuned)


def _check_tunes(config: PoolConfig, body: Mapping[str, Any]) -> None:
    if config.kind != "decoder":
        raise InvalidRequestError(
            f"pool {config.id!r} is of kind {config.kind}, and only decoders are tuned for comparison", param="tune"
        )
    if body.get("examples") is None:
        raise InvalidRequestError("there are no examples to tune on", param="tune")
    if not tuning.is_available():
        raise ConfigError(f"tuning needs the package peft, which is not installed here: {tuning.INSTALL}")


def _tuned(pool: Pool, config: PoolConfig, request: CocktailRequest, dtype: DType, report: OnProgress) -> Tuned:
    """An adapter of the base, tuned on the request's examples."""
    from cocktail_serve.scoring.decoder import tokenize_examples

    assert request.examples is not None
    report("tuning", 0, 1)
    models = TransformersModels(pool, config)
    assert models.max_tokens is not None
    with translated(pool):
        tokenized = tokenize_examples(
            models.tokenizer, request.examples, max_tokens=models.max_tokens - 1, chat_template=pool.chat_template
        )
        tuned = tuning.tune(models.use(one_hot(pool, BASE, dtype=dtype)), tokenized, seed=request.options.seed)
    report("tuning", 1, 1)
    return tuned


LossesOf = Callable[[Recipe, Sequence[int] | None], list[float]]
"""Loss (nats) of each example under a recipe, or of those at the given indices."""

Foresee = Callable[[Sequence[tuple[Recipe, Sequence[int]]]], None]
"""Told which losses will be asked for next, in order: for who measures several at once."""


def weigh_by(
    pool: Pool,
    options: CocktailOptions,
    losses_of: LossesOf | None,
    dtype: DType,
    report: OnProgress,
    *,
    foresee: Foresee | None = None,
) -> tuple[WeightingResult, dict[str, list[float]]]:
    """Weighs a request by asking for losses, of the models and of whatever mixtures its weighting tries.

    Args:
        losses_of: None where the request has no examples.

    Returns:
        What came out, and the loss (nats) of each example by model.

    Raises:
        NotFiniteError: a loss is not finite.
    """
    losses: dict[str, list[float]] = {}
    if losses_of is not None:
        for name in options.scored:
            report("scoring", len(losses), len(options.scored))
            losses[name] = losses_of(one_hot(pool, name, dtype=dtype), None)
            require_finite(losses[name], repr(name), dtype)
        report("scoring", len(losses), len(options.scored))
    trials = weighting_steps(options, losses)
    weighing = _answered(
        trials, pool, options, losses_of, dtype=dtype, report=report, what="searching", foresee=foresee
    )
    return weighing, losses


def _answered(
    trials: Trials[_T],
    pool: Pool,
    options: CocktailOptions,
    losses_of: LossesOf | None,
    *,
    dtype: DType,
    report: OnProgress,
    what: str,
    foresee: Foresee | None = None,
) -> _T:
    """Mixes and scores what is asked for until the asker has its result."""
    answer: Sequence[float] | None = None
    num_foreseen = 0
    while isinstance(step := advance(trials, answer), Trial):
        assert losses_of is not None
        report(what, round(100 * step.progress), 100)
        if foresee is not None and not num_foreseen:
            coming = (step, *step.ahead)
            foresee([(recipe_of_trial(options, pool, trial, dtype=dtype), trial.rows) for trial in coming])
            num_foreseen = len(coming)
        num_foreseen -= 1
        answer = losses_of(recipe_of_trial(options, pool, step, dtype=dtype), step.rows)
        require_finite(answer, "the mixture", dtype, step.rows)
    if answer is not None:
        report(what, 100, 100)
    return step


@contextmanager
def open_losses(pool: Pool, config: PoolConfig, examples: ExampleSet) -> Iterator[LossesOf]:
    """The pool's models, mixed in memory and scored on these examples, one at a time.

    Raises:
        ClientError: as the server, of examples that cannot be scored.
        EngineError: a model that transformers cannot load.
    """
    if config.engine.type == "sentence_transformers":
        with _in_process(pool, config, examples) as losses_of:
            yield losses_of
    else:
        yield _with_transformers(pool, config, examples)


def _with_transformers(pool: Pool, config: PoolConfig, examples: ExampleSet) -> LossesOf:
    from cocktail_serve.scoring.encoder_decoder import score_encoder_decoder, tokenize_pairs
    from cocktail_serve.scoring.options import losses_with_transformers, tokenize_scored

    models = TransformersModels(pool, config)
    tokenized: Sequence[Any]
    score: Callable[[Any, Any], list[float]]
    with translated(pool):
        if pool.kind == "encoder_decoder":
            tokenized = tokenize_pairs(models.tokenizer, examples, max_tokens=models.max_tokens)
            score = score_encoder_decoder
        else:
            assert models.max_tokens is not None
            tokenized = tokenize_scored(
                models.tokenizer, examples, max_tokens=models.max_tokens - 1, chat_template=pool.chat_template
            )
            score = losses_with_transformers

    def losses_of(recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
        asked: Sequence[Any] = tokenized if rows is None else [tokenized[row] for row in rows]
        model = models.use(recipe)
        with translated(pool):
            return score(model, asked)

    return losses_of


@contextmanager
def _in_process(pool: Pool, config: PoolConfig, examples: ExampleSet) -> Iterator[LossesOf]:
    from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
    from cocktail_serve.engines.in_process.reranker_engine import RerankerEngine
    from cocktail_serve.scoring.contrastive import contrastive_losses, texts_of

    async def score(recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
        if isinstance(engine, RerankerEngine):
            scored = await engine.score(recipe, examples if rows is None else examples.subset(rows))
            return scored.losses
        texts = texts_of(examples, rows)
        embedded = await engine.embed(recipe, texts, background=True)
        return contrastive_losses(examples, dict(zip(texts, embedded.vectors, strict=True)), rows)

    with asyncio.Runner() as runner:
        engine = RerankerEngine(pool, config) if pool.kind == "reranker" else EncoderEngine(pool, config)
        runner.run(engine.start())
        try:
            runner.run(engine.check_examples(examples))
            yield lambda recipe, rows: runner.run(score(recipe, rows))
        finally:
            runner.run(engine.stop())
