"""What vLLM counts itself, read from the metrics that its server shows."""

from __future__ import annotations

import re

PATH = "/metrics"

SHOWN = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)
"""Taken from the server as they are: how full it is, which nobody else knows. What the rest counts, requests, tokens
and times, is counted here too, by what clients see of it."""

_SAMPLE = re.compile(rf"^({'|'.join(SHOWN)})(?:\{{[^\n]*\}})? (\S+)", re.MULTILINE)


def parse_server_metrics(text: str) -> dict[str, float]:
    """Values by vLLM's names for them, those of counters with `_total`; what a release does not have is left out.

    Args:
        text: in Prometheus' text format. Samples of one name are summed: a server runs one engine, and has one of each.
    """
    found: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found
