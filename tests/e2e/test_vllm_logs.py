"""What real vLLM writes down of requests: nothing of what they say, whether they are answered, refused or cut off; and
what it counts of them."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cocktail_serve.engines.vllm.server_metrics import SHOWN
from tests.conftest import Stack

pytestmark = pytest.mark.vllm

MARK = "zanzibar"
"""A word that nothing else in a log has."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_no_log_of_the_engine_holds_a_prompt(stack: Stack) -> None:
    text = f"tell me about {MARK} and {MARK}"
    messages = [{"role": "user", "content": text}]
    http = stack.server.http
    asked = [
        (CHAT, {"model": "tied", "messages": messages, "max_tokens": 4}),
        (COMPLETIONS, {"model": "tied", "prompt": text, "max_tokens": 4}),
        (COMPLETIONS, {"model": "tied", "prompt": text * 200, "max_tokens": 4}),
        (COMPLETIONS, {"model": "tied", "prompt": text, "max_tokens": 4, "temperature": MARK}),
        (COMPLETIONS, {"model": "tied", "prompt": [text, 5], "max_tokens": 4}),
        (
            COMPLETIONS,
            {"model": "tied", "prompt": text, "guided_json": MARK, "structured_outputs": {"regex": f"({MARK}"}},
        ),
        (CHAT, {"model": "tied", "messages": [{"role": MARK, "content": text}]}),
        (CHAT, {"model": "tied", "messages": messages, "tools": [{"type": MARK}]}),
        (CHAT, {"model": "tied", "messages": messages, "chat_template_kwargs": {MARK: MARK}, "max_tokens": 4}),
        (CHAT, {"model": "tied", "messages": messages, "logit_bias": {MARK: 1}}),
    ]
    statuses = [http.post(path, json=body).status_code for path, body in asked]
    assert statuses[:2] == [200, 200]
    assert 400 in statuses
    body = {"model": "tied", "prompt": text, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with http.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())  # and leaves
    examples = [{"input": text, "output": MARK}]
    dry = http.post("/v1/cocktails?dry_run=true", json={"name": "logged", "pool": "tied", "examples": examples})
    assert dry.status_code == 200, dry.text
    logs = list(stack.server.log.parent.rglob("*.log"))
    assert {log.name for log in logs} >= {"server.log", "tied.log"}
    for log in logs:
        held = [line for line in log.read_text(errors="replace").splitlines() if MARK in line]
        assert held == [], log.name


def test_what_vllm_counts_is_passed_on(stack: Stack) -> None:
    body = {"model": "tied", "prompt": "a text of some words", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with stack.server.http.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())
        text = stack.server.http.get("/metrics").text
    counted = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("pool") == "tied" and sample.name.startswith("vllm:")
    }
    assert set(counted) == set(SHOWN)  # every name is one that this release of vLLM has
    assert 0 <= counted["vllm:kv_cache_usage_perc"] <= 1
    assert counted["vllm:prefix_cache_queries_total"] > 0
