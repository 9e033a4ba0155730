"""Two vLLM engines behind one pool, one of which is killed, or both restarted: every answer is its own recipe's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench import invariant
from bench.server import running_server
from cocktail_serve.pool import Mode

pytestmark = pytest.mark.vllm

NUM_ANSWERS, NUM_CLIENTS = 400, 16


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_every_answer_of_two_replicas_is_its_own_recipes_though_one_is_killed(tmp_path: Path, mode: Mode) -> None:
    outcome = invariant.run(
        tmp_path,
        answers=NUM_ANSWERS,
        clients=NUM_CLIENTS,
        slice_s=0.3,
        num_prompts=6,
        mode=mode,
        num_cocktails=8,
        seed=4,
        replicas=2,
        pool_ids=("tied",),
    )
    assert outcome.wrong == []
    assert outcome.answers + outcome.lost == NUM_ANSWERS
    assert outcome.lost <= NUM_CLIENTS, "more than the one that was killed can have held"
    assert outcome.near_ties <= NUM_ANSWERS / 20
    assert outcome.swaps == 0 if mode == "unmerged" else outcome.swaps >= 10


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_are_restarted_under_load_without_a_failed_request(tmp_path: Path) -> None:
    pools = {"tied": invariant.make_pools(tmp_path)["tied"]}
    prompts = invariant.make_prompts(3, seed=5)
    expected = {"tied": invariant.references(pools["tied"], invariant.MIXTURES, prompts)}
    config = invariant.write_config(tmp_path, pools, slice_s=0.3, replicas=2)
    with running_server(config, log=tmp_path / "server.log", env={"COCKTAIL_ADMIN_KEY": "the-operators"}) as server:
        server.http.headers["authorization"] = "Bearer the-operators"
        model_ids = invariant.create_cocktails(server, pools)
        invariant.until_all_replicas_ready(server)
        before = {engine.pid for engine in invariant.engines_of(server)}
        restart = server.post("/admin/engines/tied/restart", {})["restart"]
        answers = 0
        while restart["done"] < 2:
            assert restart["error"] is None
            outcome = asyncio.run(
                invariant.load(f"{server.url}/v1", expected, answers=80, clients=8, seed=answers, model_ids=model_ids)
            )
            assert outcome.wrong == []
            answers += outcome.answers
            restart = server.http.get("/admin/engines/tied").json()["restart"]
        assert answers >= 160
        assert {engine.pid for engine in invariant.engines_of(server)}.isdisjoint(before)
