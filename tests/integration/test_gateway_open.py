"""A server on loopback asks for no key: keys that are sent, limits and pools hold, and a proxy does not open it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.command_line import answer, exit_code, write_config
from tests.gateways import live_gateway
from tests.tenants import ADMIN, Tenants, ask, code_of, make


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    with live_gateway(tmp_path_factory.mktemp("open"), admin_key=ADMIN) as live:
        tenants = Tenants(live, [])
        yield tenants
        for client in tenants.clients:
            client.close()


@pytest.fixture
def stranger(tenants: Tenants) -> httpx.Client:
    return tenants.client(None)


def test_a_key_is_its_tenants(tenants: Tenants, stranger: httpx.Client) -> None:
    ours = tenants.of("acme")
    make(ours, "secret-plans")
    make(stranger, "everybodys")
    assert {"secret-plans", "everybodys"} & {model["id"] for model in ours.get("/v1/models").json()["data"]} == {
        "secret-plans"
    }
    assert ask(ours, "everybodys").status_code == ask(stranger, "secret-plans").status_code == 404
    assert ask(tenants.of("acme", "use"), "secret-plans").status_code == 200
    refused = tenants.of("acme", "use").delete("/v1/cocktails/secret-plans")
    assert (refused.status_code, code_of(refused)) == (403, "permission_denied")


def test_a_key_that_is_none_is_refused(tenants: Tenants) -> None:
    made = tenants.key("ended")
    assert tenants.admin.delete(f"/admin/keys/{made['id']}").status_code == 200
    for key in ("sk-wrong", made["key"], f"{ADMIN}x"):
        refused = tenants.client(key).get("/v1/models")
        assert (refused.status_code, code_of(refused)) == (401, "invalid_api_key")
        assert "send 'none' where a client insists on one" in refused.json()["error"]["message"]
    with openai.OpenAI(base_url=tenants.live.base_url, api_key="none") as client:
        assert client.models.list().data


def test_limits_hold(tenants: Tenants, stranger: httpx.Client) -> None:
    tenants.admin.put("/admin/tenants/limited", json={"limits": {"requests_per_minute": 3}})
    ours = tenants.of("limited")
    assert [ask(ours, "flan").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(stranger, "flan").status_code == 200
    tenants.admin.put("/admin/tenants/default", json={"limits": {"requests_per_minute": 1}})
    assert [ask(stranger, "flan").status_code for _ in range(2)] == [200, 429]
    tenants.admin.put("/admin/tenants/default", json={"limits": None})


def test_pools_hold(tenants: Tenants, stranger: httpx.Client) -> None:
    for name, http in (("narrow", tenants.of("narrow")), ("default", stranger)):
        tenants.admin.put(f"/admin/tenants/{name}", json={"pools": ["bge"]})
        assert [pool["id"] for pool in http.get("/v1/pools").json()["data"]] == ["bge"], name
        assert ask(http, "flan").status_code == 404, name
    tenants.admin.put("/admin/tenants/default", json={"pools": None})
    assert ask(stranger, "flan").status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP"])
def test_a_proxy_does_not_open_it_to_the_world(tenants: Tenants, stranger: httpx.Client, header: str) -> None:
    through = {header: "203.0.113.7"}
    for response in (
        stranger.get("/v1/models", headers=through),
        stranger.post("/v1/chat/completions", content=b"{", headers=through),
        stranger.post("/v1/cocktails", json={}, headers=through),
    ):
        assert (response.status_code, code_of(response)) == (403, "permission_denied")
        assert "Set server.auth: required" in response.json()["error"]["message"]
    assert tenants.of("acme").get("/v1/models", headers=through).status_code == 200
    assert stranger.get("/ready", headers=through).status_code == 200


def test_a_proxy_that_keeps_strangers_out_is_said_to(tmp_path: Path) -> None:
    with live_gateway(tmp_path, server={"auth": "off"}) as live:
        headers = {"X-Forwarded-For": "203.0.113.7"}
        assert httpx.get(f"{live.url}/v1/models", headers=headers).status_code == 200


def test_keys_of_the_command_line_work_at_once(
    tenants: Tenants, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, store={"cache_dir": str(tenants.live.settings.store.cache_dir)})
    made = answer(capsys, "keys", "create", "--config", config, "--tenant", "typed")
    http = tenants.client(made["key"])
    make(http, "typed-in")
    assert ask(http, "typed-in").status_code == 200
    assert exit_code("keys", "create", "--config", config, "--tenant", "typed") == 0
    assert "server.auth: required" in capsys.readouterr().err
