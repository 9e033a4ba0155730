"""Backends over a pool in memory: transformers for decoders, the server's own encoder engine for encoders."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from cocktail_serve.cocktails.parsing import parse_inline
from cocktail_serve.cocktails.weighting_steps import recipe_of
from cocktail_serve.config import PoolConfig, Settings
from cocktail_serve.errors import CheckpointError
from cocktail_serve.evaluation.backend import EnsemblePart, EvaluatedMixture, TunedRecipe
from cocktail_serve.evaluation.cells import CellStore
from cocktail_serve.evaluation.systems import NotMade
from cocktail_serve.examples import ExampleSet
from cocktail_serve.offline import tuning
from cocktail_serve.offline.models import TransformersModels, translated
from cocktail_serve.offline.tuning import Tuned, applied
from cocktail_serve.offline.weighing import weigh_by
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.progress import OnProgress
from cocktail_serve.recipe import Recipe, one_hot, settings_of
from cocktail_serve.scoring import contrastive, decoder
from cocktail_serve.scoring.decoder import TokenizedExample, tokenize_examples
from cocktail_serve.scoring.options import losses_with_transformers, tokenize_scored

TEXTS_PER_CALL = 512
"""Texts embedded between two reports of progress."""


class _InMemory(ABC):
    """What both kinds have in common: weighing, with every loss kept once measured."""

    loss_version: str

    def __init__(
        self, settings: Settings, config: PoolConfig, pool: Pool, store: CellStore, report: OnProgress
    ) -> None:
        self.pool = pool
        self.dtype = config.engine.dtype_over(pool.base)
        self._settings = settings
        self._config = config
        self._store = store
        self._report = report

    def mix(self, body: Mapping[str, Any]) -> EvaluatedMixture:
        request = parse_inline(dict(body), pool=self.pool, settings=self._settings, is_served=False)
        options, examples = request.options, request.examples

        def losses_of(recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
            assert examples is not None
            return self.losses_of(recipe, examples, rows)

        def foresee(asked: Sequence[tuple[Recipe, Sequence[int]]]) -> None:
            assert examples is not None
            self.foresee(asked, examples)

        losses = None if examples is None else losses_of
        weighing, _ = weigh_by(self.pool, options, losses, self.dtype, self._report, foresee=foresee)
        recipe = recipe_of(options, self.pool, weighing.merging_weights, dtype=self.dtype)
        chosen = weighing.chosen
        about = {
            "merging_weights": dict(weighing.merging_weights),
            "losses": dict(weighing.losses),
            "temperature": options.temperature if chosen is None else chosen.temperature,
            "alpha": options.alpha if chosen is None else chosen.alpha,
            "entropy": weighing.entropy,
        }
        return EvaluatedMixture(recipe, weighing.merging_weights, about)

    def losses(self, names: Sequence[str], examples: ExampleSet) -> dict[str, list[float]]:
        return {name: self.losses_of(one_hot(self.pool, name, dtype=self.dtype), examples, None) for name in names}

    def losses_of(self, recipe: Recipe, examples: ExampleSet, rows: Sequence[int] | None) -> list[float]:
        """Loss (nats) of each example under a mixture, or of those at the given indices; kept once measured."""
        key = self._key(recipe, examples, rows)
        kept = self._store.get(key)
        if kept is None:
            kept = self._measure(recipe, examples, rows)
            self._store.put(key, kept)
        return [float(loss) for loss in kept]

    def foresee(self, asked: Sequence[tuple[Recipe, Sequence[int]]], examples: ExampleSet) -> None:  # noqa: B027
        """Told which losses will be asked for next; here they are measured as they are asked for."""

    def _key(self, recipe: Recipe, examples: ExampleSet, rows: Sequence[int] | None) -> dict[str, Any]:
        """What losses are kept under."""
        return {
            "losses": self.loss_version,
            "text": self.pool.text_digest,
            "recipe": recipe.digest,
            "examples": examples.digest,
            "rows": None if rows is None else list(rows),
        }

    @abstractmethod
    def _measure(self, recipe: Recipe, examples: ExampleSet, rows: Sequence[int] | None) -> list[float]:
        """Loss of each example (nats), of `rows` alone where given, measured now."""


class InMemoryDecoders(_InMemory):
    """A `DecoderBackend`: one model in memory at a time, except for ensembles that generate."""

    loss_version = decoder.LOSS_VERSION

    def __init__(
        self, settings: Settings, config: PoolConfig, pool: Pool, store: CellStore, report: OnProgress
    ) -> None:
        super().__init__(settings, config, pool, store, report)
        self._models = TransformersModels(pool, config)
        if self._models.max_tokens is None:
            raise CheckpointError(f"{pool.base.path} does not say its context length; set engine.max_model_len")
        self.tokenizer = self._models.tokenizer
        self.max_tokens = self._models.max_tokens
        self._last_tuned: tuple[str, Tuned] | None = None

    def close(self) -> None:
        pass

    def tune(self, examples: ExampleSet, *, seed: int) -> tuple[TunedRecipe, Mapping[str, Any]]:
        if not tuning.is_available():
            raise NotMade(f"tune needs the package peft, which is not installed here: {tuning.INSTALL}")
        recipe = TunedRecipe(self.pool.base.fingerprint, self.pool.text_digest, self.dtype, examples, seed)
        key = {"tuned": recipe.digest}
        about = self._store.get(key)
        if about is None:
            tuned = self._tuned(recipe)
            about = {"num_steps": tuned.num_steps, "held_out": list(tuned.held_out)}
            self._store.put(key, about)
        return recipe, about

    def log_probs(self, recipe: Recipe | TunedRecipe, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
        with translated(self.pool), self._using(recipe) as model:
            return decoder.token_log_probs(model, tokenized)

    def generate(
        self, parts: Sequence[EnsemblePart], prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> list[str]:
        from cocktail_serve.evaluation.generation import generate_texts

        with translated(self.pool), ExitStack() as stack:
            if len(parts) == 1:
                models = [stack.enter_context(self._using(parts[0].recipe))]
            else:
                models = [self._models.make(part.recipe) for part in parts if isinstance(part.recipe, Recipe)]
            return generate_texts(
                models,
                [part.share for part in parts],
                self.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                max_tokens=self.max_tokens,
                stop_token_ids=self._stop_token_ids(parts),
            )

    def _stop_token_ids(self, parts: Sequence[EnsemblePart]) -> list[int]:
        settings = [settings_of(self._merged(part.recipe), self.pool) for part in parts]
        return sorted({token for each in settings if each is not None for token in each.stop_token_ids})

    @contextmanager
    def _using(self, recipe: Recipe | TunedRecipe) -> Iterator[Any]:
        """The model of a recipe, for as long as it is open."""
        model = self._models.use(self._merged(recipe))
        with applied(model, self._tuned(recipe).factors if isinstance(recipe, TunedRecipe) else {}):
            yield model

    def _merged(self, recipe: Recipe | TunedRecipe) -> Recipe:
        """The recipe of a model's parameters: of a tuned one, the base that its adapter is beside."""
        return recipe if isinstance(recipe, Recipe) else one_hot(self.pool, BASE, dtype=self.dtype)

    def _tuned(self, recipe: TunedRecipe) -> Tuned:
        """The adapter of a recipe; the one before it is gone."""
        if self._last_tuned is None or self._last_tuned[0] != recipe.digest:
            self._report("tuning", 0, 1)
            model = self._models.use(self._merged(recipe))
            with translated(self.pool):
                tuned = tuning.tune(model, self._tokenized(recipe.examples), seed=recipe.seed)
            self._last_tuned = recipe.digest, tuned
            self._report("tuning", 1, 1)
        return self._last_tuned[1]

    def _tokenized(self, examples: ExampleSet) -> list[TokenizedExample]:
        return tokenize_examples(
            self.tokenizer, examples, max_tokens=self.max_tokens - 1, chat_template=self.pool.chat_template
        )

    def _measure(self, recipe: Recipe, examples: ExampleSet, rows: Sequence[int] | None) -> list[float]:
        asked = examples if rows is None else examples.subset(rows)
        scored = tokenize_scored(
            self.tokenizer, asked, max_tokens=self.max_tokens - 1, chat_template=self.pool.chat_template
        )
        with translated(self.pool), self._using(recipe) as model:
            return losses_with_transformers(model, scored)


