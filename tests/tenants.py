"""A gateway that asks for keys, clients by what they may do, and what tenants ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.gateways import EXAMPLES, LiveGateway, live_gateway

ADMIN = "the-operators-own"

MESSAGES = [{"role": "user", "content": "what is the capital of france"}]


@dataclass
class Tenants:
    """A guarded gateway, and clients by what they may do."""

    live: LiveGateway
    clients: list[httpx.Client]

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        client = httpx.Client(base_url=self.live.url, headers=headers, timeout=60)
        self.clients.append(client)
        return client

    @property
    def admin(self) -> httpx.Client:
        return self.client(ADMIN)

    def key(self, tenant: str, *scopes: str, **fields: Any) -> dict[str, Any]:
        body = {"tenant": tenant, **fields} | ({"scopes": list(scopes)} if scopes else {})
        response = self.admin.post("/admin/keys", json=body)
        assert response.status_code == 201, response.text
        key: dict[str, Any] = response.json()
        return key

    def of(self, tenant: str, *scopes: str) -> httpx.Client:
        return self.client(self.key(tenant, *scopes)["key"])


@contextmanager
def guarded_gateway(folder: Path, **sections: Any) -> Iterator[Tenants]:
    """Runs one as `live_gateway` does."""
    with live_gateway(folder, server={"auth": "required"}, admin_key=ADMIN, **sections) as live:
        tenants = Tenants(live, [])
        yield tenants
        for client in tenants.clients:
            client.close()


def make(http: httpx.Client, name: str, **fields: Any) -> dict[str, Any]:
    body = {"name": name, "pool": "flan", "examples": EXAMPLES} | fields
    response = http.post("/v1/cocktails", params={"wait": 30}, json=body)
    assert response.status_code in (200, 201), response.text
    cocktail: dict[str, Any] = response.json()
    return cocktail


def ask(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES, "max_tokens": 4, **fields})


def code_of(response: httpx.Response) -> str:
    code: str = response.json()["error"]["code"]
    return code
