"""Every limit of a tenant over real sockets: what is refused, what the headers say, and that nobody slips through."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.gateways import EXAMPLES, PAIRS
from tests.tenants import MESSAGES, Tenants, ask, code_of, guarded_gateway, make

TOKEN_MS = 20
SCORE_MS = 300

HEADERS = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]

DURATION = re.compile(r"(\d+h)?(\d+m)?\d+(\.\d)?s|\d+ms")


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("limits")
    args = {"faults": str(folder / "faults"), "token-delay-ms": TOKEN_MS, "score-ms": SCORE_MS}
    with guarded_gateway(folder, engine={"args": args}, limits={"requests_per_minute": 1000}) as tenants:
        yield tenants


def limited(tenants: Tenants, name: str, **limits: Any) -> httpx.Client:
    http = tenants.of(name)
    answer = tenants.admin.put(f"/admin/tenants/{name}", json={"limits": limits})
    assert answer.status_code == 200, answer.text
    return http


def check_refused(response: httpx.Response, *, is_permanent: bool = False) -> None:
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert ("x-should-retry" in response.headers) is is_permanent


def stream(http: httpx.Client, **fields: Any) -> Any:
    return http.stream(
        "POST", "/v1/chat/completions", json={"model": "flan", "messages": MESSAGES, "stream": True, **fields}
    )


def num_begun(tenants: Tenants) -> float:
    """Requests to the decoder whose turn has come."""
    shown = httpx.get(f"{tenants.live.url}/metrics").text
    found = re.search(r'^cocktail_queue_wait_seconds_count\{pool="flan",replica="0"\} (\S+)$', shown, re.MULTILINE)
    return float(found[1]) if found else 0.0


@contextmanager
def left_open(http: httpx.Client, **fields: Any) -> Iterator[None]:
    """Asks for a chat, and leaves at the end of the block without having read a byte."""
    request = http.build_request("POST", "/v1/chat/completions", json=fields)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port)) as client:
        client.sendall(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        yield


def body(name: str, *, word: str = "", **fields: Any) -> dict[str, Any]:
    examples = [{"input": f"{word}{example['input']}", "output": "yes"} for example in EXAMPLES]
    return {"name": name, "pool": "flan", "examples": examples, **fields}


def at_once(calls: list[Callable[[], httpx.Response]]) -> list[int]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return sorted(response.status_code for response in threads.map(lambda call: call(), calls))


class TestRequests:
    def test_the_limit_and_its_headers(self, tenants: Tenants) -> None:
        http = limited(tenants, "requests", requests_per_minute=3)
        for remaining in (2, 1, 0):
            answer = ask(http, "flan", max_tokens=1)
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(remaining)
            assert DURATION.fullmatch(answer.headers["x-ratelimit-reset-requests"])
            assert "x-ratelimit-limit-tokens" not in answer.headers
        refused = ask(http, "flan", max_tokens=1)
        check_refused(refused)
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(refused.headers["retry-after"]) <= 20

    @pytest.mark.parametrize(
        ("path", "content"),
        [
            ("/v1/chat/completions", {"model": "flan", "messages": MESSAGES, "max_tokens": 1}),
            ("/v1/completions", {"model": "flan", "prompt": "hi", "max_tokens": 1}),
            ("/v1/embeddings", {"model": "bge", "input": "hi"}),
            ("/v1/cocktails", body("made")),
            ("/v1/cocktails?dry_run=true", body("tried")),
        ],
    )
    def test_what_counts(self, tenants: Tenants, path: str, content: dict[str, Any]) -> None:
        name = "counts" + re.sub(r"\W+", "-", path)
        http = limited(tenants, name, requests_per_minute=1)
        assert http.post(path, json=content).status_code < 300
        check_refused(http.post(path, json=content))
        for read in ("/v1/models", "/v1/cocktails", "/v1/files", "/v1/pools"):
            assert http.get(read).status_code == 200, "reading is free"
        check_refused(http.delete("/v1/cocktails/made"))
        check_refused(http.post("/v1/files", files={"file": ("f.jsonl", b"{}")}, data={"purpose": "fine-tune"}))

    def test_a_request_that_fails_counts_too(self, tenants: Tenants) -> None:
        http = limited(tenants, "failing", requests_per_minute=1)
        unknown = ask(http, "never-made")
        assert unknown.status_code == 404
        assert unknown.headers["x-ratelimit-remaining-requests"] == "0"
        check_refused(ask(http, "flan"))

    def test_defaults_are_the_configurations(self, tenants: Tenants) -> None:
        http = tenants.of("plain")
        assert ask(http, "flan", max_tokens=1).headers["x-ratelimit-limit-requests"] == "1000"
        limited(tenants, "plain", requests_per_minute=None)
        assert "x-ratelimit-limit-requests" not in ask(http, "flan", max_tokens=1).headers
        back = tenants.admin.put("/admin/tenants/plain", json={"limits": None}).json()
        assert (back["limits"]["requests_per_minute"], back["own_limits"]) == (1000, [])

    def test_one_tenants_flood_is_not_anothers(self, tenants: Tenants) -> None:
        flooding, other = limited(tenants, "flood", requests_per_minute=1), tenants.of("other")
        for _ in range(5):
            ask(flooding, "flan", max_tokens=1)
        assert ask(other, "flan", max_tokens=1).status_code == 200

    def test_the_official_client_waits_and_comes_back(self, tenants: Tenants) -> None:
        key = tenants.key("patient")["key"]
        tenants.admin.put("/admin/tenants/patient", json={"limits": {"requests_per_minute": 60}})
        with openai.OpenAI(base_url=tenants.live.base_url, api_key=key, max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                [client.embeddings.create(model="bge", input="hi") for _ in range(70)]
            assert caught.value.code == "rate_limit_exceeded"
            raw = client.with_options(max_retries=3).embeddings.with_raw_response.create(model="bge", input="hi")
            assert raw.retries_taken >= 1
            assert raw.headers["x-ratelimit-limit-requests"] == "60"


class TestTokens:
    def test_corrected_by_what_was_used(self, tenants: Tenants) -> None:
        http = limited(tenants, "tokens", tokens_per_minute=1000)
        answer = ask(http, "flan", max_tokens=2)
        assert [header in answer.headers for header in HEADERS] == [True] * 6
        reserved = 1000 - int(answer.headers["x-ratelimit-remaining-tokens"])
        used = answer.json()["usage"]["total_tokens"]
        assert reserved > used
        # a second's refill is 17 tokens
        after = int(ask(http, "flan", max_tokens=2).headers["x-ratelimit-remaining-tokens"])
        assert 1000 - used - reserved <= after <= 1000 - reserved

    def test_used_up(self, tenants: Tenants) -> None:
        http = limited(tenants, "used-up", tokens_per_minute=20)
        assert ask(http, "flan", max_tokens=30).status_code == 200
        refused = ask(http, "flan", max_tokens=1)
        check_refused(refused)
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"

    @pytest.mark.parametrize("num_texts", [1, 8])
    def test_embeddings_count(self, tenants: Tenants, num_texts: int) -> None:
        http = limited(tenants, f"embedding-{num_texts}", tokens_per_minute=100_000)
        answer = http.post("/v1/embeddings", json={"model": "bge", "input": ["what is a river"] * num_texts})
        used = answer.json()["usage"]["total_tokens"]
        after = http.post("/v1/embeddings", json={"model": "bge", "input": "x"})
        reserved = len(after.request.content) // 4
        left = 100_000 - used - reserved
        assert left <= int(after.headers["x-ratelimit-remaining-tokens"]) <= 100_000 - reserved

    def test_a_refused_request_takes_none(self, tenants: Tenants) -> None:
        http = limited(tenants, "refunded", tokens_per_minute=1000)
        for _ in range(20):
            assert ask(http, "never-made", max_tokens=500).status_code == 404
        assert int(ask(http, "flan", max_tokens=1).headers["x-ratelimit-remaining-tokens"]) > 900

    def test_a_client_that_leaves_a_plain_answer_is_charged_the_estimate(self, tenants: Tenants) -> None:
        http = limited(tenants, "leaving", tokens_per_minute=240, concurrent_requests=1)
        begun = num_begun(tenants)
        with left_open(http, model="flan", messages=MESSAGES, max_tokens=200):
            deadline = time.monotonic() + 20
            while num_begun(tenants) == begun:
                assert time.monotonic() < deadline, "the request did not reach the engine"
                time.sleep(0.02)
        deadline = time.monotonic() + 20
        while (answer := ask(http, "flan", max_tokens=1)).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # 200 and the question were charged, and 4 flow in a second
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 200


class TestConcurrency:
    def test_streams_hold_their_places_until_they_end(self, tenants: Tenants) -> None:
        http = limited(tenants, "streams", concurrent_requests=2)
        with ExitStack() as held:
            streams = [held.enter_context(stream(http, max_tokens=100)) for _ in range(2)]
            assert [answer.status_code for answer in streams] == [200, 200]
            refused = ask(http, "flan")
            check_refused(refused)
            assert int(refused.headers["retry-after"]) == 1
            assert ask(tenants.of("bystander"), "flan", max_tokens=1).status_code == 200
        deadline = time.monotonic() + 20
        while ask(http, "flan", max_tokens=1).status_code == 429:
            assert time.monotonic() < deadline, "the places of clients that left were not freed"
            time.sleep(0.05)

    def test_streams_carry_the_headers(self, tenants: Tenants) -> None:
        http = limited(tenants, "stream-headers", requests_per_minute=10, tokens_per_minute=1000)
        with stream(http, max_tokens=2) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert [header in answer.headers for header in HEADERS] == [True] * 6
            assert answer.headers["x-ratelimit-remaining-requests"] == "9"
            answer.read()

    def test_many_at_once_never_exceed_the_limit(self, tenants: Tenants) -> None:
        http = limited(tenants, "racing", concurrent_requests=3)
        statuses = at_once([lambda: ask(http, "flan", max_tokens=20)] * 8)
        assert statuses.count(200) >= 3
        assert set(statuses) == {200, 429}

    def test_an_error_frees_its_place(self, tenants: Tenants) -> None:
        http = limited(tenants, "erring", concurrent_requests=1)
        for _ in range(5):
            assert ask(http, "flan", priority=1).status_code == 400
            assert ask(http, "never-made").status_code == 404
        assert ask(http, "flan", max_tokens=1).status_code == 200


class TestCocktails:
    def test_the_limit(self, tenants: Tenants) -> None:
        http = limited(tenants, "cocktails", cocktails=2)
        first = make(http, "first")
        make(http, "second")
        refused = http.post("/v1/cocktails", json=body("third"))
        check_refused(refused, is_permanent=True)
        assert "delete one" in refused.json()["error"]["message"]
        assert http.post("/v1/cocktails", json=body("first")).status_code == 200, "the same request is no new one"
        assert http.get("/v1/cocktails").json()["data"][0]["name"] == "second"
        http.delete(f"/v1/cocktails/{first['id']}")
        make(http, "third")

    def test_two_at_once_do_not_both_take_the_last_place(self, tenants: Tenants) -> None:
        http = limited(tenants, "last-place", cocktails=3)
        make(http, "one")
        calls = [lambda i=i: http.post("/v1/cocktails", json=body(f"racing-{i}")) for i in range(6)]
        assert at_once(calls) == [202, 202, 429, 429, 429, 429]
        assert len(http.get("/v1/cocktails").json()["data"]) == 3

    def test_inline_ones_make_room_for_each_other(self, tenants: Tenants) -> None:
        http, other = limited(tenants, "inline", cocktails=2), tenants.of("inline-other")
        kept = ask(other, "flan", max_tokens=1, cocktail={"examples": EXAMPLES}).json()["model"]
        models = [
            ask(http, "flan", max_tokens=1, cocktail={"examples": EXAMPLES, "temperature": temperature}).json()["model"]
            for temperature in (0.1, 0.2, 0.3)
        ]
        assert [ask(http, model, max_tokens=1).status_code for model in models] == [404, 200, 200]
        assert ask(other, kept, max_tokens=1).status_code == 200, "nobody else's went"
        limited(tenants, "inline", cocktails=0)
        check_refused(ask(http, "flan", cocktail={"examples": EXAMPLES, "temperature": 0.4}), is_permanent=True)


class TestExampleBytes:
    def upload(self, http: httpx.Client, num_rows: int, *, word: str = "pear") -> httpx.Response:
        content = b'{"input": "is a %s a fruit?", "output": "yes"}\n' % word.encode() * num_rows
        return http.post("/v1/files", files={"file": ("f.jsonl", content)}, data={"purpose": "fine-tune"})

    def test_files_and_cocktails_count_together(self, tenants: Tenants) -> None:
        http = limited(tenants, "bytes", example_bytes=1000)
        file = self.upload(http, 15)
        assert file.status_code == 200
        assert self.upload(http, 15).status_code == 200, "equal contents are kept once"
        check_refused(self.upload(http, 16), is_permanent=True)
        make(http, "fits")
        refused = http.post("/v1/cocktails", json=body("too-much", word="truly and honestly said, "))
        check_refused(refused, is_permanent=True)
        check_refused(ask(http, "flan", cocktail={"examples": EXAMPLES * 5}), is_permanent=True)
        for entry in http.get("/v1/files").json()["data"]:
            http.delete(f"/v1/files/{entry['id']}")
        make(http, "now")

    def test_two_at_once_do_not_both_fit(self, tenants: Tenants) -> None:
        http = limited(tenants, "bytes-race", example_bytes=300)
        calls = [lambda i=i: http.post("/v1/cocktails", json=body(f"racing-{i}", word=str(i))) for i in range(3)]
        calls += [lambda word=word: self.upload(http, 4, word=word) for word in ("fig", "plum", "kiwi")]
        statuses = at_once(calls)
        assert statuses.count(429) == 5, statuses

    def test_a_refused_creation_leaves_nothing(self, tenants: Tenants) -> None:
        http = limited(tenants, "bytes-nothing", example_bytes=10)
        check_refused(http.post("/v1/cocktails", json=body("never")), is_permanent=True)
        assert http.get("/v1/cocktails").json()["data"] == []
        weights = {"base": 0.5, "nq": 0.5}
        made = http.post("/v1/cocktails", json={"name": "by-hand", "pool": "flan", "merging_weights": weights})
        assert made.status_code in (201, 202), "it has no examples"


class TestScoringJobs:
    def test_the_limit(self, tenants: Tenants) -> None:
        http = limited(tenants, "jobs", scoring_jobs=1)
        running = http.post("/v1/cocktails", json=body("running", word="jobs "))
        assert running.status_code == 202
        refused = http.post("/v1/cocktails", json=body("next", word="more jobs "))
        check_refused(refused)
        assert int(refused.headers["retry-after"]) == 10
        check_refused(http.post("/v1/cocktails", params={"dry_run": "true"}, json=body("dry", word="dry ")))
        check_refused(ask(http, "flan", cocktail={"examples": EXAMPLES, "temperature": 0.7}))
        assert http.post("/v1/cocktails", json=body("running", word="jobs ")).status_code == 200
        make(http, "running", examples=body("", word="jobs ")["examples"])
        assert http.post("/v1/cocktails", json=body("next", word="more jobs ")).status_code == 202

    def test_jobs_and_dry_runs_race_for_the_last_place(self, tenants: Tenants) -> None:
        http = limited(tenants, "jobs-race", scoring_jobs=1)
        calls = [lambda i=i: http.post("/v1/cocktails", json=body(f"racing-{i}", word=f"{i} ")) for i in range(3)]
        calls += [
            lambda i=i: http.post("/v1/cocktails", params={"dry_run": "true"}, json=body("dry", word=f"dry {i} "))
            for i in range(3)
        ]
        assert at_once(calls)[1:] == [429] * 5

    def test_a_dry_run_frees_its_place(self, tenants: Tenants) -> None:
        http = limited(tenants, "dry", scoring_jobs=1)
        for _ in range(2):
            answer = http.post("/v1/cocktails", params={"dry_run": "true"}, json=body("dry"))
            assert answer.status_code == 200
        failing = http.post(
            "/v1/cocktails", params={"dry_run": "true"}, json=body("dry", word="far too long for its context " * 200)
        )
        assert failing.status_code == 400
        assert http.post("/v1/cocktails", params={"dry_run": "true"}, json=body("dry")).status_code == 200

    def test_fine_tuning_jobs_are_no_way_around(self, tenants: Tenants) -> None:
        http = limited(tenants, "fine-tuning")
        content = b'{"input": "is a plum a fruit?", "output": "yes"}\n'
        file = http.post("/v1/files", files={"file": ("f.jsonl", content)}, data={"purpose": "fine-tune"}).json()
        job = {"model": "flan", "training_file": file["id"], "suffix": "fruits"}
        for limits, is_permanent in (
            ({"scoring_jobs": 0}, False),
            ({"cocktails": 0}, True),
            ({"example_bytes": 60}, True),
        ):
            limited(tenants, "fine-tuning", **limits)
            check_refused(http.post("/v1/fine_tuning/jobs", json=job), is_permanent=is_permanent)
            assert http.get("/v1/fine_tuning/jobs").json()["data"] == []
        limited(tenants, "fine-tuning")
        assert http.post("/v1/fine_tuning/jobs", json=job).status_code == 200

    def test_an_encoders_jobs_count_too(self, tenants: Tenants) -> None:
        http = limited(tenants, "encoder-jobs", scoring_jobs=0)
        check_refused(http.post("/v1/cocktails", json={"name": "pairs", "pool": "bge", "examples": PAIRS}))


class TestAdmin:
    @pytest.mark.parametrize(
        ("limits", "param"),
        [
            ({"requests_per_minute": 0}, "limits.requests_per_minute"),
            ({"cocktails": -1}, "limits.cocktails"),
            ({"request_per_minute": 5}, "limits.request_per_minute"),
            ({"tokens_per_minute": "many"}, "limits.tokens_per_minute"),
        ],
    )
    def test_malformed(self, tenants: Tenants, limits: dict[str, Any], param: str) -> None:
        answer = tenants.admin.put("/admin/tenants/malformed", json={"limits": limits})
        assert (answer.status_code, code_of(answer)) == (400, "invalid_request")
        assert answer.json()["error"]["param"] == param

    def test_shown(self, tenants: Tenants) -> None:
        limited(tenants, "shown", cocktails=5, example_bytes="1MB", scoring_jobs=None)
        shown = next(t for t in tenants.admin.get("/admin/tenants").json()["data"] if t["name"] == "shown")
        assert shown["limits"] == {
            "requests_per_minute": 1000,
            "tokens_per_minute": None,
            "concurrent_requests": None,
            "cocktails": 5,
            "example_bytes": 1_000_000,
            "scoring_jobs": None,
        }
        assert shown["own_limits"] == ["cocktails", "example_bytes", "scoring_jobs"]
        tenants.admin.put("/admin/tenants/shown", json={"pools": ["flan"]})
        again = next(t for t in tenants.admin.get("/admin/tenants").json()["data"] if t["name"] == "shown")
        assert again == shown | {"pools": ["flan"]}
