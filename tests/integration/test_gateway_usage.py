"""Usage over real sockets: what clients counted is what the ledger says; broken answers, isolation, CSV, the audit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.gateways import EXAMPLES, PAIRS, eventually
from tests.tenants import MESSAGES, Tenants, ask, guarded_gateway, make

TOKEN_MS = 20
DEADLINE_S = 30.0

SECRET_WORD = "xylophone"


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("usage")
    args = {"faults": str(folder / "faults"), "token-delay-ms": TOKEN_MS, "score-ms": 50, "mix-ms": 20}
    with guarded_gateway(folder, engine={"args": args}) as tenants:
        yield tenants


def usage(http: httpx.Client, path: str = "/v1/usage", **params: Any) -> list[dict[str, Any]]:
    answer = http.get(path, params=params)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def total(http: httpx.Client) -> dict[str, Any]:
    rows = usage(http, group_by=["pool"])
    return {amount: sum(row[amount] for row in rows) for amount in ("requests", "tokens_in", "tokens_out")}


def stream(http: httpx.Client, **fields: Any) -> Any:
    body = {"model": "flan", "messages": MESSAGES, "stream": True, **fields}
    return http.stream("POST", "/v1/chat/completions", json=body)


def words_in(lines: Iterator[str]) -> int:
    """Words that the chunks of a stream delivered: the fake engine's tokens."""
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    return sum(bool(choice["delta"].get("content")) for chunk in chunks for choice in chunk.get("choices", ()))


def test_a_mixed_load_is_counted_as_its_clients_counted_it(tenants: Tenants) -> None:
    http = tenants.of("load")
    make(http, "films")
    before = total(http)

    def chat(number: int) -> tuple[int, int]:
        fields = {"max_tokens": number % 5 + 1, "n": number % 2 + 1}
        answer = ask(http, ("flan", "films", "flan/nq")[number % 3], **fields).json()["usage"]
        return answer["prompt_tokens"], answer["completion_tokens"]

    def streamed(number: int) -> tuple[int, int]:
        with stream(http, max_tokens=number % 4 + 1, stream_options={"include_usage": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        said = json.loads(lines[-2].removeprefix("data: "))["usage"]
        return said["prompt_tokens"], said["completion_tokens"]

    def embedded(number: int) -> tuple[int, int]:
        body = {"model": "bge", "input": ["what is a river"] * (number % 3 + 1)}
        return http.post("/v1/embeddings", json=body).json()["usage"]["prompt_tokens"], 0

    calls = [(chat, streamed, embedded)[number % 3] for number in range(30)]
    with ThreadPoolExecutor(8) as threads:
        counted = list(threads.map(lambda call: call[1](call[0]), enumerate(calls)))
    eventually(lambda: total(http)["requests"] - before["requests"] == 30, "the count of all of them")
    after = total(http)
    assert after["tokens_in"] - before["tokens_in"] == sum(num_in for num_in, _ in counted)
    assert after["tokens_out"] - before["tokens_out"] == sum(num_out for _, num_out in counted)


def test_reranking_has_tokens_too(tmp_path: Path) -> None:
    with guarded_gateway(tmp_path, reranker=True) as tenants:
        http = tenants.of("ranking")
        answer = http.post("/v1/rerank", json={"model": "ranker", "query": "a river", "documents": ["paris", "fish"]})
        used = answer.json()["usage"]["prompt_tokens"]
        (row,) = usage(http)
        assert (row["model"], row["requests"], row["tokens_in"], row["tokens_out"]) == ("ranker", 1, used, 0)


class TestBrokenAnswers:
    def test_a_client_that_leaves_mid_stream(self, tenants: Tenants) -> None:
        http = tenants.of("leaving")
        with stream(http, max_tokens=200, n=2) as answer:
            lines = answer.iter_lines()
            delivered = words_in(next(lines) for _ in range(20))
        eventually(lambda: total(http)["requests"] == 1, "the count of the broken stream")
        counted = total(http)
        assert delivered <= counted["tokens_out"] < 400
        # the fake engine counts words of the rendered prompt
        assert counted["tokens_in"] == 1 + len(MESSAGES[0]["content"].split())

    @pytest.mark.parametrize("fault", ["stream_error", "stream_cut"])
    def test_an_engine_that_breaks_off(self, tenants: Tenants, fault: str) -> None:
        http = tenants.of(f"broken-{fault}".replace("_", "-"))
        (tenants.live.faults / fault).touch()
        with stream(http, max_tokens=10) as answer:
            delivered = words_in(line for line in answer.iter_lines() if '"error"' not in line)
        assert delivered == 5
        assert total(http) == {"requests": 1, "tokens_in": 7, "tokens_out": 5}

    def test_an_engine_that_is_killed(self, tenants: Tenants) -> None:
        http = tenants.of("killed")
        with stream(http, max_tokens=200) as answer:
            lines = answer.iter_lines()
            delivered = words_in(next(lines) for _ in range(10))
            engine = next(
                child for child in psutil.Process().children(recursive=True) if "--token-delay-ms" in child.cmdline()
            )
            engine.kill()
            delivered += words_in(line for line in lines if '"error"' not in line)
        assert total(http)["tokens_out"] == delivered
        eventually(lambda: http.get("/ready").status_code == 200, "the engine's return")

    def test_usage_stays_hidden_from_who_did_not_ask(self, tenants: Tenants) -> None:
        http = tenants.of("hidden")
        with stream(http, max_tokens=3) as answer:
            assert "usage" not in answer.read().decode()
        with stream(http, max_tokens=3, stream_options={"include_usage": True}) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line and "[DONE]" not in line]
        assert [chunk["usage"] is None for chunk in chunks] == [True, True, True, False]
        each = {"include_usage": True, "continuous_usage_stats": True}
        with stream(http, max_tokens=3, stream_options=each) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line and "[DONE]" not in line]
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]

    def test_a_refused_or_failed_request_uses_nothing(self, tenants: Tenants) -> None:
        http = tenants.of("failing")
        assert ask(http, "never-made").status_code == 404
        assert ask(http, "flan", max_tokens=10_000).status_code == 400
        assert usage(http) == []


