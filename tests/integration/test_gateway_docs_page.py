"""`/docs` works where no other host can be reached, and behind a proxy's prefix."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.gateways import LiveGateway


@pytest.mark.parametrize("prefix", ["", "/models/of/ours"])
async def test_all_that_the_page_needs_is_here(gateway: LiveGateway, prefix: str) -> None:
    app = Starlette(routes=[Mount(prefix, gateway.app)])  # as a proxy does: the server does not know its prefix
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://a.example") as http:
        page = await http.get(f"{prefix}/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert re.findall(r"(?:https?:)?//[\w.-]+", page.text) == []
        addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text) + re.findall(r'fetch\("([^"]+)"\)', page.text)
        needed = [address for address in addresses if not address.startswith("data:")]
        assert len(needed) == 3
        found = {address: await http.get(urljoin(str(page.url), address)) for address in needed}
        assert {address: answer.status_code for address, answer in found.items()} == dict.fromkeys(needed, 200)
        types = {address: answer.headers["content-type"].partition(";")[0] for address, answer in found.items()}
        assert types == {
            "docs/swagger-ui.css": "text/css",
            "docs/swagger-ui-bundle.js": "text/javascript",
            "openapi.json": "application/json",
        }
        assert "SwaggerUIBundle" in found["docs/swagger-ui-bundle.js"].text
        assert "/v1/cocktails" in found["openapi.json"].json()["paths"]
        assert not [path for path in found["openapi.json"].json()["paths"] if path.startswith("/docs")]
        other = await http.get(f"{prefix}/docs/..%2f__init__.py")
        assert other.status_code in (400, 404)
