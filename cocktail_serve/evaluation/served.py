"""Backends over a running server: systems become cocktails made through its API, and answer through its OpenAI routes.

Prompts are tokenized here and sent as token ids, so a server is asked exactly what the pool in memory would be. The
configuration must be the server's: recipes name models by the digest of their parameters.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from cocktail_serve.api_client import ServerClient
from cocktail_serve.config import PoolConfig
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import ConfigError, InvalidRequestError, MethodNotServedError, WeightingNotServedError
from cocktail_serve.evaluation.backend import EnsemblePart, EvaluatedMixture, TunedRecipe
from cocktail_serve.evaluation.systems import NotMade
from cocktail_serve.examples import ExampleSet
from cocktail_serve.imported_recipe import read_recipe
from cocktail_serve.offline.models import TransformersModels
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.progress import OnProgress
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.scoring.decoder import TokenizedExample

CONCURRENCY = 16
"""Requests in flight: enough for an engine to batch them."""

READY_S = 3600.0
"""How long a cocktail may take to be ready."""

TEXTS_PER_CALL = 256

_T = TypeVar("_T")
_R = TypeVar("_R")


class _Served:
    """What both kinds have in common: cocktails, and requests that are sent again when the server is busy.

    Args:
        base_url: as OpenAI's clients take it, `http://127.0.0.1:8000/v1`.
        api_key: a tenant's key with the scope `create`; None where the server asks for none.
    """

    def __init__(
        self, config: PoolConfig, pool: Pool, report: OnProgress, *, base_url: str, api_key: str | None
    ) -> None:
        self.pool = pool
        self.dtype = config.engine.dtype_over(pool.base)
        self._report = report
        self._client = ServerClient(base_url, api_key, patience_s=READY_S)
        self._threads = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="eval-request")
        self._model_ids = {
            one_hot(pool, member.name, dtype=self.dtype).digest: (
                pool.id if member.name == BASE else f"{pool.id}/{member.name}"
            )
            for member in pool
        }

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def mix(self, body: Mapping[str, Any]) -> EvaluatedMixture:
        """Makes a cocktail named by the digest of its request, so that a run that goes on finds it again.

        Raises:
            NotMade: the server does not offer the method or the weighting for this pool.
        """
        name = f"eval-{digest_of([self.pool.id, dict(body)])[:16]}"
        asked = {"name": name, "pool": self.pool.id, **body}
        try:
            made = self._client.call("POST", "/v1/cocktails", asked, params={"wait": 60})
        except InvalidRequestError as error:
            if error.code in (MethodNotServedError.code, WeightingNotServedError.code):
                raise NotMade(error.message) from error
            raise
        made = self._client.follow(made, self._tell, timeout_s=READY_S)
        recipe = read_recipe(made["recipe"]).recipe
        if recipe.base != self.pool.base.fingerprint:
            raise ConfigError(f"the server's pool {self.pool.id!r} has another base than this configuration's")
        self._model_ids.setdefault(recipe.digest, made["id"])
        about = {key: made[key] for key in ("merging_weights", "losses", "temperature", "alpha", "entropy")}
        return EvaluatedMixture(recipe, made["merging_weights"], about)

    def _tell(self, made: Mapping[str, Any]) -> None:
        self._report(f"mixing {made['id']}", round(100 * made["progress"]), 100)

    def losses(self, names: Sequence[str], examples: ExampleSet) -> dict[str, list[float]]:
        """Mean losses, each as often as there are examples: the server tells no more."""
        body = {
            "name": "eval-losses",
            "pool": self.pool.id,
            "examples": examples.to_json(),
            "experts": [name for name in names if name != BASE],
            "weighting": "softmax",
        }
        found = self._client.call("POST", "/v1/cocktails", body, params={"dry_run": "true"})["losses"]
        return {name: [found[name]] * len(examples) for name in names}

    def _model_id(self, recipe: Recipe | TunedRecipe) -> str:
        try:
            return self._model_ids[recipe.digest]
        except KeyError:
            raise InvalidRequestError(f"recipe {recipe.digest[:12]} was not made through this server") from None

    def _each(self, call: Callable[[_T], _R], items: Sequence[_T], what: str) -> list[_R]:
        results = []
        for done, result in enumerate(self._threads.map(call, items), start=1):
            results.append(result)
            self._report(what, done, len(items))
        return results


class ServedDecoders(_Served):
    """A `DecoderBackend` over `/v1/completions`."""

    def __init__(
        self, config: PoolConfig, pool: Pool, report: OnProgress, *, base_url: str, api_key: str | None = None
    ) -> None:
        super().__init__(config, pool, report, base_url=base_url, api_key=api_key)
        models = TransformersModels(pool, config)  # for the tokenizer: no model is loaded
        assert models.max_tokens is not None
        self.tokenizer = models.tokenizer
        self.max_tokens = models.max_tokens

    def tune(self, examples: ExampleSet, *, seed: int) -> tuple[TunedRecipe, Mapping[str, Any]]:
        raise NotMade("no server tunes an adapter for itself: leave --base-url out")

    def log_probs(self, recipe: Recipe | TunedRecipe, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
        model = self._model_id(recipe)

        def ask(example: TokenizedExample) -> np.ndarray:
            body = {
                "model": model,
                "prompt": list(example.token_ids),
                "echo": True,
                "logprobs": 1,
                "max_tokens": 1,
                "temperature": 0,
            }
            told = self._client.call("POST", "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
            return np.array(told[example.output_start : len(example.token_ids)], dtype=np.float64)

        return self._each(ask, tokenized, f"scoring {len(tokenized)} texts")

    def generate(
        self, parts: Sequence[EnsemblePart], prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> list[str]:
        if len(parts) > 1:
            raise InvalidRequestError("an ensemble generates in memory only: leave --base-url out, or choose metrics")
        model = self._model_id(parts[0].recipe)

        def ask(prompt: Sequence[int]) -> str:
            room = max(1, min(max_new_tokens, self.max_tokens - len(prompt)))
            body = {"model": model, "prompt": list(prompt), "max_tokens": room, "temperature": 0}
            text: str = self._client.call("POST", "/v1/completions", body)["choices"][0]["text"]
            return text

        return self._each(ask, prompts, f"answering {len(prompts)} prompts")


class ServedEncoders(_Served):
    """An `EncoderBackend` over `/v1/embeddings`."""

    def embed(self, recipe: Recipe, texts: Sequence[str]) -> np.ndarray:
        model = self._model_id(recipe)

        def ask(some: Sequence[str]) -> np.ndarray:
            body = {"model": model, "input": list(some), "encoding_format": "base64", "truncate_prompt_tokens": -1}
            data = self._client.call("POST", "/v1/embeddings", body)["data"]
            return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in data])

        chunks = [texts[start : start + TEXTS_PER_CALL] for start in range(0, len(texts), TEXTS_PER_CALL)]
        return np.concatenate(self._each(ask, chunks, f"embedding {len(texts)} texts"))
