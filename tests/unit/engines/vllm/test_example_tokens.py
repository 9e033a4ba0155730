"""Options as tokens, on the one thread that all of a pool have for them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cocktail_serve.decisions import PosedQuestion, pose
from cocktail_serve.engines.vllm import example_tokens
from cocktail_serve.engines.vllm.example_tokens import ExampleTokens
from cocktail_serve.errors import ContextLengthError
from cocktail_serve.questions import Option, Question
from tests.models import make_decoder_tokenizer

QUESTION = Question("which is it", (Option("good"), Option("bad")))


def posed(text: str) -> PosedQuestion:
    return pose((("user", text),), QUESTION, reading="verbatim", form="text")


class SlowTokenizer:
    """Waits at each text until it may go on, and notes it."""

    def __init__(self) -> None:
        self._tokenizer = make_decoder_tokenizer()
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self.texts: list[str] = []

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    def __call__(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        self.has_begun.set()
        assert self.may_go_on.wait(10)
        return self._tokenizer(text, **options)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> SlowTokenizer:
    tokenizer = SlowTokenizer()
    monkeypatch.setattr(example_tokens, "open_tokenizer", lambda *_, **__: tokenizer)
    return tokenizer


@pytest.fixture
def tokens(tmp_path: Path) -> Any:
    pool: Any = SimpleNamespace(base=SimpleNamespace(path=tmp_path), chat_template=None, id="flan")
    tokens = ExampleTokens(pool, kept=tmp_path)
    yield tokens
    tokens.close()


async def test_nobody_waits_for_all_questions_of_another(tokenizer: SlowTokenizer, tokens: ExampleTokens) -> None:
    many = asyncio.create_task(tokens.options_of([posed("many")] * 50, None, max_tokens=255))
    assert await asyncio.to_thread(tokenizer.has_begun.wait, 10)
    one = asyncio.create_task(tokens.options_of([posed("one")], None, max_tokens=255))
    await asyncio.sleep(0)
    tokenizer.may_go_on.set()
    assert len(await one) == 1
    assert not many.done()
    assert len(await many) == 50


async def test_who_has_left_is_tokenised_no_further(tokenizer: SlowTokenizer, tokens: ExampleTokens) -> None:
    left = asyncio.create_task(tokens.options_of([posed("left")] * 50, None, max_tokens=255))
    assert await asyncio.to_thread(tokenizer.has_begun.wait, 10)
    left.cancel()
    tokenizer.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await left
    await tokens.options_of([posed("here")], None, max_tokens=255)
    assert sum("left" in text for text in tokenizer.texts) <= 4, "of one question, as far as it had begun"


async def test_a_question_that_is_too_long_is_named(tokenizer: SlowTokenizer, tokens: ExampleTokens) -> None:
    tokenizer.may_go_on.set()
    with pytest.raises(ContextLengthError) as caught:
        await tokens.options_of([posed("short"), posed("long " * 90)], None, max_tokens=64)
    assert caught.value.param == "questions.1"
