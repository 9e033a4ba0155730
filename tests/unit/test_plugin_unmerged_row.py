"""A request is bound to the row of coefficients that its recipe is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import orjson
import pytest

from cocktail_serve.errors import EngineError, InvalidMixError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.fence import ASGIMessage
from vllm_cocktail.unmerged.binding import RequestBinder, require_rows
from vllm_cocktail.unmerged.row import bind, coefficients_of

BASE, RED, GREEN = "b" * 64, "d" * 64, "e" * 64


def recipe(**coefficients: float) -> Recipe:
    fingerprints = {"base": BASE, "red": RED, "green": GREEN}
    return Recipe(
        BASE, tuple((fingerprints[name], value) for name, value in coefficients.items()), "float32", mode="unmerged"
    )


ALONE = recipe(base=1.0)
MIXED = recipe(base=0.5, red=0.2, green=0.3)


def body_of(mixed: Recipe, **more: Any) -> dict[str, Any]:
    return {"prompt": "x", "vllm_xargs": {"cocktail_recipe": json.dumps(mixed.to_json())}, **more}


def test_the_row_is_the_recipes() -> None:
    found, body = bind(body_of(MIXED), MIXED.digest, base=ALONE)
    assert found == MIXED
    assert body["vllm_xargs"] == {"cocktail_row": [RED, 0.2, GREEN, 0.3]}
    assert coefficients_of(body["vllm_xargs"]["cocktail_row"]) == {RED: 0.2, GREEN: 0.3}
    assert body["prompt"] == "x"


def test_other_arguments_for_the_worker_stay() -> None:
    body = body_of(MIXED)
    body["vllm_xargs"]["session_id"] = "s"
    assert bind(body, MIXED.digest, base=ALONE)[1]["vllm_xargs"]["session_id"] == "s"


def test_task_arithmetic_scales_its_row() -> None:
    params = {"lambda": 0.5}
    scaled = Recipe(BASE, ((BASE, 1.0), (RED, 0.8)), "float32", "task_arithmetic", params, mode="unmerged")
    assert bind(body_of(scaled), scaled.digest, base=ALONE)[1]["vllm_xargs"] == {"cocktail_row": [RED, 0.4]}


def test_the_base_needs_no_recipe_once_it_is_named_or_nobody_asks() -> None:
    for digest in (ALONE.digest, None):
        assert bind({"prompt": "x"}, digest, base=ALONE)[1]["vllm_xargs"] == {"cocktail_row": []}


def test_salts_are_of_recipe_and_request() -> None:
    asked = [(MIXED, "s"), (MIXED, "t"), (MIXED, None), (ALONE, "s"), (ALONE, None)]
    salts = [bind(body_of(mixed, cache_salt=salt), mixed.digest, base=ALONE)[1]["cache_salt"] for mixed, salt in asked]
    assert len(set(salts)) == len(asked)
    assert all(0 < len(salt) <= 128 and salt.isalnum() for salt in salts)
    assert bind(body_of(MIXED, cache_salt="s"), MIXED.digest, base=ALONE)[1]["cache_salt"] == salts[0]


@pytest.mark.parametrize(
    ("body", "named", "word"),
    [
        ({}, MIXED.digest, "must be the recipe"),
        (body_of(MIXED), ALONE.digest, "brings the coefficients of"),
        (body_of(ALONE), MIXED.digest, "brings the coefficients of"),
        ({"vllm_xargs": {"cocktail_row": [RED, 1.0]}}, ALONE.digest, "without cocktail_row"),
        ({"vllm_xargs": "x"}, ALONE.digest, "must be an object"),
        ({"vllm_xargs": {"cocktail_recipe": 3}}, None, "must be the recipe"),
        ({"vllm_xargs": {"cocktail_recipe": "{"}}, None, "is not JSON"),
        ({"vllm_xargs": {"cocktail_recipe": "[]"}}, None, "must hold an object"),
        (body_of(Recipe(BASE, ((BASE, 1.0),), "float32")), None, "form 'merged'"),
        (body_of(Recipe(RED, ((RED, 1.0),), "float32", mode="unmerged")), None, "is of base"),
        (body_of(Recipe(BASE, ((BASE, 1.0),), "bfloat16", mode="unmerged")), None, "bfloat16"),
    ],
)
def test_what_is_not_bound(body: dict[str, Any], named: str | None, word: str) -> None:
    with pytest.raises(InvalidMixError, match=word) as raised:
        bind(body, named, base=ALONE)
    assert raised.value.code == "invalid_recipe"


@pytest.mark.parametrize(
    "row",
    [
        None,
        [RED],
        [RED, 0.5, GREEN],
        [RED, "0.5"],
        [0.5, RED],
        [RED, 0.5, RED, 0.5],
        [RED, float("nan")],
        [RED, 1e39],
        "x",
    ],
)
def test_what_is_no_row_is_refused_where_rows_are_laid_out(row: Any) -> None:
    with pytest.raises(ValueError, match="row of coefficients"):
        coefficients_of(row)


async def no_loading(_recipe: Recipe) -> None:
    pass


def scope_of(path: str, content: bytes, method: str = "POST") -> dict[str, Any]:
    headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]
    return {"type": "http", "path": path, "method": method, "headers": headers}


async def received(
    binder: RequestBinder, scope: dict[str, Any], *chunks: bytes, named: str | None
) -> list[ASGIMessage]:
    messages = [
        {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks)}
        for index, chunk in enumerate(chunks)
    ]
    messages.append({"type": "http.disconnect"})

    async def receive() -> ASGIMessage:
        return messages.pop(0)

    _, replayed = await binder(scope, receive, named)
    return [await replayed(), await replayed()]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/cocktail/score"])
async def test_the_engine_reads_the_bound_body_in_place_of_what_was_sent(path: str) -> None:
    content = orjson.dumps(body_of(MIXED))
    scope = scope_of(path, content)
    body, end = await received(RequestBinder(ALONE, no_loading), scope, content[:10], content[10:], named=MIXED.digest)
    assert orjson.loads(body["body"])["vllm_xargs"] == {"cocktail_row": [RED, 0.2, GREEN, 0.3]}
    assert dict(scope["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert not body["more_body"]
    assert end == {"type": "http.disconnect"}


@pytest.mark.parametrize(
    ("path", "content", "method"),
    [
        ("/v1/responses/resp_1/cancel", b"{}", "POST"),
        ("/v1/responses", b"{}", "GET"),
        ("/v1/embeddings", b"{}", "POST"),
        ("/inference/v1/generate", b"{}", "POST"),
        ("/v1/completions", b"{}", "GET"),
        ("/v1/completions", b"no JSON", "POST"),
        ("/v1/completions", b"[]", "POST"),
    ],
)
async def test_nothing_else_is_let_in(path: str, content: bytes, method: str) -> None:
    with pytest.raises(InvalidMixError):
        await received(RequestBinder(ALONE, no_loading), scope_of(path, content, method), content, named=ALONE.digest)


async def test_experts_are_loaded_before_the_request_goes_in() -> None:
    asked = []

    async def load(mixed: Recipe) -> None:
        asked.append(mixed)
        raise InvalidMixError("no such expert")

    content = orjson.dumps(body_of(MIXED))
    with pytest.raises(InvalidMixError, match="no such expert"):
        await received(RequestBinder(ALONE, load), scope_of("/v1/completions", content), content, named=MIXED.digest)
    assert asked == [MIXED]


@dataclass
class SamplingParams:
    """As vLLM's, as far as rows go by them."""

    extra_args: dict[str, Any] | None

    def clone(self) -> SamplingParams:
        return replace(self)


