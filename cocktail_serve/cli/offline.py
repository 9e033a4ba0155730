"""Weighs a pool without a server: one model in memory at a time, the same checks and numbers as the server's."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from cocktail_serve.checkpoints.layout import model_folder
from cocktail_serve.checkpoints.mixture import iter_mixture
from cocktail_serve.checkpoints.model_config import load_model_config
from cocktail_serve.cli.opened import open_with_progress
from cocktail_serve.cli.terminal import OnProgress
from cocktail_serve.cocktails.cocktail import Weighing
from cocktail_serve.cocktails.request import CocktailOptions, CocktailRequest, parse_inline
from cocktail_serve.cocktails.weighing import advance, recipe_of, weigh
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.errors import CheckpointError, EngineError, InvalidMixError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import DType, Recipe, one_hot
from cocktail_serve.weighting.candidates import Trial, Trials, mean


@dataclass(frozen=True, slots=True)
class OfflineWeighing:
    """A weighed request.

    Attributes:
        dtype: of the pool's engine, which recipes of this pool round to.
        mixed_loss: mean loss (nats) of the mixture on the examples; None without examples.
    """

    pool: Pool
    request: CocktailRequest
    weighing: Weighing
    dtype: DType
    mixed_loss: float | None


def weigh_offline(settings: Settings, pool_id: str, body: Mapping[str, Any], report: OnProgress) -> OfflineWeighing:
    """Does what `POST /v1/cocktails` would, up to the merging weights.

    Args:
        body: the fields of the request, without name and pool.

    Raises:
        ClientError: as the server.
        EngineError: a model that transformers cannot load or run.
    """
    config = settings.pool(pool_id)
    if body.get("examples") is not None:
        # opening a pool may read gigabytes: what can be refused before is
        parse_examples(body["examples"], config.kind, max_examples=config.max_examples)
    pool = open_with_progress(settings, config, report)
    request = parse_inline(dict(body), pool=pool, settings=settings)
    dtype = cast(DType, pool.base.dtype) if config.engine.dtype == "auto" else config.engine.dtype
    if request.examples is None:
        return OfflineWeighing(pool, request, _result(weigh(request.options, {})), dtype, mixed_loss=None)
    with _opened(pool, config, request.examples, dtype) as losses_of:
        weighing = _weigh(pool, request.options, losses_of, dtype, report)
        recipe = recipe_of(request.options, pool, weighing.merging_weights, dtype=dtype)
        report("scoring the mixture", 0, 1)
        mixed_loss = _finite_mean(losses_of(recipe, None), "the mixture", dtype)
        report("scoring the mixture", 1, 1)
    return OfflineWeighing(pool, request, weighing, dtype, mixed_loss)


_LossesOf = Callable[[Recipe, Sequence[int] | None], list[float]]
"""Loss (nats) of each example under a recipe, or of those at the given indices."""


def _weigh(pool: Pool, options: CocktailOptions, losses_of: _LossesOf, dtype: DType, report: OnProgress) -> Weighing:
    losses: dict[str, list[float]] = {}
    for name in options.scored:
        report("scoring", len(losses), len(options.scored))
        losses[name] = losses_of(one_hot(pool, name, dtype=dtype), None)
        _finite_mean(losses[name], repr(name), dtype)
    report("scoring", len(losses), len(options.scored))
    weighing = weigh(options, losses)
    step = advance(weighing, None)
    while isinstance(step, Trial):
        report("searching", round(100 * step.progress), 100)
        recipe = recipe_of(options, pool, step.merging_weights, dtype=dtype)
        step = advance(weighing, losses_of(recipe, step.rows))
    if options.searches:
        report("searching", 100, 100)
    return step


def _result(weighing: Trials[Weighing]) -> Weighing:
    """What a weighing comes to that asks for no losses."""
    result = advance(weighing, None)
    assert isinstance(result, Weighing)
    return result


def _finite_mean(losses: Sequence[float], label: str, dtype: DType) -> float:
    loss = mean(losses)
    if not math.isfinite(loss):
        raise InvalidMixError(
            f"the loss of {label} on the examples is not finite: its parameters overflow in {dtype}, or are broken; "
            "leave the model out, or set engine.dtype to float32",
            param="examples",
        )
    return loss


@contextmanager
def _opened(pool: Pool, config: PoolConfig, examples: ExampleSet, dtype: DType) -> Iterator[_LossesOf]:
    """The pool's models, mixed in memory and scored, one at a time."""
    if config.engine.type == "sentence_transformers":
        with _in_process(pool, config, examples) as losses_of:
            yield losses_of
    else:
        yield _Transformers(pool, config, examples, dtype).losses


