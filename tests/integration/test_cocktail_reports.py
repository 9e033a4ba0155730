"""Reports made in the background: after ready, from the examples alone, across restarts, gone with their cocktail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.examples import TextExample
from cocktail_serve.weighting.softmax import softmax_weights
from tests.integration.test_cocktail_service import OTHER_QUERY, QUERY, A, B, C, ScoringEngine, World, made, until

FAR = {"temperature": 0.1}
"""Weights so one-sided that the mixture is the best expert."""


class UnevenEngine(ScoringEngine):
    """Examples tell models apart more or less, so that each fold's mixture is another one."""

    def loss(self, of_model: float, example: TextExample) -> float:
        return of_model * (1 + EASE[example.output])


EASE = {"positive": 0.1, "negative": 0.2, "neutral": 0.4}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path, reports=True)
    world.scoring = UnevenEngine(world.pools["flan"], {"base": 2.0, "ag-news": 1.0, "nq": 3.0})
    return world


@pytest.fixture
async def service(world: World) -> AsyncIterator[CocktailService]:
    async with world.service() as service:
        yield service


async def reported(service: CocktailService, ref: str, tenant: str = "acme") -> Cocktail:
    async with asyncio.timeout(10):
        while True:
            cocktail = await service.report(tenant, ref)
            if cocktail.cross_validation is not None and cocktail.cross_validation.status == "ready":
                return cocktail
            await asyncio.sleep(0.005)


async def test_each_example_is_predicted_by_a_mixture_weighed_without_it(
    world: World, service: CocktailService
) -> None:
    ready = await made(service, world.request(examples=[A, B, C], temperature=0.5))
    findings = (await reported(service, ready.id)).cross_validation
    assert findings is not None
    held_out = []
    for ease in EASE.values():  # three examples are three folds
        factor = 1 + (sum(EASE.values()) - ease) / 2
        losses = {name: world.loss(name) for name in ("base", "ag-news", "nq")}
        weights = softmax_weights({name: loss * factor for name, loss in losses.items()}, temperature=0.5)
        held_out.append(sum(weights[name] * loss for name, loss in losses.items()) * (1 + ease))
    assert findings.held_out_loss == pytest.approx(sum(held_out) / 3)
    assert findings.held_out_loss != pytest.approx(ready.mixed_loss, rel=1e-4)
    assert (findings.num_folds, findings.best_expert) == (3, "ag-news")
    assert findings.best_expert_loss == pytest.approx(ready.losses["ag-news"])
    assert findings.advice == "use"
    assert "ag-news alone loses less here" in (findings.text or "")
    assert f"base {ready.losses['base']:.2f}" in (findings.text or "")


async def test_a_mixture_as_good_as_the_best_expert_is_to_be_used(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(**FAR))
    findings = (await reported(service, ready.id)).cross_validation
    assert findings is not None
    assert findings.advice == "use"
    assert (findings.text or "").endswith("use it")


async def test_ready_does_not_wait_for_the_report(world: World, service: CocktailService) -> None:
    world.scoring.hold_after = 1  # the mixture's own loss is the last that is answered
    ready = await made(service, world.request())
    assert ready.status == "ready"
    assert ready.cross_validation is not None
    assert ready.cross_validation.status == "pending"
    assert service.catalog.resolve("acme", "films").model_id == ready.id
    world.scoring.gate.set()
    assert (await reported(service, ready.id)).status == "ready"


async def test_a_report_survives_a_restart(world: World) -> None:
    world.scoring.hold_after = 1
    async with world.service() as service:
        ready = await made(service, world.request(examples=[A, B, C]))
    world.scoring.gate.set()
    async with world.service() as service:
        found = (await reported(service, ready.id)).cross_validation
    visits = len(world.scoring.visits)
    async with world.service() as service:
        kept = await service.report("acme", ready.id)
    assert kept.cross_validation == found
    assert len(world.scoring.visits) == visits, "a report that is there is not made again"


