"""The examples of a pool as token ids: one tokenizer for all engines of the pool, on a thread of its own."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cocktail_serve.decisions import PosedQuestion
from cocktail_serve.examples import ExampleSet
from cocktail_serve.generation_settings import ChatTemplate
from cocktail_serve.library_process import LibraryProcess
from cocktail_serve.pool import Pool
from cocktail_serve.scoring.exported_tokenizer import ExampleTokenizer
from cocktail_serve.scoring.options import ScoredExample, TokenizedOptions, tokenize_options, tokenize_scored
from cocktail_serve.scoring.tokenizer_cache import open_tokenizer, prepare_tokenizer

TOKENIZED_KEPT = 4
"""Sets of examples of which the tokens are kept: a cocktail's are asked for once for each model, trial and check."""

TOKENIZER_RETRY_S = 5.0
"""How long a tokenizer that could not be loaded is not tried again: its files may be there by then."""


class ExampleTokens:
    """Tokenises examples for the engines of one pool.

    Args:
        pool: its base's tokenizer is used, and its chat template.
        kept: folder of the tokenizers as they are kept.
    """

    def __init__(self, pool: Pool, *, kept: Path) -> None:
        self._folder = pool.base.path
        self._chat_template = pool.chat_template
        self._kept = kept
        self._libraries = LibraryProcess()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizer-{pool.id}")
        self._is_prepared = False
        self._tokenizer: asyncio.Future[ExampleTokenizer] | None = None
        self._tried_at = 0.0
        self._tokenized: OrderedDict[tuple[str, int], list[ScoredExample]] = OrderedDict()

    def prepare(self) -> None:
        """Begins to make the tokenizer ready to be loaded, which is done when it is needed: a large one takes memory.
        May be called by each engine.

        A failure is raised where the tokenizer is needed; a pool may serve without.
        """
        if not self._is_prepared:
            self._is_prepared = True
            self._executor.submit(prepare_tokenizer, self._folder, kept=self._kept, libraries=self._libraries)

    def close(self) -> None:
        """Ends the tokenizer's thread. May be called twice."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._libraries.close()

    async def of(self, examples: ExampleSet, *, max_tokens: int) -> list[ScoredExample]:
        """The examples as they will be scored; those of the last sets are kept, by digest.

        Args:
            max_tokens: that the engine reads of one.

        Raises:
            ContextLengthError, InvalidExamplesError: as `scoring.options.tokenize_scored`.
            ConfigError: the pool's base has no tokenizer that tells where an output starts.
        """
        key = (examples.digest, max_tokens)
        if key in self._tokenized:
            self._tokenized.move_to_end(key)
            return self._tokenized[key]
        tokenizer = await asyncio.shield(self._load())
        tokenize = partial(
            tokenize_scored, tokenizer, examples, max_tokens=max_tokens, chat_template=self._chat_template
        )
        tokenized = await asyncio.get_running_loop().run_in_executor(self._executor, tokenize)
        self._tokenized[key] = tokenized
        if len(self._tokenized) > TOKENIZED_KEPT:
            self._tokenized.popitem(last=False)
        return tokenized

    async def options_of(
        self, questions: Sequence[PosedQuestion], chat_template: ChatTemplate | None, *, max_tokens: int
    ) -> list[TokenizedOptions]:
        """The options of questions as they will be read, one question after another: between two, others have the
        tokenizer, and whoever does not wait any more is rid of the rest.

        Args:
            chat_template: of the model that is asked; None: the pool's.
            max_tokens: as of `of`.

        Raises:
            ContextLengthError, InvalidRequestError: as `scoring.options.tokenize_options`.
            ConfigError: as `of`.
        """
        tokenizer = await asyncio.shield(self._load())
        tokenized = []
        for index, question in enumerate(questions):
            tokenize = partial(
                tokenize_options,
                tokenizer,
                question,
                index=index,
                max_tokens=max_tokens,
                chat_template=chat_template or self._chat_template,
            )
            tokenized.append(await asyncio.get_running_loop().run_in_executor(self._executor, tokenize))
        return tokenized

    def _load(self) -> asyncio.Future[ExampleTokenizer]:
        """Begins to load the tokenizer, unless that has begun; the future fails with ConfigError where there is none.

        A failure is not kept for good: who needs the tokenizer `TOKENIZER_RETRY_S` later has it loaded again.
        """
        if self._tokenizer is None or self._has_failed(self._tokenizer):
            self._tried_at = time.monotonic()
            loop = asyncio.get_running_loop()
            load = partial(open_tokenizer, self._folder, kept=self._kept, libraries=self._libraries)
            self._tokenizer = loop.run_in_executor(self._executor, load)
            self._tokenizer.add_done_callback(lambda future: future.cancelled() or future.exception())
        return self._tokenizer

    def _has_failed(self, loading: asyncio.Future[ExampleTokenizer]) -> bool:
        is_over = loading.done() and (loading.cancelled() or loading.exception() is not None)
        return is_over and time.monotonic() - self._tried_at >= TOKENIZER_RETRY_S
