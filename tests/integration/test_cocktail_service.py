"""Cocktails end to end below the gateway: a real SQLite file, engines that compute known losses."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.cocktails import jobs
from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.jobs import RetryPolicy
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.parsing import parse_inline, parse_request
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.cocktails.store import ChangeHook, Store
from cocktail_serve.config import Settings
from cocktail_serve.database.database import Database
from cocktail_serve.dtypes import DType
from cocktail_serve.engines.base import Embedded, Forwarded, MixedAhead, Scored
from cocktail_serve.engines.engine_time import CallTimer
from cocktail_serve.engines.recipe_names import NamesOf
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.errors import (
    CocktailError,
    ConflictError,
    ContextLengthError,
    EngineError,
    InvalidExamplesError,
    InvalidMixError,
    ModelNotReadyError,
    NotFoundError,
    PermissionDeniedError,
    StorageError,
)
from cocktail_serve.examples import ExampleSet, TextExample, example_digest
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import Recipe, one_hot
from cocktail_serve.usage.amounts import UsageAmount

A = {"input": "the film was a joy", "output": "positive"}
B = {"input": "the film was a bore", "output": "negative"}
C = {"input": "the film was a film", "output": "neutral"}
QUERY = {"query": "capital of france", "pos": ["paris"], "neg": ["berlin", "madrid"]}
OTHER_QUERY = {"query": "capital of spain", "pos": ["madrid"], "neg": ["rome"]}

QUICK = RetryPolicy(for_capacity_s=5.0, for_store_s=0.05, engine_failures=3, first_delay_s=0.001, max_delay_s=0.01)


def make_pool(pool_id: str, kind: Any, experts: Sequence[str], *, text_digest: str = "text") -> Pool:
    def member(name: str) -> Member:
        return Member(name, Path("/models") / name, fingerprint=f"fp-{pool_id}-{name}", dtype="float32", num_bytes=8)

    return Pool(pool_id, kind, member("base"), {name: member(name) for name in experts}, text_digest)


class DoubleEngine:
    """What both doubles share: materialised and forgotten recipes, errors to raise, a gate to hold jobs at."""

    def __init__(self, pool: Pool, dtype: DType = "float32") -> None:
        self.pool = pool
        self.dtype: DType = dtype
        self.materialised: list[str] = []
        self.forgotten: list[str] = []
        self.errors: list[CocktailError] = []
        self.num_waiting = 0
        self.num_dropped = 0
        self.max_length = 40
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def snapshot(self, *, deadline_s: float) -> EngineSnapshot:
        return EngineSnapshot(state="ready")

    async def check_examples(self, examples: ExampleSet) -> None:
        for row, example in enumerate(examples, start=1):
            if isinstance(example, TextExample) and len(example.input) > self.max_length:
                raise ContextLengthError(f"row {row}: too long", param="examples")

    async def mix_ahead(self, recipe: Recipe) -> MixedAhead:
        await self._answer()
        self.materialised.append(recipe.digest)
        return MixedAhead()

    def forget(self, recipe_digest: str) -> None:
        self.forgotten.append(recipe_digest)

    def name_recipes(self, names_of: NamesOf) -> None: ...

    async def _answer(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.num_waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_dropped += 1
            raise
        finally:
            self.num_waiting -= 1


class ScoringEngine(DoubleEngine):
    """A decoder's double: a model's loss of an example is a fixed number, a mixture's the weighted mean of them."""

    kind = "decoder"

    def __init__(self, pool: Pool, losses: Mapping[str, float], dtype: DType = "float32") -> None:
        super().__init__(pool, dtype)
        self.loss_of = {pool.member(name).fingerprint: loss for name, loss in losses.items()}
        self.visits: list[tuple[str, tuple[str, ...]]] = []
        self.tried: list[str] = []
        self.hold_after = math.inf

    async def server_metrics(self, *, deadline_s: float) -> Mapping[str, float]:
        return {}

    async def score(self, recipe: Recipe, examples: ExampleSet) -> Scored:
        with CallTimer() as timer, timer.scoring():
            losses = await self._losses(recipe, examples)
        return Scored(losses, timer.time)

    async def _losses(self, recipe: Recipe, examples: ExampleSet) -> list[float]:
        await self._answer()
        self.visits.append((recipe.only_model or "mixture", tuple(example_digest(example) for example in examples)))
        if recipe.only_model is None and recipe.digest not in self.materialised:
            self.tried.append(recipe.digest)
        if len(self.visits_to("mixture")) == self.hold_after:
            self.gate.clear()
        loss = sum(weight * self.loss_of[fingerprint] for fingerprint, weight in recipe.coefficients)
        return [self.loss(loss, example) for example in examples if isinstance(example, TextExample)]

    def loss(self, of_model: float, example: TextExample) -> float:
        return of_model + len(example.output) / 100

    @asynccontextmanager
    async def forward(
        self, recipe: Recipe, path: str, body: Mapping[str, Any], *, tenant: str
    ) -> AsyncIterator[Forwarded]:
        yield Forwarded(body=b"{}", events=None)

    def visits_to(self, name: str) -> list[tuple[str, ...]]:
        fingerprint = self.pool.member(name).fingerprint if name != "mixture" else name
        return [examples for model, examples in self.visits if model == fingerprint]


class EmbedEngine(DoubleEngine):
    """An encoder's double: `good` puts texts of one topic together, `base` puts all texts apart by their bytes."""

    kind = "encoder"
    dimension = 16

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.embedded: list[tuple[str, tuple[str, ...]]] = []

    async def embed(
        self,
        recipe: Recipe,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt: str = "",
        truncate_to: int | None = None,
        dimensions: int | None = None,
        background: bool = False,
    ) -> Embedded:
        await self._answer()
        assert background
        assert prompt == ""
        texts = [text for text in inputs if isinstance(text, str)]
        self.embedded.append((recipe.only_model or "mixture", tuple(texts)))
        vectors = np.stack([self._vector(recipe, text) for text in texts])
        return Embedded(vectors=vectors.astype(np.float32), num_tokens=len(texts))

    def _vector(self, recipe: Recipe, text: str) -> np.ndarray:
        good = dict(recipe.coefficients).get("fp-mini-good", 0.0)
        noise = np.random.default_rng(list(text.encode())).normal(size=self.dimension)
        topic = np.zeros(self.dimension)
        topic[0 if "france" in text or text == "paris" else 1 if "spain" in text or text == "madrid" else 2] = 1.0
        vector = good * topic + (1 - good) * noise / np.linalg.norm(noise)
        result: np.ndarray = vector / np.linalg.norm(vector)
        return result


class World:
    """Pools, doubles and a registry file; services on it come and go."""

    def __init__(
        self,
        folder: Path,
        *,
        url: str | None = None,
        lease_s: float = 0.5,
        retention: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.path = folder / "registry.sqlite"
        self.pools = {
            "flan": make_pool("flan", "decoder", ["ag-news", "nq"]),
            "mini": make_pool("mini", "encoder", ["good", "poor"]),
        }
        self.scoring = ScoringEngine(self.pools["flan"], {"base": 2.0, "ag-news": 1.0, "nq": 3.0})
        self.embedding = EmbedEngine(self.pools["mini"])
        self.settings = Settings.model_validate(
            {
                "store": {
                    "url": url or f"sqlite:///{self.path}",
                    "lease_s": lease_s,
                    "poll_s": 0.02,
                    "retention": retention or {},
                },
                "pools": [
                    {"id": "flan", "kind": "decoder", "base": "b", "engine": {"type": "fake"}, "max_examples": 4},
                    {"id": "mini", "kind": "encoder", "base": "b", "engine": {"type": "sentence_transformers"}},
                ],
                # tests of reports set it: engines are visited for them in the background
                "reports": False,
                **settings,
            }
        )

    def loss(self, name: str) -> float:
        return self.scoring.loss_of[self.pools["flan"].member(name).fingerprint]

    @asynccontextmanager
    async def service(
        self,
        *,
        retry_policy: RetryPolicy = QUICK,
        place: str = "here",
        change_hooks: Sequence[ChangeHook] = (),
        ledger: Any = None,
    ) -> AsyncIterator[CocktailService]:
        engines = {"flan": self.scoring, "mini": self.embedding}
        database = Database(self.settings.store.database_url)
        service = CocktailService(
            self.settings,
            self.pools,
            engines,
            database=database,
            retry_policy=retry_policy,
            change_hooks=change_hooks,
            place=place,
            ledger=ledger,
        )
        try:
            await database.open()
            await service.start()
            yield service
        finally:
            await service.stop()
            await database.close()

    def request(self, name: str = "films", pool: str = "flan", **options: Any) -> CocktailRequest:
        if not options.keys() & {"examples", "merging_weights"}:
            options["examples"] = [A, B] if pool == "flan" else [QUERY, OTHER_QUERY]
        return parse_request({"name": name, "pool": pool, **options}, settings=self.settings, pools=self.pools)

    def inline(self, **options: Any) -> CocktailRequest:
        return parse_inline(
            {"examples": [A, B], **options} if "merging_weights" not in options else options,
            pool=self.pools["flan"],
            settings=self.settings,
        )

    def copied_as_a_crash_leaves_it(self) -> Path:
        """The files of a registry in use, its log not yet merged, in a folder of their own."""
        folder = self.path.parent / "crashed"
        folder.mkdir()
        for file in self.path.parent.glob(f"{self.path.name}*"):
            shutil.copy(file, folder)
        return folder

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.path) as connection:
            return connection.execute(f"select * from {table}").fetchall()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def service(world: World) -> AsyncIterator[CocktailService]:
    async with world.service() as service:
        yield service


