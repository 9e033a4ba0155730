"""What the operator does while the server runs: looks into engines, pins and drains them, adds and removes experts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateways import EXAMPLES, PAIRS, LiveGateway, live_gateway
from tests.models import make_decoder, make_encoder

ADMIN = "the-operators-own"
MESSAGES = [{"role": "user", "content": "what is the capital of france"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gateway's folder: real pico models for both pools, and `roots` with more of them."""
    folder = tmp_path_factory.mktemp("operating")
    make_decoder(folder / "decoder")
    make_decoder(folder / "roots" / "decoder-new", perturbation_seed=7)
    make_decoder(folder / "roots" / "decoder-wide", hidden_size=32, head_dim=16)
    make_encoder(folder / "roots" / "encoder-new", perturbation_seed=7)
    make_encoder(folder / "elsewhere", perturbation_seed=8)
    linked = folder / "roots" / "encoder-linked"
    shutil.copytree(folder / "elsewhere", linked)
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(folder / "elsewhere" / "model.safetensors")
    (folder / "roots" / "link").symlink_to(folder / "elsewhere", target_is_directory=True)
    return folder


@contextmanager
def running(folder: Path, **sections: Any) -> Iterator[tuple[LiveGateway, httpx.Client]]:
    server = {"expert_roots": [str(folder / "roots")]}
    with (
        live_gateway(folder, server=server, admin_key=ADMIN, **sections) as live,
        httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {ADMIN}"}, timeout=60) as http,
    ):
        yield live, http


@pytest.fixture(scope="module")
def operated(folder: Path) -> Iterator[httpx.Client]:
    with running(folder, engine={"args": {"faults": str(folder / "faults"), "token_delay_ms": "10"}}) as (_, http):
        # the pool of the configuration is one model three times
        made(http.post("/admin/pools/flan/experts", json={"name": "other", "path": "decoder-new"}))
        yield http


def made(response: httpx.Response) -> Any:
    assert response.is_success, response.text
    return response.json()


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def chat(http: httpx.Client, model: str, max_tokens: int = 5) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES, "max_tokens": max_tokens})


def embedding(http: httpx.Client, model: str) -> list[float]:
    vector: list[float] = made(http.post("/v1/embeddings", json={"model": model, "input": "paris"}))["data"][0][
        "embedding"
    ]
    return vector


class TestEngines:
    def test_an_engine_shows_what_it_holds_and_who_waits(self, operated: httpx.Client) -> None:
        made(
            operated.post(
                "/v1/cocktails?wait=30",
                json={"name": "mine", "pool": "flan", "merging_weights": {"base": 0.5, "other": 0.5}},
            )
        )
        made(operated.post("/admin/engines/flan", json={"pin": "flan"}))
        made(operated.post("/admin/engines/flan", json={"pin": None}))
        with ThreadPoolExecutor() as clients:
            long = clients.submit(chat, operated, "flan", 100)
            until(lambda: engine(operated)["in_flight"] == 1)
            waiting = clients.submit(chat, operated, "mine")
            until(lambda: engine(operated)["queues"])
            seen = engine(operated)
            assert long.result().status_code == waiting.result().status_code == 200
        assert seen["state"] == "ready"
        assert {"id": "flan", "tenant": None} in seen["resident"]["models"]
        (queue,) = seen["queues"]
        assert (queue["waiting"], queue["reason"]) in {(1, "turn_ends"), (1, "other_turn")}
        assert [model["id"].partition("@")[0] for model in queue["models"]] == ["mine"]
        assert queue["models"][0]["tenant"] == "default"
        after = engine(operated)
        assert after["swaps"] >= 1
        assert after["last_swap_s"] is not None  # uvloop's clock may not see a swap of less than 1 ms

    def test_the_list_holds_every_pool(self, operated: httpx.Client) -> None:
        engines = {engine["id"]: engine for engine in made(operated.get("/admin/engines"))["data"]}
        assert set(engines) == {"flan", "bge"}
        assert engines["bge"]["phase"] is engines["bge"]["resident"] is None

    def test_a_pinned_model_is_served_and_others_are_told_to_come_again(self, operated: httpx.Client) -> None:
        made(
            operated.post(
                "/v1/cocktails?wait=30",
                json={"name": "pinned", "pool": "flan", "merging_weights": {"base": 0.3, "other": 0.7}},
            )
        )
        try:
            pinned = made(operated.post("/admin/engines/flan", json={"pin": "pinned"}))["pinned"]
            assert [model["id"].partition("@")[0] for model in pinned["models"]] == ["pinned"]
            assert chat(operated, "pinned").status_code == 200
            refused = chat(operated, "flan")
            assert error_of(refused)[:2] == (503, "model_not_ready")
            assert 1 <= int(refused.headers["retry-after"]) <= 120
        finally:
            made(operated.post("/admin/engines/flan", json={"pin": None}))
        assert chat(operated, "flan").status_code == 200

    def test_only_a_model_of_the_pool_can_be_pinned_where_there_are_turns(self, operated: httpx.Client) -> None:
        assert error_of(operated.post("/admin/engines/flan", json={"pin": "bge"}))[0] == 400
        assert error_of(operated.post("/admin/engines/flan", json={"pin": "nothing"}))[0] == 404
        assert error_of(operated.post("/admin/engines/bge", json={"pin": "bge"}))[0] == 400
        assert error_of(operated.post("/admin/engines/nothing", json={}))[0] == 404
        assert error_of(operated.post("/admin/engines/flan", json={"spin": 1}))[0] == 400

    @pytest.mark.parametrize("pool", ["flan", "bge"])
    def test_a_drained_engine_finishes_and_lets_nobody_in(self, operated: httpx.Client, pool: str) -> None:
        ask = chat if pool == "flan" else embed
        with ThreadPoolExecutor() as clients:
            long = clients.submit(chat, operated, "flan", 100)
            until(lambda: engine(operated)["in_flight"] == 1)
            try:
                assert made(operated.post(f"/admin/engines/{pool}", json={"drain": True}))["drained"]
                refused = ask(operated, pool)
                assert error_of(refused)[:2] == (503, "model_not_ready")
                assert "retry-after" in refused.headers
                assert long.result().status_code == 200
            finally:
                made(operated.post(f"/admin/engines/{pool}", json={"drain": False}))
        assert ask(operated, pool).status_code == 200

    def test_it_is_the_operators_alone(self, operated: httpx.Client) -> None:
        for method, path in (
            ("GET", "/admin/engines"),
            ("GET", "/admin/engines/flan"),
            ("POST", "/admin/engines/flan"),
            ("GET", "/admin/pools/flan/experts"),
            ("POST", "/admin/pools/flan/experts"),
            ("DELETE", "/admin/pools/flan/experts/nq"),
        ):
            answer = operated.request(method, path, headers={"authorization": "Bearer none"})
            assert answer.status_code == 401, path


