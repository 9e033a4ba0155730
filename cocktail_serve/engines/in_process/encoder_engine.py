"""Embeddings by an encoder in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, cast

import numpy as np

from cocktail_serve.engines.base import Embedded
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.in_process.batching import Batch
from cocktail_serve.engines.in_process.encoder_model import Encoder
from cocktail_serve.engines.in_process.engine import PROBES, SentenceTransformersEngine
from cocktail_serve.engines.in_process.pipeline import ModelJob
from cocktail_serve.errors import ConfigError, ContextLengthError, InvalidRequestError
from cocktail_serve.examples import ExampleSet, RetrievalExample
from cocktail_serve.recipe import Recipe


@dataclass(eq=False, slots=True, kw_only=True)
class EmbeddingJob(ModelJob[Encoder]):
    """Texts (or token ids) to embed.

    Attributes:
        inputs: texts, or token ids with special tokens.
        dimensions: leading dimensions to keep; None: all.
    """

    inputs: Sequence[str] | Sequence[Sequence[int]]
    prompt: str = ""
    dimensions: int | None = None
    prompt_length: int | None = field(default=None, init=False)

    @property
    def features_key(self) -> int | None:
        return self.prompt_length

    def tokenize(self, model: Encoder) -> Sequence[Sequence[int]]:
        tokenizer = model.tokenizer
        token_ids: Sequence[Sequence[int]]
        if isinstance(self.inputs[0], str):
            token_ids = tokenizer.encode([f"{self.prompt}{text}" for text in self.inputs], truncate_to=self.truncate_to)
        elif self.prompt:
            raise InvalidRequestError("a prompt is text and cannot be put before token ids", param="prompt_name")
        else:
            token_ids = [ids[: self.truncate_to] for ids in cast("Sequence[Sequence[int]]", self.inputs)]
            tokenizer.check_token_ids(token_ids)
        tokenizer.check_length(token_ids, field=self.param)
        self.prompt_length = model.prompt_length(self.prompt)
        return token_ids

    def forward(self, model: Encoder, batch: Batch[EmbeddingJob]) -> np.ndarray:
        return model.forward(batch.token_ids, prompt_length=self.prompt_length)

    def finish(self, model: Encoder) -> None:
        if self.dimensions is not None and self.vectors is not None:
            self.vectors = model.shorten(self.vectors, self.dimensions)


class EncoderEngine(SentenceTransformersEngine[Encoder]):
    """An `EmbeddingEngine`."""

    kind: ClassVar[Literal["encoder"]] = "encoder"

    @property
    def dimension(self) -> int:
        """Size of an embedding. Raises ModelNotReadyError until the model is loaded."""
        return self._loaded.dimension

    def _open_model(self) -> Encoder:
        return Encoder(self.pool.base.path, dtype=self.dtype, device=self._device)

    def _check_model(self, encoder: Encoder) -> None:
        config = self._pool_config
        for dimensions in config.matryoshka_dimensions:
            if dimensions > encoder.dimension:
                raise ConfigError(
                    f"pool {self.pool.id!r}: matryoshka_dimensions holds {dimensions}, but an embedding of "
                    f"{self.pool.base.path} has {encoder.dimension} numbers; leave it out",
                    param="matryoshka_dimensions",
                )
        encode = encoder.tokenizer.encode
        for name, prompt in config.prompts.items():
            num_tokens = len(encode([prompt])[0])
            if num_tokens >= encoder.max_length:
                raise ConfigError(
                    f"pool {self.pool.id!r}: prompts.{name} has {num_tokens} tokens, and the model takes at most "
                    f"{encoder.max_length}, so no text fits behind it; shorten it",
                    param=f"prompts.{name}",
                )
        self._check_rows(encoder.forward(encode(PROBES, truncate_to=encoder.max_length)))

    async def check_examples(self, examples: ExampleSet) -> None:
        if self._truncates:
            return
        encoder = await self._ready()
        rows = [example for example in examples if isinstance(example, RetrievalExample)]
        texts = [text for row in rows for text in (row.query, *row.pos, *row.neg)]
        encoded = await asyncio.wrap_future(self._pipeline.with_tokenizer(partial(encoder.tokenizer.encode, texts)))
        lengths = iter(map(len, encoded))
        for number, row in enumerate(rows, start=1):
            for key in (
                "query",
                *(f"pos[{i}]" for i in range(len(row.pos))),
                *(f"neg[{i}]" for i in range(len(row.neg))),
            ):
                length = next(lengths)
                if length > encoder.max_length:
                    raise ContextLengthError(
                        f"row {number}: {key!r} has {length} tokens, but the model takes at most {encoder.max_length}; "
                        "shorten it, or set the pool's truncate",
                        param="examples",
                    )

    async def embed(
        self,
        recipe: Recipe,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt: str = "",
        truncate_to: int | None = None,
        dimensions: int | None = None,
        background: bool = False,
        tenant: str = "",
    ) -> Embedded:
        with CallTimer() as timer:
            encoder = await self._ready()
            self._check_recipe(recipe)
            truncate_to = self._truncation(encoder, truncate_to, is_pair=False)
            if dimensions is not None and not 1 <= dimensions <= encoder.dimension:
                raise InvalidRequestError(
                    f"dimensions must lie between 1 and {encoder.dimension}, got {dimensions}", param="dimensions"
                )
            if not inputs:
                return Embedded(np.empty((0, dimensions or encoder.dimension), dtype=np.float32), 0)
            make = partial(EmbeddingJob, inputs=inputs, prompt=prompt, truncate_to=truncate_to, dimensions=dimensions)
            vectors, num_tokens = await self._compute(
                recipe, len(inputs), make, timer, background=background, tenant=tenant
            )
            return Embedded(vectors, num_tokens, timer.time)