class TestJobs:
    def test_scoring_and_mixing_seconds(self, tenants: Tenants) -> None:
        http = tenants.of("jobs")
        cocktail = make(http, "films", examples=[{"input": "seldom seen", "output": "yes"}] * 3)
        eventually(lambda: bool(usage(http)), "the count of the job")
        (row,) = [row for row in usage(http) if row["model"] == cocktail["id"]]
        assert row["requests"] == row["tokens_in"] == row["tokens_out"] == 0
        # base, two experts and the mixture, 50 ms each; reports may add to it
        assert 0.2 <= row["scoring_s"] < 20
        assert 0 < row["mixing_s"] < 20

    def test_an_encoders_job(self, tenants: Tenants) -> None:
        http = tenants.of("encoder-jobs")
        make(http, "pairs", pool="bge", examples=PAIRS)
        eventually(lambda: bool(usage(http)), "the count of the job")
        assert usage(http)[0]["scoring_s"] > 0

    def test_a_job_that_failed_is_counted_too(self, tenants: Tenants) -> None:
        http = tenants.of("failed-jobs")
        (tenants.live.faults / "score_error").write_text("400 not an example")
        body = {"name": "refused", "pool": "flan", "examples": [{"input": "not so", "output": "yes"}] * 3}
        failed = http.post("/v1/cocktails", params={"wait": "30"}, json=body)
        assert (failed.status_code, failed.json()["error"]["message"]) == (400, "not an example")
        eventually(lambda: bool(usage(http)), "the count of the job")
        (row,) = usage(http)
        assert row["model"].startswith("refused@")
        assert 0.04 <= row["scoring_s"] < 20

    def test_a_dry_run_is_counted_under_its_pool(self, tenants: Tenants) -> None:
        http = tenants.of("dry")
        body = {"name": "tried", "pool": "flan", "examples": [{"input": "hardly", "output": "no"}]}
        assert http.post("/v1/cocktails", params={"dry_run": "true"}, json=body).status_code == 200
        (row,) = usage(http)
        assert row["model"] == "flan"
        assert row["scoring_s"] >= 0.1