class TestExperts:
    @pytest.mark.parametrize(
        ("path", "status"),
        [
            ("../elsewhere", 403),
            ("{folder}/elsewhere", 403),
            ("{folder}/nothing-there", 403),
            ("/etc", 403),
            ("link", 403),
            ("encoder-linked", 403),
            ("missing", 400),
            ("encoder-new/model.safetensors", 400),
            ("a\0b", 400),
        ],
    )
    def test_only_what_lies_under_the_roots(self, operated: httpx.Client, folder: Path, path: str, status: int) -> None:
        body = {"name": "sneaky", "path": path.format(folder=folder)}
        assert operated.post("/admin/pools/bge/experts", json=body).status_code == status

    def test_what_cannot_be_mixed_is_told_by_tensor(self, operated: httpx.Client) -> None:
        body = {"name": "wide", "path": "decoder-wide"}
        status, code, message = error_of(operated.post("/admin/pools/flan/experts", json=body))
        assert (status, code) == (422, "incompatible_models")
        assert "hidden_size" in message or "embed_tokens" in message
        assert "wide" not in made(operated.get("/v1/pools")).__str__()

    def test_names_that_are_taken_or_none(self, operated: httpx.Client) -> None:
        taken = operated.post("/admin/pools/bge/experts", json={"name": "quora", "path": "encoder-new"})
        assert error_of(taken)[0] == 409
        assert taken.headers["x-should-retry"] == "false"
        for name in ("base", "Up", "a/b", ""):
            refused = operated.post("/admin/pools/bge/experts", json={"name": name, "path": "encoder-new"})
            assert error_of(refused)[0] == 400
        assert error_of(operated.post("/admin/pools/no/experts", json={"name": "a", "path": "b"}))[0] == 404
        assert error_of(operated.delete("/admin/pools/bge/experts/quora"))[0] == 409

    def test_nothing_is_added_where_no_roots_are_set(self, tmp_path: Path) -> None:
        with (
            live_gateway(tmp_path, admin_key=ADMIN) as live,
            httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {ADMIN}"}) as http,
        ):
            body = {"name": "new", "path": str(tmp_path)}
            assert error_of(http.post("/admin/pools/bge/experts", json=body))[:2] == (403, "permission_denied")


