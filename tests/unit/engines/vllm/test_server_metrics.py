"""What is taken of vLLM's own metrics."""

from __future__ import annotations

from cocktail_serve.engines.vllm.server_metrics import parse_server_metrics

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="flan"} 3.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="flan",reason="capacity"} 7.0
vllm:num_requests_waiting{engine="0",model_name="a \\"quoted} name"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="flan"} 0.0625
vllm:num_preemptions_total{engine="0",model_name="flan"} 1.2e+03
vllm:num_preemptions_created{engine="0",model_name="flan"} 1.78e+09
process_open_fds 12.0
"""


def test_those_that_say_how_full_it_is() -> None:
    assert parse_server_metrics(TEXT) == {
        "vllm:num_requests_running": 3.0,
        "vllm:num_requests_waiting": 2.0,
        "vllm:kv_cache_usage_perc": 0.0625,
        "vllm:num_preemptions_total": 1200.0,
    }


def test_a_server_without_them_has_none() -> None:
    assert parse_server_metrics("# EOF\n") == {}
