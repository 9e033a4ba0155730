"""Pages of other origins: what browsers ask and are told, by plain HTTP, and what a real browser makes of it."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from cocktail_serve.config import ServerConfig
from tests.gateways import EXAMPLES, LiveGateway, assert_same_embeddings, live_gateway

ORIGIN = "https://app.example.com"
KEY = "the-operators-own"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
CHAT = {"model": "flan", "messages": [{"role": "user", "content": "what is the capital"}]}

ROUTES = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/v1/models"),
    ("DELETE", "/v1/models/flan@12345678"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/rerank"),
    ("POST", "/v1/files"),
    ("PATCH", "/v1/cocktails/mine"),
    ("PUT", "/admin/tenants/acme"),
]


class PageHandler(http.server.BaseHTTPRequestHandler):
    """Serves one page, whatever is asked."""

    def __init__(self, page: bytes, *args: object) -> None:
        self._page = page
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(self._page)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served_page(script: str) -> Iterator[str]:
    """The origin of a page: one of its own, as its port is."""
    page = f"<!doctype html><pre id=out>nothing</pre><script type=module>{script}</script>".encode()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(PageHandler, page)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    server = {"cors_origins": ["*"]}
    with live_gateway(tmp_path_factory.mktemp("all"), server=server) as live:
        yield live


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """Asks for a key; one origin may call it."""
    server = {"cors_origins": [ORIGIN], "auth": "required"}
    with live_gateway(tmp_path_factory.mktemp("guarded"), server=server, admin_key=KEY) as live:
        yield live


def preflight(live: LiveGateway, method: str, path: str, *, origin: str = ORIGIN) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(f"{live.url}{path}", headers=headers)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_preflight_needs_no_key_on_any_route(guarded: LiveGateway, method: str, path: str) -> None:
    answer = preflight(guarded, method, path)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert method in answer.headers["access-control-allow-methods"].split(", ")
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers


def test_other_origins_are_told_nothing(guarded: LiveGateway) -> None:
    refused = preflight(guarded, "POST", "/v1/embeddings", origin="https://evil.example.com")
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    answer = httpx.get(f"{guarded.url}/health", headers={"origin": "https://evil.example.com"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"


def test_every_answer_may_be_read(guarded: LiveGateway) -> None:
    """Errors of the outermost part as well: a page that cannot read them sees a network failure."""
    with httpx.Client(base_url=guarded.url, headers={"origin": ORIGIN}, timeout=60) as http:
        answers = {
            200: http.get("/v1/models", headers=AUTHORIZED),
            401: http.get("/v1/models"),
            404: http.get("/v1/none"),
            405: http.get("/v1/embeddings"),
            400: http.post("/v1/embeddings", json={"model": "bge"}, headers=AUTHORIZED),
        }
        answers[0] = http.get("/v1/%00")
        with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}, headers=AUTHORIZED) as stream:
            assert stream.read().endswith(b"data: [DONE]\n\n")
            answers[1] = stream
    for status, answer in answers.items():
        assert answer.status_code == {0: 400, 1: 200}.get(status, status)
        assert answer.headers["access-control-allow-origin"] == ORIGIN, status
        assert answer.headers["access-control-expose-headers"] == "*", status
        assert "x-request-id" in answer.headers


def test_a_server_that_stops_says_so_to_pages(tmp_path: Path) -> None:
    with live_gateway(tmp_path, server={"cors_origins": ["*"]}) as live:
        live.app.state.gateway.lifecycle.is_stopping = True
        answer = httpx.get(f"{live.url}/v1/models", headers={"origin": ORIGIN})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (503, "*")
        assert answer.headers["retry-after"]


def test_any_origin_without_credentials(open_to_all: LiveGateway) -> None:
    answer = preflight(open_to_all, "POST", "/v1/chat/completions")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    cookie = {"origin": ORIGIN, "cookie": "a=b"}
    answer = httpx.get(f"{open_to_all.url}/v1/models", headers=cookie)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_a_loopback_server_is_only_for_pages_that_are_named(open_to_all: LiveGateway, guarded: LiveGateway) -> None:
    headers = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-private-network": "true",
    }
    assert httpx.options(f"{open_to_all.url}/v1/models", headers=headers).status_code == 400
    answer = httpx.options(f"{guarded.url}/v1/models", headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")


def test_without_the_setting_nothing_is_said(gateway: LiveGateway) -> None:
    answer = preflight(gateway, "POST", "/v1/embeddings")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    answer = httpx.get(f"{gateway.url}/health", headers={"origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


@pytest.mark.parametrize(
    "origin", ["app.example.com", "https://a.example/", "https://a.example/x", "null", "", "ftp://a"]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin"):
        ServerConfig.model_validate({"cors_origins": [origin]})


def test_origins_are_as_browsers_send_them() -> None:
    assert ServerConfig.model_validate({"cors_origins": ["HTTPS://App.Example.com:8443"]}).cors_origins == [
        "https://app.example.com:8443"
    ]


def test_packed_bodies(gateway: LiveGateway) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    body = {"model": "bge", "input": ["paris", "a dog"]}
    packed = gzip.compress(json.dumps(body).encode())
    with httpx.Client(base_url=gateway.url) as http:
        answer = http.post("/v1/embeddings", content=packed, headers=headers)
        assert_same_embeddings(answer.json(), http.post("/v1/embeddings", json=body).json())
        made = {"name": "packed", "pool": "flan", "examples": EXAMPLES}
        content = gzip.compress(json.dumps(made).encode())
        assert http.post("/v1/cocktails?dry_run=true&wait=30", content=content, headers=headers).status_code == 200
        form = http.build_request(
            "POST", "/v1/files", files={"file": ("a", b'{"input": "a", "output": "b"}')}, data={"purpose": "fine-tune"}
        )
        form_headers = {"content-type": form.headers["content-type"], "content-encoding": "gzip"}
        uploaded = http.post("/v1/files", content=gzip.compress(form.read()), headers=form_headers)
        assert (uploaded.status_code, uploaded.json()["bytes"]) == (200, 29)
        refused = http.post("/v1/embeddings", content=packed[:-3], headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_content_encoding")
        bomb = http.post("/v1/embeddings", content=gzip.compress(bytes(100 * 1024**2)), headers=headers)
        assert (bomb.status_code, bomb.json()["error"]["code"]) == (413, "payload_too_large")


COCKTAIL = {"name": "of-a-page", "pool": "flan", "merging_weights": {"base": 0.5, "nq": 0.5}}

SCRIPT = (
    f"""