class RecordingEngine:
    """What vLLM's engine client is asked to generate by."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def generate(self, _prompt: Any, sampling_params: Any, request_id: str, **_: Any) -> AsyncIterator[str]:
        self.asked.append(sampling_params.extra_args)
        yield request_id


async def test_what_vllm_asks_of_itself_for_a_request_goes_by_the_requests_row() -> None:
    engine: Any = RecordingEngine()
    require_rows(engine)
    content = orjson.dumps(body_of(MIXED))

    async def answer() -> None:
        await received(RequestBinder(ALONE, no_loading), scope_of("/v1/completions", content), content, named=None)
        shared = SamplingParams(extra_args={"other": 1})
        beams = [asyncio.create_task(anext(engine.generate("prompt", shared, f"beam-{n}"))) for n in range(2)]
        assert await asyncio.gather(*beams) == ["beam-0", "beam-1"]
        assert shared.extra_args == {"other": 1}

    await asyncio.create_task(answer())
    assert engine.asked == 2 * [{"other": 1, "cocktail_row": [RED, 0.2, GREEN, 0.3]}]


@pytest.mark.parametrize("args", [None, {}, {"other": 1}])
async def test_what_is_bound_to_no_row_does_not_reach_the_workers(args: dict[str, Any] | None) -> None:
    engine: Any = RecordingEngine()
    require_rows(engine)
    with pytest.raises(EngineError, match="bound to its coefficients"):
        engine.generate("prompt", SamplingParams(extra_args=args), "id")
    assert engine.asked == []


async def test_a_row_that_a_request_brings_is_left_as_it_is() -> None:
    engine: Any = RecordingEngine()
    require_rows(engine)
    assert [answer async for answer in engine.generate("prompt", SamplingParams(extra_args={"cocktail_row": []}), "1")]
    assert engine.asked == [{"cocktail_row": []}]