def test_an_expert_comes_stays_and_goes(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(folder, home, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    with running(home) as (live, http):
        old = made(http.post("/v1/cocktails?wait=30", json={"name": "old", "pool": "bge", "examples": PAIRS}))
        before = embedding(http, "old")
        scored = _count_embedded(live)
        expert = made(http.post("/admin/pools/bge/experts", json={"name": "new", "path": "encoder-new"}))
        assert (expert["id"], expert["source"]) == ("bge/new", "admin")
        again = http.post("/admin/pools/bge/experts", json={"name": "new", "path": "encoder-new"})
        assert again.status_code == 200
        (event,) = made(http.get("/admin/audit", params={"action": "expert.added"}))["data"]
        assert (event["subject"], event["actor"]["key"]) == ("bge/new", "admin"), "once, though it was asked twice"
        assert event["detail"]["fingerprint"] == expert["fingerprint"]
        # what was there is what it was
        assert made(http.get(f"/v1/cocktails/{old['id']}"))["status"] == "ready"
        assert embedding(http, "old") == before
        assert "bge/new" in {model["id"] for model in made(http.get("/v1/models"))["data"]}
        assert embedding(http, "bge/new") != before
        scored.clear()
        new = made(http.post("/v1/cocktails?wait=30", json={"name": "fresh", "pool": "bge", "examples": PAIRS}))
        assert set(new["merging_weights"]) == {"base", "hotpotqa", "quora", "new"}
        models = {digest for digest, is_background in scored if is_background}
        assert models == {_one_hot(live, "new"), new["recipe"]["digest"]}, "only the new expert and the mixture"
        assert (
            made(http.post("/v1/cocktails?wait=30", json={"name": "old", "pool": "bge", "examples": PAIRS}))["id"]
            != old["id"]
        )
        fresh = embedding(http, "fresh")
        decoder = made(http.post("/admin/pools/flan/experts", json={"name": "new", "path": "decoder-new"}))
        assert decoder["fingerprint"] not in {expert["fingerprint"]}
        # the engine's server, which was started before, mixes it
        by_hand = {"name": "hand", "pool": "flan", "merging_weights": {"base": 0.5, "new": 0.5}}
        made(http.post("/v1/cocktails?wait=30", json=by_hand))
        assert chat(http, "hand").status_code == 200
    with running(home) as (_, http):
        assert embedding(http, "bge/new") is not None
        assert embedding(http, "fresh") == fresh
        assert embedding(http, old["id"]) == before
        assert chat(http, "hand").status_code == 200
        assert chat(http, "flan/new").status_code == 200
        listed = {each["name"]: each["source"] for each in made(http.get("/admin/pools/bge/experts"))["data"]}
        assert listed == {"hotpotqa": "config", "quora": "config", "new": "admin"}
        used = http.delete("/admin/pools/bge/experts/new")
        assert error_of(used)[:2] == (409, "expert_in_use")
        made(http.delete("/admin/pools/bge/experts/new?force=true"))
        assert error_of(http.post("/v1/embeddings", json={"model": "bge/new", "input": "a"}))[0] == 404
        assert "no longer has" in error_of(http.post("/v1/embeddings", json={"model": "fresh", "input": "a"}))[2]
        assert embedding(http, old["id"]) == before
        assert (home / "roots" / "encoder-new" / "model.safetensors").exists()
        assert http.delete("/admin/pools/bge/experts/new").status_code == 404
    # gone from the disk: left out, and the server starts
    shutil.rmtree(home / "roots" / "decoder-new")
    with running(home) as (_, http):
        assert {each["name"] for each in made(http.get("/admin/pools/flan/experts"))["data"]} == {"ag-news", "nq"}
        assert chat(http, "flan").status_code == 200


def test_a_job_that_runs_while_an_expert_comes_goes_on(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(folder, home, symlinks=True, ignore=shutil.ignore_patterns("cache"))
    with running(home, engine={"args": {"score_ms": "300"}}) as (_, http):
        queued = made(http.post("/v1/cocktails", json={"name": "slow", "pool": "flan", "examples": EXAMPLES}))
        made(http.post("/admin/pools/flan/experts", json={"name": "new", "path": "decoder-new"}))
        assert made(http.get(f"/v1/cocktails/{queued['id']}"))["status"] in ("queued", "scoring", "mixing")
        until(lambda: made(http.get(f"/v1/cocktails/{queued['id']}"))["status"] == "ready")
        assert "new" not in made(http.get(f"/v1/cocktails/{queued['id']}"))["merging_weights"]


def engine(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = made(http.get("/admin/engines/flan"))
    return found


def embed(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/embeddings", json={"model": model, "input": "paris"})


def until(condition: Any, deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def _count_embedded(live: LiveGateway) -> set[tuple[str, bool]]:
    """Recipes that the encoder engine is asked for from now on, and whether for scoring."""
    engine = live.app.state.gateway.engines["bge"]
    asked: set[tuple[str, bool]] = set()
    whole = engine.embed

    async def counting(recipe: Any, *args: Any, **options: Any) -> Any:
        asked.add((recipe.digest, options.get("background", False)))
        return await whole(recipe, *args, **options)

    engine.embed = counting
    return asked


def _one_hot(live: LiveGateway, name: str) -> str:
    from cocktail_serve.recipe import one_hot

    engine = live.app.state.gateway.engines["bge"]
    return one_hot(engine.pool, name, dtype=engine.dtype).digest
