"""What `/metrics` shows. Labels are bounded: routes by template, pools and replicas by configuration, never a model or
a tenant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cocktail_serve.build import versions
from cocktail_serve.cocktails.cocktail import Status
from cocktail_serve.engines.snapshot import EngineSnapshot
from cocktail_serve.engines.stats import Histogram as PlainHistogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_ENGINE = ["pool", "replica"]

RESIDENT_DIGITS = 13
"""Of a recipe's digest, as the number in `cocktail_resident`: as many as a float holds exactly, so that a router that
knows the digest finds the replica, and no label grows with the recipes."""


class GatewayMetrics:
    """The counters of one app, in a registry of its own so that several apps live in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._asked = _SnapshotCollector()
        self._registry.register(self._asked)
        ProcessCollector(registry=self._registry)
        build = Info(
            "cocktail_build", "1 for what serves: its release, its commit, what computes.", registry=self._registry
        )
        build.info({_label(name): found for name, found in versions().items() if found is not None})
        self._requests = Counter(
            "cocktail_requests",
            "Answers by route, status at their end and pool; status 499: the client left first.",
            ["route", "status", "pool"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "cocktail_tokens", "Tokens read (in) and generated (out).", ["pool", "direction"], registry=self._registry
        )
        self._first_token = Histogram(
            "cocktail_time_to_first_token_seconds",
            "From the request's arrival to the first bytes of its answer; of embeddings, to the whole answer.",
            ["pool"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._latency = Histogram(
            "cocktail_request_latency_seconds",
            "From the arrival of a request to a model to the end of its answer, where that is whole, with status 200.",
            ["pool"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def count_request(self, *, route: str, status: int, pool: str, seconds: float) -> None:
        """An answer that has ended.

        Args:
            status: of the error that it broke off with, where it did.
            pool: of the model asked for; empty: none was, or none that is known.
            seconds: since the request arrived.
        """
        self._requests.labels(route, str(status), pool).inc()
        if pool and status == 200:
            self._latency.labels(pool).observe(seconds)

    def count_tokens(self, pool: str, *, num_in: int, num_out: int = 0) -> None:
        self._tokens.labels(pool, "in").inc(num_in)
        self._tokens.labels(pool, "out").inc(num_out)

    def observe_first_token(self, pool: str, seconds: float) -> None:
        self._first_token.labels(pool).observe(seconds)

    def render(
        self,
        engines: Mapping[str, EngineSnapshot],
        jobs: Mapping[Status, int],
        *,
        server_metrics: Mapping[str, Sequence[Mapping[str, float]]],
    ) -> bytes:
        """The text exposition format.

        Args:
            engines: by pool, as they are now.
            jobs: number of cocktails in each state, inline ones included.
            server_metrics: by pool, as `GenerationEngine.server_metrics`.
        """
        self._asked.engines = engines
        self._asked.server_metrics = server_metrics
        self._asked.jobs = jobs
        return generate_latest(self._registry)


class _SnapshotCollector(Collector):
    """What is read when it is asked for, instead of counted here."""

    def __init__(self) -> None:
        self.engines: Mapping[str, EngineSnapshot] = {}
        self.jobs: Mapping[Status, int] = {}
        self.server_metrics: Mapping[str, Sequence[Mapping[str, float]]] = {}

    def collect(self) -> Iterable[Metric]:
        yield from self._counted()
        yield from self._held()
        yield from self._of_servers()
        jobs = GaugeMetricFamily("cocktail_jobs", "Cocktails of all tenants by state.", labels=["status"])
        for status, number in self.jobs.items():
            jobs.add_metric([status], number)
        yield jobs

    def _each(self) -> Iterator[tuple[list[str], EngineSnapshot]]:
        """Each engine with its labels."""
        for pool, engine in self.engines.items():
            for number, replica in enumerate(engine.each):
                yield [pool, str(number)], replica

    def _counted(self) -> Iterator[Metric]:
        wait = HistogramMetricFamily(
            "cocktail_queue_wait_seconds", "From a request's arrival to its recipe's turn.", labels=_ENGINE
        )
        swap = HistogramMetricFamily(
            "cocktail_swap_seconds", "Each mix that made another recipe resident.", labels=_ENGINE
        )
        mix = HistogramMetricFamily(
            "cocktail_mix_seconds", "The mixing alone, of each mix that the engine reports.", labels=_ENGINE
        )
        lookups = CounterMetricFamily(
            "cocktail_cache_lookups", "Parameters of a mixture found in memory or not.", labels=[*_ENGINE, "result"]
        )
        swaps = CounterMetricFamily(
            "cocktail_swaps", "Mixes, by where parameters came from.", labels=[*_ENGINE, "source"]
        )
        drained = CounterMetricFamily("cocktail_drained", "Streams that outlived drain_s.", labels=_ENGINE)
        timeouts = CounterMetricFamily(
            "cocktail_queue_timeouts", "Requests whose recipe's turn did not come in time.", labels=_ENGINE
        )
        restarts = CounterMetricFamily("cocktail_engine_restarts", "Engines lost and started again.", labels=_ENGINE)
        for labels, engine in self._each():
            stats = engine.counters
            wait.add_metric(labels, _buckets(stats.wait), sum_value=stats.wait.total)
            swap.add_metric(labels, _buckets(stats.swap), sum_value=stats.swap.total)
            mix.add_metric(labels, _buckets(stats.mix), sum_value=stats.mix.total)
            lookups.add_metric([*labels, "hit"], stats.num_cache_hits)
            lookups.add_metric([*labels, "miss"], stats.num_cache_misses)
            for source, number in stats.num_swaps_by_source.items():
                swaps.add_metric([*labels, source], number)
            drained.add_metric(labels, stats.num_drained)
            timeouts.add_metric(labels, stats.num_queue_timeouts)
            restarts.add_metric(labels, stats.num_restarts)
        yield from (wait, swap, mix, lookups, swaps, drained, timeouts, restarts)

    def _held(self) -> Iterator[Metric]:
        is_ready = GaugeMetricFamily("cocktail_engine_ready", "1 where the engine answers.", labels=_ENGINE)
        queued = GaugeMetricFamily("cocktail_queued_requests", "Requests that wait for their turn.", labels=_ENGINE)
        cached = GaugeMetricFamily("cocktail_cached_recipes", "Mixtures kept in memory.", labels=_ENGINE)
        cached_bytes = GaugeMetricFamily("cocktail_cache_bytes", "Size of the mixtures in memory.", labels=_ENGINE)
        captured = GaugeMetricFamily(
            "cocktail_captured_experts", "Models kept in the engine's layout, to be mixed in place.", labels=_ENGINE
        )
        mixing = GaugeMetricFamily(
            "cocktail_mixing_path",
            "1 for how parameters reach the engine, and what merges them.",
            labels=[*_ENGINE, "path", "kernel"],
        )
        resident = GaugeMetricFamily(
            "cocktail_resident",
            "The recipe whose parameters are in the engine: the first 13 hexadecimal digits of its digest as a number.",
            labels=_ENGINE,
        )
        for labels, engine in self._each():
            if engine.resident is not None:
                resident.add_metric(labels, int(engine.resident[:RESIDENT_DIGITS], 16))
            is_ready.add_metric(labels, engine.state == "ready")
            queued.add_metric(labels, engine.num_queued)
            if "cached" in engine.detail:
                cached.add_metric(labels, len(engine.detail["cached"]))
            if "cached_bytes" in engine.detail:
                cached_bytes.add_metric(labels, engine.detail["cached_bytes"])
            if "captured" in engine.detail:
                captured.add_metric(labels, len(engine.detail["captured"]))
            if "mixing_kernel" in engine.detail:
                mixing.add_metric([*labels, engine.detail["mixing_path"], engine.detail["mixing_kernel"]], 1)
        yield from (is_ready, resident, queued, cached, cached_bytes, captured, mixing)

    def _of_servers(self) -> Iterator[Metric]:
        """Under the names that the servers give them, and vLLM's label `model_name`, which is the pool: what is drawn
        for vLLM draws these."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for labels, name, value in self._server_values():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            if name not in families:
                families[name] = family(name, "As the pool's own server says.", labels=[*_ENGINE, "model_name"])
            families[name].add_metric(labels, value)
        yield from families.values()

    def _server_values(self) -> Iterator[tuple[list[str], str, float]]:
        for pool, replicas in self.server_metrics.items():
            for number, values in enumerate(replicas):
                for name, value in values.items():
                    yield [pool, str(number), pool], name, value


def _label(name: str) -> str:
    """A label for a distribution's name; our own is the `version`."""
    return "version" if name == "cocktail-serve" else name.replace("-", "_")


def _buckets(histogram: PlainHistogram) -> list[tuple[str, float]]:
    """Prometheus counts in each bucket what lies in the lower ones too."""
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
    return buckets