async def made(service: CocktailService, request: CocktailRequest, tenant: str = "acme") -> Cocktail:
    cocktail, _ = await service.create(tenant, request)
    return await service.wait(tenant, cocktail.id, 10.0)


async def until(condition: Callable[[], bool], *, deadline_s: float = 10.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  # what is watched for has no event of its own
            await asyncio.sleep(0.002)


async def test_a_decoder_cocktail_is_scored_weighed_and_served(world: World, service: CocktailService) -> None:
    request = world.request(temperature=0.5, metadata={"owner": "films"})
    queued, existed = await service.create("acme", request)
    assert not existed
    assert (queued.status, queued.id) == ("queued", f"films@{request.digest[:8]}")

    ready = await service.wait("acme", queued.id, 10.0)
    assert (ready.status, ready.progress, ready.current) == ("ready", 1.0, True)
    length = (len("positive") + len("negative")) / 2 / 100
    assert ready.losses == pytest.approx({"base": 2 + length, "ag-news": 1 + length, "nq": 3 + length})
    share = {name: math.exp(-loss / 0.5) for name, loss in (("base", 2), ("ag-news", 1), ("nq", 3))}
    expected = {name: value / sum(share.values()) for name, value in share.items()}
    assert ready.merging_weights == pytest.approx(expected)
    assert list(ready.merging_weights) == ["base", "ag-news", "nq"]
    assert ready.entropy == pytest.approx(-sum(w * math.log(w) for w in expected.values()))
    assert ready.mixed_loss == pytest.approx(
        sum(expected[name] * loss for name, loss in (("base", 2), ("ag-news", 1), ("nq", 3))) + length
    )
    assert ready.metadata == {"owner": "films"}

    served = service.catalog.resolve("acme", "films")
    assert served == service.catalog.resolve("acme", ready.id)
    assert served.model_id == ready.id
    assert served.recipe == ready.recipe
    assert world.scoring.materialised == [served.recipe.digest]
    assert dict(served.recipe.coefficients)["fp-flan-ag-news"] == ready.merging_weights["ag-news"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
async def test_a_loss_that_is_not_finite_is_told_once_and_kept_nowhere(
    world: World, service: CocktailService, loss: float
) -> None:
    world.scoring.loss_of[world.pools["flan"].member("nq").fingerprint] = loss
    failed = await made(service, world.request())
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("not_finite", "examples")
    assert "row 1: the loss of 'nq' on this example is" in failed.error.message
    assert len(world.scoring.visits_to("nq")) == 1, "it would be the same again"
    assert "fp-flan-nq" not in {model for row in world.rows("losses") for model in row}
    # who leaves it out gets on
    assert (await made(service, world.request(experts=["ag-news"]))).status == "ready"


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_embeddings_that_are_not_finite_are_kept_nowhere(
    world: World, service: CocktailService, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(world.embedding, "_vector", lambda *_: np.full(world.embedding.dimension, value))
    failed = await made(service, world.request(pool="mini"))
    assert failed.error is not None
    assert failed.error.code == "not_finite"
    assert world.rows("embeddings") == []


async def test_an_encoder_cocktail_is_weighed_by_its_embeddings(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(pool="mini", temperature=0.1))
    assert ready.status == "ready"
    assert ready.losses["good"] < ready.losses["base"]
    assert ready.merging_weights["good"] > 0.9
    assert ready.mixed_loss is not None
    assert {len(texts) for _, texts in world.embedding.embedded} == {6}, "every text once, queries and passages"


async def test_search_chooses_by_what_mixtures_lose(
    world: World, service: CocktailService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_EVERY_S", 0.0)
    rows = [{"input": f"question {number}", "output": "x" * number} for number in range(1, 5)]
    seen: list[tuple[float, int]] = []
    queued, _ = await service.create("acme", world.request(weighting="search", examples=rows))
    while not (now := service.catalog.get("acme", queued.id)).is_final:
        seen.append((now.progress, len(now.losses)))
        await asyncio.sleep(0)
    ready = service.catalog.get("acme", queued.id)
    assert ready.status == "ready"
    # the double's loss of a mixture is linear in the weights, so the best expert alone is best
    assert ready.chosen is not None
    assert ready.chosen.temperature == min(candidate.temperature for candidate in ready.candidates)
    assert ready.merging_weights["ag-news"] > 0.99
    trials = world.scoring.visits_to("mixture")
    assert {len(examples) for examples in trials[:-1]} == {1}, "leave one out"
    assert ready.mixed_loss == pytest.approx(1.0 + 2.5 / 100, abs=0.01)
    by_hand = [sum(w * world.loss(n) for n, w in c.merging_weights.items()) + 0.025 for c in ready.candidates]
    assert [candidate.loss for candidate in ready.candidates] == pytest.approx(by_hand)
    between = [progress for progress, num_losses in seen if num_losses == 3]
    assert between == sorted(between)
    assert len(set(between)) > 3, "progress moves while mixtures are tried"
    assert set(world.scoring.forgotten) >= set(world.scoring.tried), "no mixture that was only tried stays in memory"


async def test_a_search_goes_on_where_the_last_process_left_it(world: World) -> None:
    request = world.request(weighting="search")
    async with world.service() as service:
        world.scoring.hold_after = 5
        await service.create("acme", request)
        await until(lambda: len(world.scoring.visits_to("mixture")) == 5)
    world.scoring.gate.set()
    async with world.service() as service:
        ready = await service.wait("acme", f"films@{request.digest[:8]}", 10.0)
    assert (ready.status, len(ready.candidates)) == ("ready", 6)
    assert len(world.scoring.visits_to("mixture")) == 2 * 6, "every trial once; the mixture's own loss is known by then"


async def test_a_search_can_be_cancelled(world: World, service: CocktailService) -> None:
    world.scoring.hold_after = 3
    queued, _ = await service.create("acme", world.request(weighting="search"))
    await until(lambda: len(world.scoring.visits_to("mixture")) == 3)
    cancelled = await service.cancel("acme", queued.id)
    assert cancelled.status == "cancelled"
    world.scoring.gate.set()
    again = await made(service, world.request("others", temperature=5.0))
    assert again.status == "ready"
    assert len(world.scoring.visits_to("mixture")) == 3, (
        "the search went no further, and its first trial is this mixture"
    )


async def test_a_dry_run_searches_and_keeps_nothing(world: World, service: CocktailService) -> None:
    weighing = await service.dry_run("acme", world.request(weighting="search", pool="mini"))
    assert weighing.chosen is not None
    assert len(weighing.candidates) > 3
    assert min(c.loss for c in weighing.candidates) == weighing.chosen.loss
    assert (world.rows("losses"), world.rows("embeddings"), service.catalog.list("acme")) == ([], [], [])


async def test_a_single_example_is_not_searched_with_and_said_so(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(weighting="search", examples=[A], target="nq"))
    assert (ready.chosen.temperature, ready.chosen.alpha, ready.chosen.loss) == (5.0, 0.5, None)
    assert any("cannot be held out" in warning for warning in ready.warnings)


async def test_the_one_candidate_of_softmax_is_the_mixture(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(temperature=0.5))
    (only,) = ready.candidates
    assert (only.merging_weights, only.loss, only.temperature) == (ready.merging_weights, ready.mixed_loss, 0.5)


async def test_a_target_is_joined_by_eq_1_and_its_loss_reported(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(target="nq", alpha=0.25, temperature=1.0))
    base, ag_news = math.exp(-2.0), math.exp(-1.0)
    assert ready.merging_weights == pytest.approx(
        {"base": 0.75 * base / (base + ag_news), "ag-news": 0.75 * ag_news / (base + ag_news), "nq": 0.25}
    )
    assert list(ready.losses) == ["base", "ag-news", "nq"]


async def test_a_target_without_examples_is_mixed_with_the_base_by_eq_3(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(target="nq", alpha=0.7, examples=None))
    assert ready.merging_weights == pytest.approx({"base": 0.3, "nq": 0.7})
    assert (ready.losses, ready.mixed_loss) == ({}, None)
    assert world.scoring.visits == []


async def test_weights_by_hand_are_mixed_without_scoring(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(merging_weights={"nq": 1.5, "base": -0.5}))
    assert ready.merging_weights == {"base": -0.5, "nq": 1.5}
    assert ready.entropy is None
    assert world.scoring.visits == []
    assert await service.examples("acme", ready.id) == []


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
async def test_weights_of_examples_scale_task_vectors_and_the_base_counts_1(
    world: World, service: CocktailService, method: str
) -> None:
    params = {"lambda": 0.5}
    ready = await made(service, world.request(temperature=1.0, method=method, method_params=params, seed=7))
    linear = await made(service, world.request(name="linear", temperature=1.0, seed=7))
    assert ready.status == "ready"
    assert ready.merging_weights == {**linear.merging_weights, "base": 1.0}
    assert ready.entropy == linear.entropy
    assert (ready.recipe.method, ready.recipe.method_params["lambda"]) == (method, 0.5)
    assert ready.recipe.method_params.get("seed", 7) == 7, "the mask's seed is the request's"
    assert service.catalog.resolve("acme", ready.id).recipe == ready.recipe
    by_hand = await made(
        service,
        world.request(
            name="by-hand", merging_weights=ready.merging_weights, method=method, method_params=params, seed=7
        ),
    )
    assert by_hand.recipe == ready.recipe, "what is reported makes the same mixture again"


async def test_a_target_of_another_method_takes_its_share_of_eq_1(world: World, service: CocktailService) -> None:
    request = world.request(target="nq", alpha=0.25, temperature=1.0, method="ties")
    base, ag_news = math.exp(-2.0), math.exp(-1.0)
    ready = await made(service, request)
    assert ready.merging_weights == pytest.approx(
        {"base": 1.0, "ag-news": 0.75 * ag_news / (base + ag_news), "nq": 0.25}
    )


async def test_slerp_takes_a_target_and_the_base_or_one_expert(world: World, service: CocktailService) -> None:
    mono = await made(service, world.request(target="nq", alpha=1.0, examples=None, method="slerp"))
    assert mono.merging_weights == {"base": 0.0, "nq": 1.0}
    assert mono.status == "ready"
    pair = await made(service, world.request(experts=["nq"], weighting="uniform", method="slerp"))
    assert [coefficient for _, coefficient in pair.recipe.coefficients] == [0.5, 0.5]


async def test_experts_limits_the_peers(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(experts=["nq"], weighting="uniform"))
    assert ready.merging_weights == {"base": 0.5, "nq": 0.5}
    assert world.scoring.visits_to("ag-news") == []


async def test_experts_of_equal_parameters_are_scored_once_and_said_so(world: World) -> None:
    twin = Member("twin", Path("/models/twin"), "fp-flan-nq", "float32", 8)
    pool = world.pools["flan"]
    world.pools["flan"] = Pool("flan", "decoder", pool.base, {**pool.experts, "twin": twin}, pool.text_digest)
    world.scoring.pool = world.pools["flan"]
    async with world.service() as service:
        ready = await made(service, world.request())
    assert len(world.scoring.visits_to("nq")) == 1
    assert ready.losses["twin"] == ready.losses["nq"]
    assert any("'nq' and 'twin' have the same parameters" in warning for warning in ready.warnings)
    assert len(ready.recipe.coefficients) == 3


async def test_more_examples_than_the_pool_takes_are_sampled_with_a_warning(
    world: World, service: CocktailService
) -> None:
    rows = [{"input": f"row {number}", "output": "x"} for number in range(10)]
    ready = await made(service, world.request(examples=rows, seed=3))
    assert any("4 of 10 examples were sampled with seed 3" in warning for warning in ready.warnings)
    assert len(await service.examples("acme", ready.id)) == 4


async def test_validation_examples_decide_nothing_and_their_loss_is_reported(
    world: World, service: CocktailService
) -> None:
    plain = await made(service, world.request())
    validated = await made(service, world.request(validation_examples=[C]))
    assert validated.recipe == plain.recipe
    assert validated.digest != plain.digest
    assert (validated.mixed_loss, plain.validation_loss) == (plain.mixed_loss, None)
    assert validated.mixed_loss is not None
    difference = len("neutral") / 100 - (len("positive") + len("negative")) / 2 / 100
    assert validated.validation_loss == pytest.approx(validated.mixed_loss + difference)
    by_hand = world.request("by-hand", merging_weights={"base": 0.5, "ag-news": 0.5}, validation_examples=[A, B, C] * 3)
    ready = await made(service, by_hand)
    assert ready.validation_loss is not None
    assert any("4 of 9 validation examples" in warning for warning in ready.warnings)


async def test_validation_examples_of_an_encoder_are_scored_among_themselves(
    world: World, service: CocktailService
) -> None:
    request = world.request(pool="mini", examples=[QUERY, OTHER_QUERY], validation_examples=[QUERY, OTHER_QUERY])
    ready = await made(service, request)
    assert ready.validation_loss == pytest.approx(ready.mixed_loss)


async def test_validation_survives_a_restart_and_goes_with_its_cocktail(world: World) -> None:
    secret = {"input": "the vault opens at dawn", "output": "quietly"}
    async with world.service() as service:
        world.scoring.gate.clear()
        created, _ = await service.create("acme", world.request(validation_examples=[secret]))
    world.scoring.gate.set()
    async with world.service() as service:
        ready = await service.wait("acme", created.id, 10.0)
        assert (ready.status, len(world.rows("validation_examples"))) == ("ready", 1)
        assert ready.validation_loss is not None
        await service.delete("acme", created.id)
        assert [world.rows(table) for table in ("validation_examples", "losses")] == [[], []]
        for file in world.path.parent.iterdir():
            assert b"vault opens at dawn" not in file.read_bytes(), file


async def test_validation_examples_that_do_not_fit_are_named(world: World, service: CocktailService) -> None:
    long = {"input": "x" * 50, "output": "y"}
    with pytest.raises(ContextLengthError, match="row 2") as caught:
        await service.create("acme", world.request(validation_examples=[A, long]))
    assert caught.value.param == "validation_examples"
    with pytest.raises(InvalidExamplesError, match="row 1") as unfit:
        world.request(validation_examples=[QUERY])
    assert unfit.value.param == "validation_examples"
    assert service.catalog.list("acme") == []


class Notes:
    """A hook that remembers what it was told, and can refuse."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.deletions: list[str] = []
        self.refuses = False

    async def changed(self, connection: AsyncConnection, before: Cocktail, after: Cocktail) -> None:
        if self.refuses:
            raise StorageError("no")
        self.changes.append((before.status, after.status))

    async def deleted(self, connection: AsyncConnection, uids: Sequence[str]) -> None:
        self.deletions.extend(uids)


async def test_progress_alone_is_not_written_at_every_step(world: World) -> None:
    notes = Notes()
    rows = [{"input": f"question {number}", "output": "x" * number} for number in range(1, 5)]
    async with world.service(change_hooks=[notes]) as service:
        began = time.monotonic()
        ready = await made(service, world.request(weighting="search", examples=rows))
        at_most = (time.monotonic() - began) / jobs.PROGRESS_EVERY_S
        assert len(world.scoring.visits_to("mixture")) > 10
        assert notes.changes.count(("scoring", "scoring")) <= at_most
        assert ready.progress == 1.0
        assert len(ready.losses) == 3, "what was left out came with the next"


async def test_a_witness_hears_of_every_change_in_its_transaction(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_EVERY_S", 0.0)
    notes = Notes()
    async with world.service(change_hooks=[notes]) as service:
        ready = await made(service, world.request())
        steps = list(dict.fromkeys(notes.changes))
        assert steps == [
            ("queued", "scoring"),
            ("scoring", "scoring"),
            ("scoring", "mixing"),
            ("mixing", "mixing"),
            ("mixing", "ready"),
        ]
        await service.delete("acme", ready.id)
        assert notes.deletions == [ready.uid]
        world.scoring.gate.clear()
        queued, _ = await service.create("acme", world.request(seed=1))
        await until(lambda: service.catalog.get("acme", queued.id).status == "scoring")
        notes.refuses = True
        with pytest.raises(StorageError):
            await service.cancel("acme", queued.id)
        assert service.catalog.get("acme", queued.id).status == "scoring", "neither on disk nor in memory"
        assert [row for row in world.rows("cocktails") if "scoring" in row]


async def test_rows_beside_a_cocktail_are_there_with_it_or_neither_is(world: World, service: CocktailService) -> None:
    async def refuse(connection: AsyncConnection, cocktail: Cocktail) -> None:
        raise StorageError("no")

    with pytest.raises(StorageError):
        await service.create("acme", world.request(), extra_writes=refuse)
    assert (service.catalog.list("acme"), world.rows("cocktails")) == ([], [])
    seen = []

    async def note(connection: AsyncConnection, cocktail: Cocktail) -> None:
        seen.append(cocktail.status)

    for _ in range(2):
        cocktail, _ = await service.create("acme", world.request(), extra_writes=note)
        await service.wait("acme", cocktail.id, 10.0)
    assert seen == ["queued", "ready"]


async def test_a_mixture_worse_than_its_best_model_carries_a_warning(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(weighting="uniform"))
    assert any("above that of 'ag-news' alone" in warning for warning in ready.warnings)


async def test_fifty_identical_creations_at_once_are_one_job(world: World, service: CocktailService) -> None:
    request = world.request()
    answers = await asyncio.gather(*(service.create("acme", request) for _ in range(50)))
    assert [existed for _, existed in answers].count(False) == 1
    assert len({cocktail.uid for cocktail, _ in answers}) == 1
    await service.wait("acme", "films", 10.0)
    assert len(world.scoring.visits) == 4, "base, two experts and the mixture"
    assert len(world.rows("cocktails")) == 1


async def test_only_new_examples_are_scored(world: World, service: CocktailService) -> None:
    await made(service, world.request(examples=[A, B], temperature=5.0))
    world.scoring.visits.clear()
    await made(service, world.request(examples=[A, B, C], temperature=5.0))
    new = example_digest(TextExample(C["input"], C["output"]))
    for name in ("base", "ag-news", "nq"):
        assert world.scoring.visits_to(name) == [(new,)]
    assert world.scoring.visits_to("mixture") == [(new,)], "the new example moved no weight, so the mixture is the same"


async def test_kept_examples_are_scored_as_they_were_given(world: World) -> None:
    """Though the pool joins rows by something else by then: they are found by their losses, and purged with them."""
    rows = [A, {"input": "a \n", "output": "b"}, {"prompt": "a", "completion": "b"}, {**A, "separator": ": "}]
    async with world.service() as service:
        given = world.request(examples=rows)
        ready = await made(service, given)
    database = Database(world.settings.store.database_url)
    await database.open()
    try:
        kept = await Store(database).example_set(ready)
    finally:
        await database.close()
    assert given.examples is not None
    assert kept is not None
    assert kept.digests == given.examples.digests
    assert kept == given.examples


async def test_only_new_experts_are_scored(world: World) -> None:
    async with world.service() as service:
        await made(service, world.request())
    world.pools["flan"] = make_pool("flan", "decoder", ["ag-news", "nq", "squad"])
    world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "ag-news": 1.0, "nq": 3.0, "squad": 0.5})
    async with world.service() as service:
        ready = await made(service, world.request())
        assert [len(service.catalog.list("acme")), ready.current] == [2, True]
    assert [model for model, _ in world.scoring.visits] == ["fp-flan-squad", "mixture"]


@pytest.mark.parametrize("change", ["tokenizer", "dtype", "loss version"])
async def test_losses_are_measured_again_when_what_they_depend_on_changes(
    world: World, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.service() as service:
        await made(service, world.request())
    if change == "loss version":
        monkeypatch.setattr("cocktail_serve.scoring.decoder.LOSS_VERSION", "text-1")
    if change == "tokenizer":
        world.pools["flan"] = make_pool("flan", "decoder", ["ag-news", "nq"], text_digest="other")
    world.scoring = ScoringEngine(
        world.pools["flan"],
        {"base": 2.0, "ag-news": 1.0, "nq": 3.0},
        dtype="bfloat16" if change == "dtype" else "float32",
    )
    async with world.service() as service:
        await made(service, world.request(temperature=0.1))
    assert len(world.scoring.visits) == 4


async def test_only_new_texts_are_embedded(world: World, service: CocktailService) -> None:
    await made(service, world.request(pool="mini"))
    world.embedding.embedded.clear()
    more = {"query": "capital of italy", "pos": ["rome"], "neg": ["paris"]}
    await made(service, world.request(pool="mini", examples=[QUERY, OTHER_QUERY, more]))
    for name in ("base", "good", "poor"):
        of_model = [texts for model, texts in world.embedding.embedded if model == f"fp-mini-{name}"]
        assert of_model == [("capital of italy",)]


async def test_a_dry_run_tells_losses_and_weights_and_keeps_nothing(world: World, service: CocktailService) -> None:
    request = world.request(temperature=0.5)
    weighing = await service.dry_run("acme", request)
    assert service.catalog.list("acme") == []
    assert [world.rows(table) for table in ("cocktails", "examples", "items", "losses")] == [[], [], [], []]
    ready = await made(service, request)
    assert (weighing.losses, weighing.merging_weights) == (ready.losses, ready.merging_weights)
    assert weighing.entropy == ready.entropy
    world.scoring.visits.clear()
    assert await service.dry_run("acme", request) == weighing
    assert world.scoring.visits == [], "what is kept for a cocktail of the tenant is used"


async def test_the_newest_ready_version_is_current_and_a_pin_holds(world: World, service: CocktailService) -> None:
    first = await made(service, world.request(seed=1))
    second = await made(service, world.request(seed=2))
    assert service.catalog.resolve("acme", "films").model_id == second.id
    assert [cocktail.id for cocktail in service.catalog.list("acme", "films") if cocktail.current] == [second.id]

    pinned = await service.set_current("acme", "films", first.id)
    assert (pinned.id, pinned.current) == (first.id, True)
    third = await made(service, world.request(seed=3))
    assert not third.current
    assert service.catalog.resolve("acme", "films").model_id == first.id

    assert (await service.set_current("acme", "films", None)).id == third.id
    assert service.catalog.resolve("acme", "films").model_id == third.id


async def test_an_identical_request_makes_its_version_current_again(world: World, service: CocktailService) -> None:
    first = await made(service, world.request(seed=1))
    await made(service, world.request(seed=2))
    visits = len(world.scoring.visits)
    again, existed = await service.create("acme", world.request(seed=1))
    assert (existed, again.id, again.current, again.status) == (True, first.id, True, "ready")
    assert service.catalog.resolve("acme", "films").model_id == first.id
    assert len(world.scoring.visits) == visits


async def test_a_queued_or_failed_version_never_moves_the_name(world: World, service: CocktailService) -> None:
    first = await made(service, world.request(seed=1))
    world.scoring.gate.clear()
    unfinished, _ = await service.create("acme", world.request(examples=[C], seed=2))
    await until(lambda: service.catalog.get("acme", unfinished.id).status == "scoring")
    assert service.catalog.resolve("acme", "films").model_id == first.id
    with pytest.raises(ModelNotReadyError, match="scoring"):
        service.catalog.resolve("acme", unfinished.id)
    with pytest.raises(ConflictError, match="only a ready version"):
        await service.set_current("acme", "films", unfinished.id)

    world.scoring.gate.set()
    assert (await service.wait("acme", unfinished.id, 10.0)).current
    world.scoring.errors = [InvalidMixError("torn")]
    failed = await made(service, world.request(seed=4))
    assert (failed.status, failed.error.message, failed.current) == ("failed", "torn", False)
    assert service.catalog.resolve("acme", "films").model_id == unfinished.id
    with pytest.raises(NotFoundError, match="failed: torn"):
        service.catalog.resolve("acme", failed.id)


async def test_versions_are_ordered_by_when_they_were_asked_for_not_by_when_they_are_ready(
    world: World, service: CocktailService
) -> None:
    world.scoring.gate.clear()
    slow, _ = await service.create("acme", world.request(seed=1))
    quick, _ = await service.create("acme", world.request(merging_weights={"nq": 1.0}))
    world.scoring.gate.set()
    await service.wait("acme", quick.id, 10.0)
    await service.wait("acme", slow.id, 10.0)
    assert service.catalog.resolve("acme", "films").model_id == quick.id


async def test_a_pin_on_a_deleted_version_is_gone_with_it(world: World, service: CocktailService) -> None:
    first = await made(service, world.request(seed=1))
    second = await made(service, world.request(seed=2))
    await service.set_current("acme", "films", first.id)
    await service.delete("acme", first.id)
    assert service.catalog.resolve("acme", "films").model_id == second.id
    assert world.rows("pins") == []


async def test_a_restart_finds_ready_cocktails_pins_and_order(world: World) -> None:
    async with world.service() as service:
        first = await made(service, world.request(seed=1))
        second = await made(service, world.request(seed=2))
        await made(service, world.request("other", seed=1))
        await service.set_current("acme", "films", first.id)
        before = service.catalog.list("acme")
        models = service.catalog.models("acme")
    visits = len(world.scoring.visits)
    async with world.service() as service:
        assert service.catalog.list("acme") == before
        assert list(service.catalog.models("acme")) == list(models)
        assert service.catalog.resolve("acme", "films").model_id == first.id
        assert service.catalog.resolve("acme", second.id).recipe == second.recipe
        await service.set_current("acme", "films", None)
        _, existed = await service.create("acme", world.request(seed=1))
        assert existed
        assert service.catalog.resolve("acme", "films").model_id == first.id
    assert len(world.scoring.visits) == visits


async def test_a_restart_finishes_unfinished_jobs(world: World) -> None:
    async with world.service() as service:
        await made(service, world.request(examples=[A]))
        world.scoring.gate.clear()
        created, _ = await service.create("acme", world.request(seed=7))
        await until(lambda: service.catalog.get("acme", created.id).status == "scoring")
    assert [row for row in world.rows("cocktails") if "scoring" in row]
    world.scoring.gate.set()
    world.scoring.visits.clear()
    async with world.service() as service:
        ready = await service.wait("acme", created.id, 10.0)
        assert (ready.status, ready.digest) == ("ready", created.digest)
        assert [len(examples) for examples in world.scoring.visits_to("base")] == [1], "the other example is kept"


async def test_what_was_announced_survives_a_crash(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.service() as service:
        ready = await made(service, world.request())
        world.scoring.gate.clear()
        queued, _ = await service.create("acme", world.request("unfinished", examples=[C]))
        after = World(world.copied_as_a_crash_leaves_it())
    async with after.service() as service:
        assert service.catalog.resolve("acme", "films").recipe == ready.recipe
        assert (await service.wait("acme", queued.id, 10.0)).status == "ready"
        assert await service.examples("acme", queued.id) == [C]


async def test_memory_and_disk_agree_after_many_things_at_once(world: World) -> None:
    choices = random.Random(0)
    async with world.service() as service:

        async def something(number: int) -> None:
            tenant = choices.choice(["acme", "other"])
            name = choices.choice(["films", "books"])
            request = world.request(name, examples=choices.choice([[A], [B], [A, B], [C]]), seed=choices.randrange(3))
            await asyncio.sleep(choices.random() / 20)
            with contextlib.suppress(NotFoundError):
                match number % 5:
                    case 0:
                        await service.delete(tenant, name)
                    case 1:
                        await service.cancel(tenant, name)
                    case 2:
                        await service.delete(tenant, f"{name}@{request.digest[:8]}")
                    case _:
                        cocktail, _ = await service.create(tenant, request)
                        await service.wait(tenant, cocktail.id, 10.0)

        await asyncio.gather(*(something(number) for number in range(120)))
        shown = {tenant: service.catalog.list(tenant) for tenant in ("acme", "other")}
        assert all(cocktail.is_final for cocktails in shown.values() for cocktail in cocktails)
        uids = {cocktail.uid for cocktails in shown.values() for cocktail in cocktails}
        assert uids
        assert {row[0] for row in world.rows("cocktails")} == uids
        assert {row[0] for row in world.rows("examples")} == uids
        tenants = {cocktail.uid: cocktail.tenant for cocktails in shown.values() for cocktail in cocktails}
        needed = {(tenants[uid], item) for uid, item in world.rows("items")}
        assert {(row[0], row[1]) for row in world.rows("losses")} <= needed, "no score outlives its last cocktail"
    async with world.service() as service:
        assert {tenant: service.catalog.list(tenant) for tenant in ("acme", "other")} == shown


async def test_an_unfinished_job_whose_pool_changed_fails_and_says_so(world: World) -> None:
    world.scoring.gate.clear()
    async with world.service() as service:
        created, _ = await service.create("acme", world.request())
    world.pools["flan"] = make_pool("flan", "decoder", ["nq"])
    world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "nq": 3.0})
    async with world.service() as service:
        failed = await service.wait("acme", created.id, 10.0)
    assert (failed.status, failed.error.code) == ("failed", "pool_changed")


async def test_a_cocktail_outlives_new_experts_but_not_the_loss_of_its_own(world: World) -> None:
    async with world.service() as service:
        ready = await made(service, world.request(merging_weights={"base": 0.5, "nq": 0.5}))
    world.pools["flan"] = make_pool("flan", "decoder", ["nq", "squad"])
    world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "nq": 3.0, "squad": 1.0})
    async with world.service() as service:
        assert service.catalog.resolve("acme", "films").recipe == ready.recipe
    world.pools["flan"] = make_pool("flan", "decoder", ["squad"])
    world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "squad": 1.0})
    async with world.service() as service:
        with pytest.raises(NotFoundError, match="no longer has"):
            service.catalog.resolve("acme", "films")
        assert ready.id not in list(service.catalog.models("acme"))
        assert service.catalog.get("acme", "films").status == "ready"


async def test_another_dtype_of_the_engine_rounds_the_same_weights_anew(world: World) -> None:
    async with world.service() as service:
        ready = await made(service, world.request())
    world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "ag-news": 1.0, "nq": 3.0}, dtype="bfloat16")
    for _ in range(2):
        async with world.service() as service:
            recipe = service.catalog.resolve("acme", "films").recipe
            assert (recipe.dtype, recipe.coefficients) == ("bfloat16", ready.recipe.coefficients)
            assert len([w for w in service.catalog.get("acme", "films").warnings if "made for float32" in w]) == 1


class TestUnmerged:
    """A pool whose recipes share a batch: whatever is known ahead is asked at once, and nothing is tried in turn."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> World:
        world = World(tmp_path)
        world.pools["flan"] = replace(world.pools["flan"], mode="unmerged")
        world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "ag-news": 1.0, "nq": 3.0})
        return world

    async def test_no_step_is_written_in_which_nothing_happens(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is mixed, and of weights that are given nothing is scored."""
        monkeypatch.setattr(jobs, "PROGRESS_EVERY_S", 60.0)
        notes = Notes()
        async with world.service(change_hooks=[notes]) as service:
            given = await made(service, world.request("given", merging_weights={"base": 0.25, "nq": 0.75}))
            assert notes.changes == [("queued", "ready")]
            assert given.progress == 1.0
            assert given.merging_weights == {"base": 0.25, "nq": 0.75}
            assert service.catalog.resolve("acme", "given").recipe == given.recipe
            notes.changes.clear()
            weighed = await made(service, world.request())
            assert notes.changes == [("queued", "scoring"), ("scoring", "mixing"), ("mixing", "ready")]
            assert set(weighed.losses) == {"base", "ag-news", "nq"}

    async def test_all_candidates_of_a_search_are_at_the_engine_at_once(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        merged = World(world.path.parent / "merged")
        (world.path.parent / "merged").mkdir()
        async with merged.service() as service:
            in_turn = await made(service, merged.request(weighting="search", examples=rows))
        async with world.service() as service:
            await made(service, world.request("scored", examples=rows, temperature=3.3))
            world.scoring.gate.clear()
            queued, _ = await service.create("acme", world.request(weighting="search", examples=rows))
            num_trials = len(in_turn.candidates) * 4
            await until(lambda: world.scoring.num_waiting == num_trials)
            world.scoring.gate.set()
            at_once = await service.wait("acme", queued.id, 10)
        assert num_trials > 4
        assert at_once.status == "ready"
        assert at_once.candidates == in_turn.candidates, "the order in which they are answered decides nothing"
        assert at_once.recipe == replace(in_turn.recipe, mode="unmerged")

    async def test_a_search_that_is_cancelled_leaves_nothing_at_the_engine(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        async with world.service() as service:
            await made(service, world.request("scored", examples=rows, temperature=3.3))
            world.scoring.gate.clear()
            queued, _ = await service.create("acme", world.request(weighting="search", examples=rows))
            await until(lambda: world.scoring.num_waiting == 24)
            await service.cancel("acme", queued.id)
            await until(lambda: world.scoring.num_waiting == 0)
            assert world.scoring.num_dropped == 24

    async def test_one_that_fails_ends_the_others(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        async with world.service() as service:
            await made(service, world.request("scored", examples=rows, temperature=3.3))
            world.scoring.errors = [InvalidExamplesError("the engine cannot read it")]
            queued, _ = await service.create("acme", world.request(weighting="search", examples=rows))
            failed = await service.wait("acme", queued.id, 10)
            assert (failed.status, failed.error.code) == ("failed", "invalid_examples")
            assert world.scoring.num_waiting == 0

    async def test_all_rows_of_a_step_are_at_the_engine_at_once(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        async with world.service() as service:
            await made(service, world.request("scored", examples=rows, temperature=3.3))
            world.scoring.gate.clear()
            queued, _ = await service.create("acme", world.request(weighting="gradient", examples=rows))
            # four mixtures held out; where the path stands, and a probe for each expert
            await until(lambda: world.scoring.num_waiting == 4 + 1 + 2)
            world.scoring.gate.set()
            ready = await service.wait("acme", queued.id, 10)
            report = await service.report("acme", queued.id)
        assert ready.status == "ready"
        # the double's loss is linear in the weights: the path leads away from `nq`, towards `ag-news`, to the end
        assert [candidate.chosen for candidate in ready.candidates].index(True) == len(ready.candidates) - 1
        weights = ready.merging_weights
        assert weights["ag-news"] > 1.0
        assert weights["nq"] < 0.0
        assert ready.mixed_loss < min(ready.losses.values())
        assert ready.chosen.loss == pytest.approx(ready.mixed_loss, abs=0.05)
        assert ready.entropy is None
        assert weights["ag-news"] == 1.5
        assert len(ready.warnings) == 1
        assert "coefficient of 'ag-news' went as far as it may, 1.5" in ready.warnings[0]
        assert report.cross_validation is not None

    async def test_the_same_request_gives_the_same_recipe_wherever_it_is_made(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        made_of = []
        for tenant in ("acme", "other"):
            async with world.service() as service:
                made_of.append(await made(service, world.request(weighting="gradient", examples=rows), tenant=tenant))
        assert made_of[0].recipe == made_of[1].recipe
        assert made_of[0].candidates == made_of[1].candidates

    async def test_learning_goes_on_where_the_last_process_left_it(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        request = world.request(weighting="gradient", examples=rows)
        async with world.service() as service:
            world.scoring.hold_after = 20
            await service.create("acme", request)
            await until(lambda: len(world.scoring.visits_to("mixture")) >= 20)
        before = len(world.scoring.visits_to("mixture"))
        world.scoring.gate.set()
        async with world.service() as service:
            ready = await service.wait("acme", f"films@{request.digest[:8]}", 10.0)
        assert ready.status == "ready"
        again = len(world.scoring.visits_to("mixture")) - before
        async with world.service() as service:
            await made(service, world.request("whole", weighting="gradient", examples=rows), tenant="other")
        whole = len(world.scoring.visits_to("mixture")) - before - again
        assert again <= whole - 20, "what was answered before is not asked again"

    async def test_learning_can_be_cancelled_and_leaves_nothing_at_the_engine(self, world: World) -> None:
        rows = [{"input": f"q{i}", "output": "a" * (i + 1)} for i in range(4)]
        async with world.service() as service:
            await made(service, world.request("scored", examples=rows, temperature=3.3))
            world.scoring.gate.clear()
            queued, _ = await service.create("acme", world.request(weighting="gradient", examples=rows))
            await until(lambda: world.scoring.num_waiting == 7)
            assert (await service.cancel("acme", queued.id)).status == "cancelled"
            await until(lambda: world.scoring.num_waiting == 0)
            assert world.scoring.num_dropped == 7

    async def test_what_stood_in_the_way_of_learning_is_said(self, world: World) -> None:
        world.scoring = ScoringEngine(world.pools["flan"], {"base": 2.0, "ag-news": 2.0, "nq": 3.0})
        async with world.service() as service:
            one = await made(service, world.request("one", weighting="gradient", examples=[A]))
            idle = await made(service, world.request("idle", weighting="gradient", examples=[A, B, C]))
        assert any("one example cannot be held out" in warning for warning in one.warnings)
        assert (one.chosen.temperature, one.chosen.loss) == (one.options.temperature, None)
        assert any("'ag-news' and the base lose the same" in warning for warning in idle.warnings)

    async def test_losses_are_kept_apart_from_those_of_merged_models(self, world: World) -> None:
        async with world.service() as service:
            await made(service, world.request("films"))
        visits = len(world.scoring.visits)
        world.pools["flan"] = replace(world.pools["flan"], mode="merged")
        world.scoring.pool = world.pools["flan"]
        async with world.service() as service:
            await made(service, world.request("films", temperature=0.4))
        assert len(world.scoring.visits) == 2 * visits, "other rounding: other losses"


async def test_deletion_purges_examples_and_scores_down_to_the_bytes(world: World, service: CocktailService) -> None:
    secret = {"input": "the vault opens at dawn", "output": "quietly"}
    gone = await made(service, world.request("vault", examples=[A, secret]))
    stays = await made(service, world.request("films", examples=[A, B]))
    await made(service, world.request("vault", examples=[A, secret]), tenant="other")
    await service.delete("acme", "vault")
    with pytest.raises(NotFoundError):
        service.catalog.get("acme", gone.id)
    with pytest.raises(NotFoundError):
        service.catalog.resolve("acme", "vault")
    kept = {(row[0], row[1]) for row in world.rows("losses")}
    digests = {name: example_digest(TextExample(**row)) for name, row in (("a", A), ("b", B), ("secret", secret))}
    assert kept == {
        ("acme", digests["a"]),
        ("acme", digests["b"]),
        ("other", digests["a"]),
        ("other", digests["secret"]),
    }
    assert {row[0] for row in world.rows("examples")} == {stays.uid, service.catalog.get("other", "vault").uid}

    await service.delete("other", "vault")
    await service.delete("acme", "films")
    assert [world.rows(table) for table in ("cocktails", "examples", "items", "losses", "pins")] == [[]] * 5
    for file in world.path.parent.iterdir():
        assert b"vault opens at dawn" not in file.read_bytes(), file


async def test_deletion_purges_embeddings(world: World, service: CocktailService) -> None:
    await made(service, world.request(pool="mini"))
    assert len(world.rows("embeddings")) == 3 * 6
    await service.delete("acme", "films")
    assert world.rows("embeddings") == []


async def test_deletion_cancels_an_unfinished_job_and_answers_who_waits(world: World, service: CocktailService) -> None:
    world.scoring.gate.clear()
    created, _ = await service.create("acme", world.request())
    # "scoring" is told while its three calls are still on their way to the engine
    await until(lambda: world.scoring.num_waiting == 3)
    assert service.catalog.get("acme", created.id).status == "scoring"
    waiting = asyncio.create_task(service.wait("acme", created.id, 30.0))
    await asyncio.sleep(0)
    (removed,) = await service.delete("acme", created.id)
    assert removed.status == "cancelled"
    assert (await waiting).status == "cancelled"
    await until(lambda: world.scoring.num_dropped == 3)
    world.scoring.gate.set()
    again = await made(service, world.request())
    assert (again.status, again.id) == ("ready", created.id)
    assert again.uid != created.uid


async def test_only_the_last_user_of_a_recipe_frees_its_parameters(world: World, service: CocktailService) -> None:
    mine = await made(service, world.request(seed=1))
    twin = await made(service, world.request("twin", seed=1))
    theirs = await made(service, world.request(seed=1), tenant="other")
    assert mine.recipe == twin.recipe == theirs.recipe
    await service.delete("acme", mine.id)
    await service.delete("other", theirs.id)
    assert world.scoring.forgotten == []
    await service.delete("acme", "twin")
    assert world.scoring.forgotten == [twin.recipe.digest]


async def test_the_parameters_of_a_pools_own_model_are_never_freed(world: World, service: CocktailService) -> None:
    await made(service, world.request(merging_weights={"nq": 1.0}))
    await service.delete("acme", "films")
    assert world.scoring.forgotten == []


async def test_tenants_see_only_their_own(world: World, service: CocktailService) -> None:
    mine = await made(service, world.request())
    assert service.catalog.list("other") == []
    seen = service.catalog.models("other")
    assert "flan/nq" in seen
    assert all("films" not in model_id for model_id in seen)
    for ref in ("films", mine.id):
        with pytest.raises(NotFoundError):
            service.catalog.get("other", ref)
        with pytest.raises(NotFoundError, match="does not exist"):
            service.catalog.resolve("other", ref)
        with pytest.raises(NotFoundError):
            await service.delete("other", ref)
        with pytest.raises(NotFoundError):
            await service.examples("other", ref)
        with pytest.raises(NotFoundError):
            await service.wait("other", ref, 1.0)
    with pytest.raises(NotFoundError):
        await service.set_current("other", "films", mine.id)
    visits = len(world.scoring.visits)
    theirs = await made(service, world.request(), tenant="other")
    assert len(world.scoring.visits) == visits + 4, "no score is shared between tenants"
    assert theirs.id == mine.id
    assert theirs.uid != mine.uid
    await service.delete("other", "films")
    assert service.catalog.resolve("acme", "films").model_id == mine.id


async def test_pools_and_experts_resolve_to_themselves_and_cannot_be_deleted(
    world: World, service: CocktailService
) -> None:
    pool = world.pools["flan"]
    assert service.catalog.resolve("anyone", "flan").recipe == one_hot(pool, "base", dtype="float32")
    assert service.catalog.resolve("anyone", "flan/nq").recipe == one_hot(pool, "nq", dtype="float32")
    for model_id in ("flan", "flan/nq"):
        with pytest.raises(PermissionDeniedError):
            await service.delete("acme", model_id)
    for unknown in ("flan/none", "nothing", "", "flan@12345678", "films@", "@", "flan/nq@1"):
        with pytest.raises(NotFoundError) as caught:
            service.catalog.resolve("acme", unknown)
        assert caught.value.code == "model_not_found"


async def test_the_model_list_is_sorted_and_complete(world: World, service: CocktailService) -> None:
    first = await made(service, world.request(seed=1))
    second = await made(service, world.request(seed=2))
    await service.inline("acme", world.inline(seed=3))
    world.scoring.errors = [InvalidMixError("torn")]
    await made(service, world.request("broken", seed=4, examples=[C]))
    ids = list(service.catalog.models("acme"))
    pools = ["flan", "flan/ag-news", "flan/nq", "mini", "mini/good", "mini/poor"]
    assert ids == sorted([*pools, "films", first.id, second.id])


async def test_an_inline_cocktail_is_found_again_unlisted_and_named(world: World, service: CocktailService) -> None:
    request = world.inline(temperature=0.5)
    served = await service.inline("acme", request)
    assert served.model_id == f"flan@{request.digest[:8]}"
    visits = len(world.scoring.visits)
    assert await service.inline("acme", request) == served
    assert len(world.scoring.visits) == visits
    assert service.catalog.resolve("acme", served.model_id) == served
    with pytest.raises(NotFoundError):
        service.catalog.resolve("other", served.model_id)
    assert service.catalog.list("acme") == []
    assert served.model_id not in list(service.catalog.models("acme"))
    assert service.catalog.resolve("acme", "flan").recipe.only_model == "fp-flan-base", "the pool stays the base"
    await service.delete("acme", served.model_id)
    with pytest.raises(NotFoundError):
        service.catalog.resolve("acme", served.model_id)
    assert world.rows("examples") == []


async def test_inline_cocktails_go_least_recently_used_first(tmp_path: Path) -> None:
    world = World(tmp_path, max_inline_cocktails=2)
    async with world.service() as service:
        first = await service.inline("acme", world.inline(seed=1, examples=[A]))
        second = await service.inline("acme", world.inline(seed=2, examples=[B]))
        service.catalog.resolve("acme", first.model_id)
        third = await service.inline("other", world.inline(seed=3, examples=[C]))
        with pytest.raises(NotFoundError):
            service.catalog.resolve("acme", second.model_id)
        assert second.recipe.digest in {first.recipe.digest, *world.scoring.forgotten}
        service.catalog.resolve("acme", first.model_id)
    async with world.service() as service:
        await service.inline("acme", world.inline(seed=4))
        service.catalog.resolve("acme", first.model_id)
        with pytest.raises(NotFoundError):
            service.catalog.resolve("other", third.model_id)
    assert len(world.rows("cocktails")) == 2


async def test_an_inline_cocktail_that_fails_tells_why_and_is_tried_again(
    world: World, service: CocktailService
) -> None:
    world.scoring.errors = [InvalidMixError("torn", param="alpha")]
    with pytest.raises(InvalidMixError, match="torn") as caught:
        await service.inline("acme", world.inline())
    assert caught.value.param == "alpha"
    assert (await service.inline("acme", world.inline())).recipe


async def test_an_inline_cocktail_that_takes_too_long_asks_to_come_again(
    world: World, service: CocktailService
) -> None:
    world.scoring.gate.clear()
    with pytest.raises(ModelNotReadyError):
        await service.inline("acme", world.inline(), timeout_s=0.01)
    world.scoring.gate.set()
    served = await service.inline("acme", world.inline())
    assert len(world.scoring.visits_to("base")) == 1, "the first request's job went on"
    assert served.recipe


async def test_examples_that_do_not_fit_leave_nothing_behind(world: World, service: CocktailService) -> None:
    long = {"input": "x" * 50, "output": "y"}
    with pytest.raises(ContextLengthError, match="row 2"):
        await service.create("acme", world.request(examples=[A, long]))
    with pytest.raises(ContextLengthError, match="row 2"):
        await service.dry_run("acme", world.request(examples=[A, long]))
    assert service.catalog.list("acme") == []
    assert [world.rows(table) for table in ("cocktails", "examples", "items", "losses")] == [[], [], [], []]


async def test_a_job_waits_for_an_engine_that_is_not_ready(world: World, service: CocktailService) -> None:
    world.scoring.errors = [ModelNotReadyError("restarting") for _ in range(8)]
    assert (await made(service, world.request())).status == "ready"
    assert world.scoring.errors == []


async def test_a_job_gives_up_on_an_engine_that_keeps_failing(world: World, service: CocktailService) -> None:
    world.scoring.errors = [EngineError("the engine died") for _ in range(30)]
    failed = await made(service, world.request())
    assert (failed.status, failed.error.code, failed.error.type) == ("failed", "engine_error", "EngineError")
    assert len(world.scoring.errors) >= 30 - 3 * QUICK.engine_failures
    world.scoring.errors.clear()
    assert service.catalog.get("acme", failed.id).error == failed.error, "it stays readable"
    retried, existed = await service.create("acme", world.request())
    assert (existed, retried.id, retried.error) == (False, failed.id, None)
    assert (await service.wait("acme", retried.id, 10.0)).status == "ready"


async def test_a_job_gives_up_on_an_engine_that_never_gets_ready(world: World) -> None:
    world.scoring.errors = [ModelNotReadyError("starting") for _ in range(10_000)]
    retry_policy = RetryPolicy(for_capacity_s=0.02, first_delay_s=0.001, max_delay_s=0.005)
    async with world.service(retry_policy=retry_policy) as service:
        failed = await made(service, world.request())
        assert (failed.status, failed.error.code) == ("failed", "model_not_ready")


async def test_an_engine_that_is_down_holds_up_no_other_pool(
    world: World, service: CocktailService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocktail_serve.cocktails.jobs.MAX_RUNNING", 1)
    world.scoring.gate.clear()
    first, _ = await service.create("acme", world.request("first"))
    second, _ = await service.create("acme", world.request("second"))
    assert (await made(service, world.request("third", pool="mini"))).status == "ready"
    assert service.catalog.get("acme", first.id).status == "scoring"
    assert service.catalog.get("acme", second.id).status == "queued"
    assert service.catalog.statuses() == {"ready": 1, "scoring": 1, "queued": 1}
    world.scoring.gate.set()
    assert (await service.wait("acme", second.id, 10.0)).status == "ready"


class Ledger:
    """Takes note of what it is told of seconds, by model."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []

    def add(self, tenant: str, key_id: str | None, model: str, pool: str, use: UsageAmount) -> None:
        self.told.append((model, use.scoring_s))


@pytest.mark.parametrize("end", ["ready", "failed", "cancelled", "deleted"])
async def test_what_engines_worked_is_counted_once_however_a_job_ends(world: World, end: str) -> None:
    ledger = Ledger()
    async with world.service(ledger=ledger) as service:
        world.scoring.gate.clear()
        created, _ = await service.create("acme", world.request())
        await until(lambda: world.scoring.num_waiting == 3)
        await asyncio.sleep(0.05)
        assert ledger.told == []
        if end == "failed":
            del world.scoring.loss_of["fp-flan-ag-news"]
        if end == "cancelled":
            await service.cancel("acme", created.id)
        elif end == "deleted":
            await service.delete("acme", created.id)
        else:
            world.scoring.gate.set()
            assert (await service.wait("acme", created.id, 10.0)).status == end
        await until(lambda: bool(ledger.told))
    ((model, scoring_s),) = ledger.told
    assert model == created.id
    assert 3 * 0.04 <= scoring_s < 10, "three models at once, and each counts"


async def test_a_dry_run_is_counted_under_its_pool(world: World) -> None:
    ledger = Ledger()
    async with world.service(ledger=ledger) as service:
        await service.dry_run("acme", world.request())
    ((model, scoring_s),) = ledger.told
    assert model == "flan"
    assert scoring_s > 0


async def test_a_fault_of_ours_fails_the_job_alone(world: World, service: CocktailService) -> None:
    del world.scoring.loss_of["fp-flan-ag-news"]
    failed = await made(service, world.request())
    assert (failed.status, failed.error.code) == ("failed", "internal_error")
    assert "fp-flan" not in failed.error.message
    assert (await made(service, world.request("fine", merging_weights={"nq": 1.0}))).status == "ready"


async def test_a_loss_that_is_not_finite_names_the_model_and_is_not_kept(
    world: World, service: CocktailService
) -> None:
    world.scoring.loss_of["fp-flan-nq"] = math.nan
    failed = await made(service, world.request())
    assert failed.status == "failed"
    assert "'nq'" in failed.error.message
    assert all("fp-flan-nq" not in row for row in world.rows("losses"))


async def test_cancel_keeps_the_cocktail_and_the_same_request_starts_it_again(
    world: World, service: CocktailService
) -> None:
    world.scoring.gate.clear()
    created, _ = await service.create("acme", world.request())
    await until(lambda: service.catalog.get("acme", created.id).status == "scoring")
    cancelled = await service.cancel("acme", created.id)
    assert cancelled.status == "cancelled"
    assert (await service.wait("acme", created.id, 1.0)).status == "cancelled"
    world.scoring.gate.set()
    assert (await made(service, world.request())).status == "ready"
    assert (await service.cancel("acme", created.id)).status == "ready", "what is ready stays"
    assert len(world.rows("cocktails")) == 1


async def test_wait_returns_at_its_timeout_and_at_the_end(world: World, service: CocktailService) -> None:
    world.scoring.gate.clear()
    created, _ = await service.create("acme", world.request())
    assert not (await service.wait("acme", created.id, 0.0)).is_final
    assert not (await service.wait("acme", created.id, 0.01)).is_final
    waiting = asyncio.create_task(service.wait("acme", created.id, 60.0))
    world.scoring.gate.set()
    assert (await asyncio.wait_for(waiting, 10.0)).status == "ready"


async def test_a_disconnect_never_cancels(world: World, service: CocktailService) -> None:
    request = world.request()
    caller = asyncio.create_task(service.create("acme", request))
    await until(lambda: bool(service._shield._running) or caller.done())
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await until(lambda: bool(service.catalog.list("acme")))
    assert (await service.wait("acme", "films", 10.0)).status == "ready"


async def test_progress_never_goes_back_and_is_on_disk_before_it_shows(world: World, service: CocktailService) -> None:
    world.scoring.gate.clear()
    created, _ = await service.create("acme", world.request())
    seen: list[tuple[str, float]] = []

    async def look() -> None:
        while not seen or seen[-1][0] != "ready":
            shown = service.catalog.get("acme", created.id)
            with sqlite3.connect(world.path) as connection:
                row = connection.execute("select status, progress from cocktails").fetchone()
            assert row[1] >= shown.progress
            seen.append((shown.status, shown.progress))
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    world.scoring.gate.set()
    await asyncio.wait_for(looking, 20.0)
    assert [progress for _, progress in seen] == sorted(progress for _, progress in seen)
    assert {"scoring", "mixing", "ready"} <= {status for status, _ in seen}


async def test_a_full_disk_is_a_storage_error_and_leaves_nothing_behind(world: World) -> None:
    async with world.service() as service:
        await made(service, world.request())
        before = [world.rows(table) for table in ("cocktails", "examples", "items", "losses")]

        def fill_the_disk(connection: Any, _record: Any, _proxy: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("pragma max_page_count = 1")
            cursor.close()

        engine = service._store._database._engine.sync_engine
        event.listen(engine, "checkout", fill_the_disk)
        rows = [{"input": f"{number} " * 10, "output": "y" * 9000} for number in range(4)]
        with pytest.raises(StorageError, match="disk is full"):
            await service.create("acme", world.request("big", examples=rows))
        assert [world.rows(table) for table in ("cocktails", "examples", "items", "losses")] == before
        with pytest.raises(NotFoundError):
            service.catalog.get("acme", "big")
        assert service.catalog.resolve("acme", "films").model_id, "what is there is served on"


async def test_a_job_whose_store_refuses_ends_as_failed_for_those_who_wait(
    world: World, service: CocktailService, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.scoring.gate.clear()
    created, _ = await service.create("acme", world.request())

    async def refuse(cocktail: Cocktail, **_: Any) -> None:
        raise StorageError("the disk is full")

    await until(lambda: service.catalog.get("acme", created.id).status == "scoring")
    with monkeypatch.context() as patch:
        patch.setattr(service._store, "update", refuse)
        world.scoring.gate.set()
        failed = await service.wait("acme", created.id, 10.0)
    assert (failed.status, failed.error.code) == ("failed", "storage_error")
    assert (await made(service, world.request())).status == "ready", "the same request tries again"


async def test_the_hot_path_needs_no_event_loop(world: World) -> None:
    async with world.service() as service:
        ready = await made(service, world.request())
        resolved = await asyncio.get_running_loop().run_in_executor(None, service.catalog.resolve, "acme", "films")
        assert resolved.recipe == ready.recipe


async def test_what_failed_is_removed_after_its_time_and_nothing_else(
    world: World, service: CocktailService, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = 0.0
    start = service.catalog.now()
    monkeypatch.setattr(service.catalog, "_clock", lambda: start + days * 86_400)
    ready = await made(service, world.request("ready"))
    world.scoring.errors = [InvalidMixError("torn")]
    failed = await made(service, world.request("failed", examples=[C]))
    world.scoring.gate.clear()
    cancelled, _ = await service.create("acme", world.request("cancelled", examples=[B, C]))
    await service.cancel("acme", cancelled.id)
    world.scoring.gate.set()
    days = 29.0
    await service._sweep()
    assert {cocktail.name for cocktail in service.catalog.list("acme")} == {"ready", "failed", "cancelled"}
    world.scoring.errors = [InvalidMixError("torn again")]
    assert (await made(service, world.request("failed", examples=[C]))).status == "failed"
    days = 31.0
    await service._sweep()
    assert {cocktail.name for cocktail in service.catalog.list("acme")} == {"ready", "failed"}, "asked for two days ago"
    days = 60.0
    await service._sweep()
    assert [cocktail.id for cocktail in service.catalog.list("acme")] == [ready.id]
    assert {row[0] for row in world.rows("examples")} == {ready.uid}
    assert failed.uid not in {row[0] for row in world.rows("items")}


async def test_retention_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, retention={"failed_days": None})
    async with world.service() as service:
        world.scoring.errors = [InvalidMixError("torn")]
        failed = await made(service, world.request())
        monkeypatch.setattr(service.catalog, "_clock", lambda: failed.created_at + 1e9)
        await service._sweep()
        assert service.catalog.get("acme", failed.id).status == "failed"