const KEY = "{KEY}", CHAT = {json.dumps(CHAT | {"stream": True})}, COCKTAIL = {json.dumps(COCKTAIL)};
"""
    + """
const BASE = new URLSearchParams(location.search).get("base");
const out = document.getElementById("out"), told = {};
const ask = async (name, path, options) => {
  try {
    const answer = await fetch(BASE + path, options);
    const body = await answer.text();
    told[name] = {status: answer.status, id: answer.headers.get("x-request-id"), end: body.slice(-14),
                  location: answer.headers.get("location")};
  } catch (error) { told[name] = String(error); }
};
const json = {"content-type": "application/json", authorization: "Bearer " + KEY, "x-stainless-lang": "js"};
await ask("models", "/v1/models", {headers: {authorization: "Bearer " + KEY}});
await ask("no key", "/v1/models", {});
await ask("stream", "/v1/chat/completions", {method: "POST", headers: json, body: JSON.stringify(CHAT)});
await ask("unknown", "/v1/models/none", {headers: {authorization: "Bearer " + KEY}});
await ask("made", "/v1/cocktails", {method: "POST", headers: json, body: JSON.stringify(COCKTAIL)});
await ask("deleted", "/v1/cocktails/of-a-page", {method: "DELETE", headers: json});
out.textContent = JSON.stringify(told);
"""
)


def seen_by_a_browser(page: str, live: LiveGateway, profile: Path) -> dict[str, Any]:
    """What the page wrote once its requests to a gateway were done."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on the PATH")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        f"{page}/?base={live.url}",
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    told: dict[str, Any] = json.loads(dumped.partition('<pre id="out">')[2].partition("</pre>")[0])
    return told


def test_a_browser(gateway: LiveGateway, tmp_path: Path) -> None:
    """The same page, whose origin one server names and another does not."""
    (tmp_path / "gateway").mkdir()
    with served_page(SCRIPT) as origin:
        assert set(seen_by_a_browser(origin, gateway, tmp_path / "other").values()) == {"TypeError: Failed to fetch"}
        server = {"cors_origins": [origin], "auth": "required"}
        with live_gateway(tmp_path / "gateway", server=server, admin_key=KEY) as live:
            told = seen_by_a_browser(origin, live, tmp_path / "named")
    assert {name: answer["status"] for name, answer in told.items()} == {
        "models": 200,
        "no key": 401,
        "stream": 200,
        "unknown": 404,
        "made": 202,
        "deleted": 200,
    }
    assert all(answer["id"].startswith("req_") for answer in told.values())
    assert told["stream"]["end"] == "data: [DONE]\n\n"
    assert told["made"]["location"].startswith("/v1/cocktails/of-a-page@")