async def test_models_are_not_scored_again_and_trials_are_forgotten(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(examples=[A, B, C]))
    await reported(service, ready.id)
    assert [len(world.scoring.visits_to(name)) for name in ("base", "ag-news", "nq")] == [1, 1, 1]
    assert ready.recipe is not None
    assert len(set(world.scoring.tried)) == 3
    assert set(world.scoring.forgotten) == set(world.scoring.tried)
    assert ready.recipe.digest not in world.scoring.forgotten


async def test_what_a_search_tried_is_not_scored_again(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(examples=[A, B, C], weighting="search"))
    before = len(world.scoring.visits_to("mixture"))
    findings = (await reported(service, ready.id)).cross_validation
    assert len(world.scoring.visits_to("mixture")) == before
    assert ready.chosen is not None
    assert findings is not None
    assert findings.held_out_loss == pytest.approx(ready.chosen.loss)


async def test_what_learning_held_out_is_the_report(world: World) -> None:
    world.pools["flan"] = world.scoring.pool = replace(world.pools["flan"], mode="unmerged")
    async with world.service() as service:
        ready = await made(service, world.request(examples=[A, B, C], weighting="gradient"))
        before = len(world.scoring.visits_to("mixture"))
        findings = (await reported(service, ready.id)).cross_validation
    assert len(world.scoring.visits_to("mixture")) == before
    assert findings is not None
    assert ready.chosen is not None
    assert findings.held_out_loss == pytest.approx(ready.chosen.loss)
    assert (findings.num_folds, findings.advice) == (3, "use")
    async with world.service() as service:
        kept = service.catalog.get("acme", ready.id)
    assert kept.candidates == ready.candidates, "as it was before the restart"


async def test_an_encoders_folds_are_scored_against_the_passages_of_all(world: World, service: CocktailService) -> None:
    ready = await made(service, world.request(pool="mini", temperature=0.1))
    findings = (await reported(service, ready.id)).cross_validation
    assert findings is not None
    assert (findings.num_folds, findings.best_expert) == (2, "good")
    assert findings.advice == "use"
    passages = {text for row in (QUERY, OTHER_QUERY) for text in (*row["pos"], *row["neg"])}
    of_folds = [set(texts) for model, texts in world.embedding.embedded if model == "mixture"][-2:]
    assert len(of_folds) == 2
    assert all(passages < texts and len(texts) == len(passages) + 1 for texts in of_folds)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"examples": [A]}, "one example cannot be held out"),
        ({"merging_weights": {"base": 0.5, "nq": 0.5}}, "there are no examples"),
        ({"weighting": "blackbox", "budget": 2}, "searched anew"),
    ],
)
async def test_where_nothing_can_be_told_it_says_why(
    world: World, service: CocktailService, options: dict[str, object], why: str
) -> None:
    ready = await made(service, world.request(**options))
    findings = (await reported(service, ready.id)).cross_validation
    assert findings is not None
    assert findings.advice is None
    assert why in (findings.text or "")


async def test_deletion_ends_a_report_and_takes_what_it_kept(world: World, service: CocktailService) -> None:
    world.scoring.hold_after = 1
    ready = await made(service, world.request(examples=[A, B, C]))
    await until(lambda: world.scoring.num_waiting == 1)  # the first fold is at the engine
    await service.delete("acme", ready.id)
    await until(lambda: world.scoring.num_dropped == 1)
    assert [world.rows(table) for table in ("cocktails", "examples", "items", "losses")] == [[], [], [], []]


async def test_an_inline_cocktail_is_looked_into_when_asked(world: World, service: CocktailService) -> None:
    served = await service.inline("acme", world.inline())
    assert service.catalog.get("acme", served.model_id).cross_validation is None
    visits = len(world.scoring.visits)
    await asyncio.sleep(0.05)
    assert len(world.scoring.visits) == visits
    first = await service.report("acme", served.model_id)
    assert first.cross_validation is not None
    assert (await reported(service, served.model_id)).cross_validation is not None


async def test_with_reports_off_they_are_made_when_asked(tmp_path: Path) -> None:
    world = World(tmp_path, reports=False)
    async with world.service() as service:
        ready = await made(service, world.request())
        assert ready.cross_validation is None
        assert (await reported(service, ready.id)).cross_validation is not None
