"""Servers that the endpoint plugin refuses: the real start-up code on stand-ins for vLLM's configuration."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from cocktail_serve.errors import ConfigError
from cocktail_serve.pool import Member, Pool
from vllm_cocktail import routes
from vllm_cocktail.launch import WORKER_EXTENSIONS
from vllm_cocktail.manifest import MANIFEST_VARIABLE, Manifest
from vllm_cocktail.routes import CocktailEndpointPlugin

pytest.importorskip("vllm", reason="the plugin reads vLLM's own environment variables")


@pytest.fixture(autouse=True)
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pool = Pool("flan", "decoder", Member("base", tmp_path, "0" * 64, "float32", 1), {}, "t")
    path = Manifest.of_pool(pool, dtype="float32", cache_bytes=0, managed=True).write(tmp_path / "pool.json")
    monkeypatch.setenv(MANIFEST_VARIABLE, str(path))
    return path


@pytest.fixture(autouse=True)
def takes_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a vLLM that renders responses by the template that they bring, which is not imported here."""
    monkeypatch.setattr(routes, "take_brought_templates", lambda: True)


def config_with(section: str = "", **changes: Any) -> SimpleNamespace:
    parts: dict[str, Any] = {
        "parallel_config": {
            "worker_extension_cls": WORKER_EXTENSIONS["merged"],
            "data_parallel_size": 1,
            "_api_process_count": 1,
        },
        "model_config": {"logprobs_mode": "raw_logprobs"},
        "cache_config": {"kv_sharing_fast_prefill": False},
    }
    if section:
        parts[section] |= changes
    return SimpleNamespace(kv_transfer_config=None, **{name: SimpleNamespace(**part) for name, part in parts.items()})


async def start(config: SimpleNamespace, **args: Any) -> None:
    app, plugin = FastAPI(), CocktailEndpointPlugin()
    plugin.attach_router(app)
    engine: Any = SimpleNamespace(vllm_config=config)
    await plugin.init_state(engine, app.state, Namespace(**args))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_with("parallel_config", worker_extension_cls=""), "--worker-extension-cls"),
        (config_with("parallel_config", worker_extension_cls="mine.Extension"), "--worker-extension-cls"),
        (config_with("parallel_config", data_parallel_size=2), "--data-parallel-size"),
        (config_with("parallel_config", _api_process_count=2), "--api-server-count"),
        (config_with("model_config", logprobs_mode="raw_logits"), "--logprobs-mode"),
        (config_with("cache_config", kv_sharing_fast_prefill=True), "--kv-sharing-fast-prefill"),
    ],
)
async def test_a_server_that_the_fence_cannot_hold_is_refused(config: SimpleNamespace, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        await start(config)


async def test_several_api_servers_are_refused() -> None:
    with pytest.raises(ConfigError, match="--api-server-count"):
        await start(config_with(), api_server_count=4)


@pytest.mark.parametrize("variable", ["VLLM_SERVER_DEV_MODE", "VLLM_ENABLE_RESPONSES_API_STORE"])
async def test_switches_that_open_a_way_around_the_fence_are_refused(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=variable):
        await start(config_with())


async def test_a_missing_manifest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MANIFEST_VARIABLE)
    with pytest.raises(ConfigError, match=MANIFEST_VARIABLE):
        await start(config_with())


async def test_a_server_without_an_engine_is_refused() -> None:
    app, plugin = FastAPI(), CocktailEndpointPlugin()
    plugin.attach_router(app)
    with pytest.raises(ConfigError, match="needs an engine"):
        await plugin.init_state(None, app.state, Namespace())


async def test_the_fence_is_closed_until_the_server_is_ready() -> None:
    app, plugin = FastAPI(), CocktailEndpointPlugin()
    plugin.attach_router(app)
    assert app.state.cocktail_fence.state == "mixing"
    with pytest.raises(ConfigError):
        await plugin.init_state(None, app.state, Namespace())
    assert app.state.cocktail_fence.state == "mixing"


@pytest.mark.parametrize("takes", [True, False])
def test_responses_are_shut_where_their_templates_would_be_left_aside(
    takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "take_brought_templates", lambda: takes)
    app = FastAPI()
    CocktailEndpointPlugin().attach_router(app)
    (fence,) = app.user_middleware
    assert fence.kwargs["shut"].keys() == {"/v1/decisions", *(() if takes else ("/v1/responses",))}