class InMemoryEncoders(_InMemory):
    """An `EncoderBackend` over `engines.in_process`."""

    loss_version = contrastive.LOSS_VERSION

    def __init__(
        self, settings: Settings, config: PoolConfig, pool: Pool, store: CellStore, report: OnProgress
    ) -> None:
        from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine

        super().__init__(settings, config, pool, store, report)
        self._runner = asyncio.Runner()
        self._engine = EncoderEngine(pool, config)
        self._runner.run(self._engine.start())
        try:
            # waits until the model is there, or says why it is not
            self._runner.run(self._engine.mix_ahead(one_hot(pool, "base", dtype=self.dtype)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._runner.run(self._engine.stop())
        self._runner.close()

    def embed(self, recipe: Recipe, texts: Sequence[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            self._report(f"embedding {len(texts)} texts", start, len(texts))
            rows.append(self._runner.run(self._embed(recipe, texts[start : start + TEXTS_PER_CALL])))
        self._report(f"embedding {len(texts)} texts", len(texts), len(texts))
        return np.concatenate(rows)

    async def _embed(self, recipe: Recipe, texts: Sequence[str]) -> np.ndarray:
        embedded = await self._engine.embed(recipe, texts, truncate_to=self._engine.max_length, background=True)
        return embedded.vectors

    def _measure(self, recipe: Recipe, examples: ExampleSet, rows: Sequence[int] | None) -> list[float]:
        texts = contrastive.texts_of(examples, rows)
        vectors = self._runner.run(self._embed(recipe, texts))
        return contrastive.contrastive_losses(examples, dict(zip(texts, vectors, strict=True)), rows)