class _Transformers:
    """Models of a pool in transformers, one in memory at a time, made by mixing whatever the recipe."""

    def __init__(self, pool: Pool, config: PoolConfig, examples: ExampleSet, dtype: DType) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from cocktail_serve.scoring.encoder_decoder import score_encoder_decoder, tokenize_pairs
        from cocktail_serve.scoring.text import score_with_transformers, tokenize_examples

        transformers_logging.disable_progress_bar()
        self._pool = pool
        self._dtype = getattr(torch, dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._folders = {member.fingerprint: member.path for member in pool}
        self._model: Any = None
        self._resident: str | None = None
        folder, options = pool.base.path, {"local_files_only": True, "trust_remote_code": False}
        auto_class: Any = AutoModelForSeq2SeqLM if pool.kind == "encoder_decoder" else AutoModelForCausalLM
        with _translated(pool):
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            self._config = AutoConfig.from_pretrained(model_folder(folder), **options)
            with torch.device("meta"):
                self._class = type(auto_class.from_config(self._config))
        max_tokens = _max_model_len(pool, config)
        self._tokenized: Sequence[Any]
        self._score: Callable[[Any, Sequence[Any]], list[float]]
        if pool.kind == "encoder_decoder":
            self._tokenized = tokenize_pairs(tokenizer, examples, max_tokens=max_tokens)
            self._score = score_encoder_decoder
        elif max_tokens is None:
            raise CheckpointError(f"{folder} does not say its context length; set engine.max_model_len")
        else:
            self._tokenized = tokenize_examples(tokenizer, examples, max_tokens=max_tokens - 1)
            self._score = score_with_transformers

    def losses(self, recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
        asked = self._tokenized if rows is None else [self._tokenized[row] for row in rows]
        with _translated(self._pool):
            if recipe.digest != self._resident:
                self._load(recipe)
            return self._score(self._model, asked)

    def _load(self, recipe: Recipe) -> None:
        # one model in memory at a time
        self._model = self._resident = None
        gc.collect()
        model, found = self._class.from_pretrained(
            None,
            config=self._config,
            state_dict=dict(iter_mixture(recipe, self._folders)),
            dtype=self._dtype,
            output_loading_info=True,
        )
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"])[:3])
            raise CheckpointError(f"{self._pool.base.path} lacks parameters of {self._class.__name__}: {missing}")
        self._model, self._resident = model.to(self._device).eval(), recipe.digest


def _max_model_len(pool: Pool, config: PoolConfig) -> int | None:
    """The context length: as configured, else the model's own; None where it has none (T5 counts distances only)."""
    configured: int | None = getattr(config.engine, "max_model_len", None)
    if configured is not None:
        return configured
    own = load_model_config(pool.base.path).get("max_position_embeddings")
    return own if isinstance(own, int) else None


@contextmanager
def _in_process(pool: Pool, config: PoolConfig, examples: ExampleSet) -> Iterator[_LossesOf]:
    from cocktail_serve.engines.embedding import EncoderEngine
    from cocktail_serve.engines.reranking import RerankerEngine
    from cocktail_serve.scoring.contrastive import contrastive_losses, texts_of

    async def score(recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
        if isinstance(engine, RerankerEngine):
            return await engine.score(recipe, examples if rows is None else examples.subset(rows))
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


@contextmanager
def _translated(pool: Pool) -> Iterator[None]:
    """What transformers raises while it loads or runs a model, told with the pool's name."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EngineError(f"transformers cannot run the models of pool {pool.id!r}: {error}") from error