class TestViews:
    def test_one_tenants_usage_is_not_anothers(self, tenants: Tenants) -> None:
        ours, theirs = tenants.of("views-a"), tenants.of("views-b")
        ask(ours, "flan", max_tokens=3)
        assert usage(theirs) == []
        (row,) = usage(ours)
        assert (row["model"], row["requests"], row["tokens_out"], row["tenant"]) == ("flan", 1, 3, None)
        assert theirs.get("/v1/usage", params={"tenant": "views-a"}).json()["data"] == []
        by_tenant = {row["tenant"]: row for row in usage(tenants.admin, "/admin/usage", group_by="tenant")}
        assert by_tenant["views-a"]["requests"] == 1
        assert "views-b" not in by_tenant
        assert usage(tenants.admin, "/admin/usage", tenant="views-a", group_by="model")[0]["tokens_out"] == 3
        assert ours.get("/admin/usage").status_code == 403

    def test_keys_are_kept_apart(self, tenants: Tenants) -> None:
        keys = [tenants.key("two-keys") for _ in range(2)]
        for number, key in enumerate(keys):
            ask(tenants.client(key["key"]), "flan", max_tokens=number + 1)
        rows = usage(tenants.client(keys[0]["key"]), group_by=["key"])
        assert {row["key"]: row["tokens_out"] for row in rows} == {keys[0]["id"]: 1, keys[1]["id"]: 2}

    def test_csv(self, tenants: Tenants) -> None:
        http = tenants.of("csv")
        ask(http, "flan", max_tokens=3)
        by_format = http.get("/v1/usage", params={"format": "csv"})
        by_accept = http.get("/v1/usage", headers={"accept": "text/csv"})
        assert by_format.headers["content-type"] == "text/csv; charset=utf-8"
        assert by_format.text == by_accept.text
        (row,) = csv.DictReader(io.StringIO(by_format.text))
        assert list(row) == ["day", "model", "requests", "tokens_in", "tokens_out", "scoring_s", "mixing_s"]
        assert (row["model"], row["tokens_out"]) == ("flan", "3")

    @pytest.mark.parametrize(
        ("params", "param"),
        [
            ({"start": "yesterday"}, "start"),
            ({"start": "2026-03-02", "end": "2026-03-01"}, "start"),
            ({"start": "2020-01-01", "end": "2026-03-01"}, "start"),
            ({"group_by": "tenant"}, "group_by.0"),
            ({"format": "xml"}, "format"),
        ],
    )
    def test_malformed(self, tenants: Tenants, params: dict[str, str], param: str) -> None:
        answer = tenants.of("malformed").get("/v1/usage", params=params)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param

    def test_other_days_are_left_out(self, tenants: Tenants) -> None:
        http = tenants.of("days")
        ask(http, "flan", max_tokens=1)
        assert usage(http, end="2026-01-01") == []


def test_who_made_and_deleted_which_recipe(tenants: Tenants) -> None:
    key = tenants.key("audited")
    http = tenants.client(key["key"])
    cocktail = make(http, "films", examples=[*EXAMPLES, {"input": SECRET_WORD, "output": "no"}])
    inline = ask(http, "flan", max_tokens=1, cocktail={"examples": EXAMPLES}).json()["model"]
    http.patch("/v1/cocktails/films", json={"current": cocktail["id"]})
    http.delete("/v1/cocktails/films")
    listed = tenants.admin.get("/admin/audit", params={"tenant": "audited", "order": "asc"})
    events = listed.json()["data"]
    assert [(event["action"], event["subject"]) for event in events] == [
        ("key.created", key["id"]),
        ("cocktail.created", cocktail["id"]),
        ("cocktail.ready", cocktail["id"]),
        ("cocktail.created", inline),
        ("cocktail.ready", inline),
        ("cocktail.pinned", "films"),
        ("cocktail.deleted", cocktail["id"]),
    ]
    assert events[0]["actor"] == {"tenant": "default", "key": "admin"}
    assert {json.dumps(event["actor"], sort_keys=True) for event in events[1:]} == {
        json.dumps({"key": key["id"], "tenant": "audited"}, sort_keys=True)
    }
    ready = events[2]["detail"]
    assert ready["recipe_digest"] == cocktail["recipe"]["digest"]
    assert {expert["model"]: expert["coefficient"] for expert in ready["experts"]} == cocktail["merging_weights"]
    assert events[5]["detail"] == {"current": cocktail["id"]}
    for secret in (SECRET_WORD, "apple", key["key"].split("-", 2)[2]):
        assert secret not in listed.text
    assert http.get("/admin/audit").status_code == 403
    page = tenants.admin.get("/admin/audit", params={"limit": 2}).json()
    assert page["has_more"]
    assert len(page["data"]) == 2
    rest = tenants.admin.get("/admin/audit", params={"after": page["last_id"], "limit": 1000}).json()
    assert page["last_id"] not in [event["id"] for event in rest["data"]]


def test_usage_and_audit_outlive_the_gateway(tmp_path: Path) -> None:
    with guarded_gateway(tmp_path) as first:
        key = first.key("staying")
        assert ask(first.client(key["key"]), "flan", max_tokens=3).status_code == 200
    with guarded_gateway(tmp_path) as second:
        (row,) = usage(second.client(key["key"]))
        assert row["tokens_out"] == 3
        assert second.admin.get("/admin/audit").json()["data"][-1]["subject"] == key["id"]
