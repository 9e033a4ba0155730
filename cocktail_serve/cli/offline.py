"""Weighs a pool without a server: one model in memory at a time, the same checks and numbers as the server's."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from cocktail_serve.checkpoints.layout import model_folder
from cocktail_serve.checkpoints.model_config import load_model_config
from cocktail_serve.cli.opened import open_with_progress
from cocktail_serve.cli.terminal import OnProgress
from cocktail_serve.cocktails.cocktail import Weighing
from cocktail_serve.cocktails.request import CocktailRequest, parse_inline
from cocktail_serve.cocktails.weighing import weigh
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.errors import CheckpointError, EngineError, InvalidMixError
from cocktail_serve.examples import ExampleSet, parse_examples
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import DType, Recipe, one_hot


@dataclass(frozen=True, slots=True)
class OfflineWeighing:
    """A weighed request.

    Attributes:
        dtype: of the pool's engine, which recipes of this pool round to.
    """

    pool: Pool
    request: CocktailRequest
    weighing: Weighing
    dtype: DType


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
    losses = {}
    if request.examples is not None:
        score = _scorer(pool, config, request.examples, dtype)
        losses = _losses(score(request.options.scored), len(request.options.scored), dtype, report)
    return OfflineWeighing(pool, request, weigh(request.options, losses), dtype)


_Scorer = Callable[[Iterable[str]], Iterator[tuple[str, list[float]]]]
"""Loss of each example by model, one model after the other."""


def _scorer(pool: Pool, config: PoolConfig, examples: ExampleSet, dtype: DType) -> _Scorer:
    score = _score_in_process if config.engine.type == "sentence_transformers" else _score_with_transformers
    return partial(score, pool, config, examples, dtype)


def _losses(
    scored: Iterator[tuple[str, list[float]]], num_models: int, dtype: DType, report: OnProgress
) -> dict[str, float]:
    losses: dict[str, float] = {}
    report("scoring", 0, num_models)
    for name, per_example in scored:
        losses[name] = math.fsum(per_example) / len(per_example)
        if not math.isfinite(losses[name]):
            raise InvalidMixError(
                f"the loss of {name!r} on the examples is {losses[name]}: its parameters overflow in {dtype}, or are "
                "broken; leave the model out, or set engine.dtype to float32",
                param="examples",
            )
        report("scoring", len(losses), num_models)
    return losses


def _score_with_transformers(
    pool: Pool, config: PoolConfig, examples: ExampleSet, dtype: DType, names: Iterable[str]
) -> Iterator[tuple[str, list[float]]]:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from cocktail_serve.scoring.encoder_decoder import score_encoder_decoder, tokenize_pairs
    from cocktail_serve.scoring.text import score_with_transformers, tokenize_examples

    with _translated(pool.base):
        tokenizer = AutoTokenizer.from_pretrained(pool.base.path, local_files_only=True, trust_remote_code=False)
    max_tokens = _max_model_len(pool, config)
    auto_class: Any
    score: Callable[[Any], list[float]]
    if pool.kind == "encoder_decoder":
        auto_class = AutoModelForSeq2SeqLM
        pairs = tokenize_pairs(tokenizer, examples, max_tokens=max_tokens)
        score = partial(score_encoder_decoder, pairs=pairs)
    elif max_tokens is None:
        raise CheckpointError(f"{pool.base.path} does not say its context length; set engine.max_model_len")
    else:
        auto_class = AutoModelForCausalLM
        tokenized = tokenize_examples(tokenizer, examples, max_tokens=max_tokens - 1)
        score = partial(score_with_transformers, tokenized=tokenized)
    for name in names:
        member = pool.member(name)
        with _translated(member):
            model = _load(auto_class, member, dtype)
            losses = score(model)
        # one model in memory at a time
        del model
        gc.collect()
        yield name, losses


def _load(auto_class: Any, member: Member, dtype: DType) -> Any:
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = auto_class.from_pretrained(
        model_folder(member.path), dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _max_model_len(pool: Pool, config: PoolConfig) -> int | None:
    """The context length: as configured, else the model's own; None where it has none (T5 counts distances only)."""
    configured: int | None = getattr(config.engine, "max_model_len", None)
    if configured is not None:
        return configured
    own = load_model_config(pool.base.path).get("max_position_embeddings")
    return own if isinstance(own, int) else None


def _score_in_process(
    pool: Pool, config: PoolConfig, examples: ExampleSet, dtype: DType, names: Iterable[str]
) -> Iterator[tuple[str, list[float]]]:
    from cocktail_serve.engines.embedding import EncoderEngine
    from cocktail_serve.engines.reranking import RerankerEngine
    from cocktail_serve.scoring.contrastive import contrastive_losses, texts_of

    async def score(recipe: Recipe) -> list[float]:
        if isinstance(engine, RerankerEngine):
            return await engine.score(recipe, examples)
        texts = texts_of(examples)
        embedded = await engine.embed(recipe, texts, background=True)
        return contrastive_losses(examples, dict(zip(texts, embedded.vectors, strict=True)))

    with asyncio.Runner() as runner:
        engine = RerankerEngine(pool, config) if pool.kind == "reranker" else EncoderEngine(pool, config)
        runner.run(engine.start())
        try:
            runner.run(engine.check_examples(examples))
            for name in names:
                yield name, runner.run(score(one_hot(pool, name, dtype=dtype)))
        finally:
            runner.run(engine.stop())


@contextmanager
def _translated(member: Member) -> Iterator[None]:
    """What transformers raises while it loads or runs a model, told with the model's name."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise EngineError(f"transformers cannot run {member.name!r} ({member.path}): {error}") from error
