"""What `/metrics` shows: all that an operator needs, under labels of which there are only so many."""

from __future__ import annotations

import platform
import random
import string

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cocktail_serve.loading import version_of

WANTED = {
    "cocktail_requests_total",
    "cocktail_tokens_total",
    "cocktail_time_to_first_token_seconds_count",
    "cocktail_request_latency_seconds_count",
    "cocktail_queue_wait_seconds_count",
    "cocktail_swaps_total",
    "cocktail_swap_seconds_sum",
    "cocktail_mix_seconds_sum",
    "cocktail_cache_lookups_total",
    "cocktail_cache_bytes",
    "cocktail_jobs",
    "cocktail_engine_ready",
    "cocktail_resident",
    "cocktail_queued_requests",
    "cocktail_build_info",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
}


def samples(http: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }


def test_all_of_it_is_there_and_counts(http: httpx.Client) -> None:
    before = samples(http)
    # examples of its own: what another test on this gateway had scored and left resident would be mixed no more
    examples = [{"input": f"is {word} a vegetable?", "output": "yes"} for word in ("leek", "kale", "beet")]
    body = {"name": "metered", "pool": "flan", "examples": examples}
    assert http.post("/v1/cocktails?wait=30", json=body).json()["status"] == "ready"
    messages = [{"role": "user", "content": "hi"}]
    chat = {"model": "metered", "messages": messages, "max_tokens": 5}
    assert http.post("/v1/chat/completions", json=chat).status_code == 200
    assert http.post("/v1/embeddings", json={"model": "bge/quora", "input": "a"}).status_code == 200
    after = samples(http)
    assert {name for name, _ in after} >= WANTED

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert grown("cocktail_requests_total", route="/v1/chat/completions", status="200", pool="flan") == 1
    assert grown("cocktail_tokens_total", pool="flan", direction="out") == 5
    assert grown("cocktail_time_to_first_token_seconds_count", pool="flan") == 1
    assert grown("cocktail_request_latency_seconds_count", pool="flan") == 1
    first_token_s = grown("cocktail_time_to_first_token_seconds_sum", pool="flan")
    assert grown("cocktail_request_latency_seconds_sum", pool="flan") >= first_token_s
    assert grown("cocktail_queue_wait_seconds_count", pool="flan", replica="0") == 1
    assert grown("cocktail_swap_seconds_count", pool="flan", replica="0") >= 1
    assert grown("cocktail_mix_seconds_count", pool="flan", replica="0") >= 1
    # a hit where another test on this gateway mixed the same recipe before
    engine = {"pool": "flan", "replica": "0"}
    assert sum(grown("cocktail_cache_lookups_total", result=result, **engine) for result in ("hit", "miss")) >= 1
    assert grown("cocktail_jobs", status="ready") >= 1


def test_what_an_engines_server_counts_is_passed_on_by_its_pool(http: httpx.Client) -> None:
    """Under vLLM's own names and label, so that what is drawn for vLLM draws it; the encoder has no server."""
    of_servers = {labels for name, labels in samples(http) if name.startswith("vllm:")}
    assert of_servers == {(("model_name", "flan"), ("pool", "flan"), ("replica", "0"))}


def test_it_says_which_build_it_is(http: httpx.Client) -> None:
    (labels,) = (dict(labels) for name, labels in samples(http) if name == "cocktail_build_info")
    assert labels["version"] == http.get("/health").json()["version"]
    assert labels["torch"] == version_of("torch")
    assert labels["python"] == platform.python_version()


def test_labels_stay_bounded_whatever_is_asked(http: httpx.Client) -> None:
    """Two hundred names, paths, keys, methods and ids that nobody has."""
    pick = random.Random(0)

    def word() -> str:
        return "".join(pick.choices(string.ascii_lowercase + string.digits, k=12))

    before = set(samples(http))
    words = []
    for _ in range(200):
        words.append(made := word())
        headers = {"authorization": f"Bearer {pick.choice([word(), 'none'])}", "x-request-id": word()}
        kind = pick.randrange(6)
        if kind == 0:
            http.get(f"/{made}/{word()}", headers=headers)
        elif kind == 1:
            http.post("/v1/chat/completions", json={"model": made, "messages": []}, headers=headers)
        elif kind == 2:
            http.post("/v1/embeddings", json={"model": f"bge/{made}", "input": "a"}, headers=headers)
        elif kind == 3:
            http.get(f"/v1/models/{made}", headers=headers)
        elif kind == 4:
            http.delete(f"/v1/cocktails/{made}@12345678", headers=headers)
        else:
            http.request(made.upper(), f"/v1/cocktails/{made}", headers=headers)
    after = samples(http)
    text = repr(sorted(after))
    assert not [made for made in words if made in text]
    routes = {dict(labels)["route"] for name, labels in after if name == "cocktail_requests_total"}
    assert "unknown" in routes
    assert len(set(after) - before) <= 40, "a route, status and pool each, and no more with every name"
