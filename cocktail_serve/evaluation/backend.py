"""What answers while a system is measured: a pool in memory, or a server. The systems do not know which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from cocktail_serve.digest import digest_of
from cocktail_serve.dtypes import DType
from cocktail_serve.examples import ExampleSet
from cocktail_serve.offline.tuning import VERSION
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from cocktail_serve.scoring.decoder import LOSS_VERSION, TokenizedExample


@dataclass(frozen=True, slots=True)
class EvaluatedMixture:
    """A mixture that a backend can be asked under.

    Attributes:
        about: merging weights, losses, temperature, alpha and entropy, in the API's words.
    """

    recipe: Recipe
    merging_weights: Mapping[str, float]
    about: Mapping[str, Any]


@dataclass(frozen=True)
class TunedRecipe:
    """What an adapter of the base is tuned from (`offline.tuning`): a model that no mixture is.

    Attributes:
        base: fingerprint of the pool's base.
        text: the pool's text digest: what makes tokens of the examples.
        dtype: of the base's parameters; the adapter's are float32.
    """

    base: str
    text: str
    dtype: DType
    examples: ExampleSet
    seed: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the adapter, 64 hex characters."""
        fields = {"base": self.base, "text": self.text, "dtype": self.dtype, "seed": self.seed}
        return digest_of({"tuned": VERSION, "losses": LOSS_VERSION, "examples": self.examples.digest, **fields})


@dataclass(frozen=True, slots=True)
class EnsemblePart:
    """A model and its share of the answer: 1 for most systems, several parts for an ensemble."""

    recipe: Recipe | TunedRecipe
    share: float


class Backend(Protocol):
    """A pool that can be mixed and asked. Closed by `close`."""

    pool: Pool
    dtype: DType

    def close(self) -> None: ...

    def mix(self, body: Mapping[str, Any]) -> EvaluatedMixture:
        """Makes what `POST /v1/cocktails` would of a body without name and pool.

        Raises:
            ClientError: as the server.
        """
        ...

    def losses(self, names: Sequence[str], examples: ExampleSet) -> dict[str, list[float]]:
        """Loss (nats) of each example by model name, in the order given."""
        ...


class DecoderBackend(Backend, Protocol):
    """A pool of decoders.

    Attributes:
        tokenizer: the base's.
        max_tokens: context length.
    """

    tokenizer: Any
    max_tokens: int

    def tune(self, examples: ExampleSet, *, seed: int) -> tuple[TunedRecipe, Mapping[str, Any]]:
        """Tunes an adapter of the base on examples: what it can be asked by, and what is to be said about it.

        Raises:
            ClientError: peft is not installed, or this backend cannot tune.
        """
        ...

    def log_probs(self, recipe: Recipe | TunedRecipe, tokenized: Sequence[TokenizedExample]) -> list[np.ndarray]:
        """Log-probability (nats) of each output token, `[T]` float64 for each example."""
        ...

    def generate(
        self, parts: Sequence[EnsemblePart], prompts: Sequence[Sequence[int]], *, max_new_tokens: int
    ) -> list[str]:
        """What each prompt (token ids) is continued with, greedily, up to the end token or the limit.

        Args:
            parts: one, or the members of an ensemble, whose next-token probabilities are averaged.

        Raises:
            InvalidRequestError: this backend cannot join several models while they answer.
        """
        ...


class EncoderBackend(Backend, Protocol):
    """A pool of encoders."""

    def embed(self, recipe: Recipe, texts: Sequence[str]) -> np.ndarray:
        """Embeddings `[N, D]` float32; texts too long for the model are cut."""
        ...
