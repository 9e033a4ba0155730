"""The engine of a decoder pool with its turns: whether its recipes take them, by which numbers, and how many it is."""

from __future__ import annotations

from pathlib import Path

from cocktail_serve.config import DEVICE_VARIABLES, VLLMEngineConfig
from cocktail_serve.engines.base import GenerationEngine
from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.replicas.engine import ReplicatedEngine
from cocktail_serve.engines.replicas.placement import ResidentPlacement, SharedPlacement
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.turns.base import Turns
from cocktail_serve.engines.turns.exclusive import PATIENCE_SLICES, ExclusiveTurns
from cocktail_serve.engines.turns.shared import SharedTurns
from cocktail_serve.engines.vllm.engine import VLLMEngine
from cocktail_serve.engines.vllm.example_tokens import ExampleTokens
from cocktail_serve.errors import ConfigError
from cocktail_serve.pool import Pool
from cocktail_serve.scoring.tokenizer_cache import TOKENIZERS
from vllm_cocktail.launch import is_cpu_build

BACKGROUND_DELAY_SLICES = 2.0
"""Slices that scoring lets traffic go ahead; see `turns.policy`."""

PATIENCE_SHARE = 0.25
"""How much of `queue_timeout_s` a tenant in line goes without at most, before it is next whatever it was served."""

MAX_IN_FLIGHT = 256
MAX_IN_FLIGHT_CPU = 32
"""Requests inside the engine at once where the configuration does not say. A GPU decodes hundreds in the time of one;
on a CPU each more makes the step longer for all, and in vLLM's own queue no tenant could go before another."""

MAX_BESIDE_CPU = 5
"""Requests of one tenant inside the engine beside others that ask for less, on a CPU, where each makes the step longer
for all; `bench.rows` measures what more and fewer cost (docs/benchmarks.md)."""


def build_decoder_engine(pool: Pool, config: VLLMEngineConfig, *, run_dir: Path) -> GenerationEngine:
    """The engine of a decoder pool: one, or as many as its configuration says behind one; nothing is started.

    Each of several has a folder of its own, `{pool}.{number}` in `run_dir`; they share the tokenizer of examples, and
    what they know of tenants: fairness is over all of them.

    Raises:
        ConfigError: as `build_vllm_engine`.
    """
    if config.replicas == 1:
        return build_vllm_engine(pool, _on_its_devices(config, 0), run_dir=run_dir)
    served_tokens = ServedTokensByTenant()
    tokens = ExampleTokens(pool, kept=run_dir / TOKENIZERS)
    replicas = [
        build_vllm_engine(
            pool,
            _on_its_devices(config, number),
            run_dir=run_dir / f"{pool.id}.{number}",
            served_tokens=served_tokens,
            tokens=tokens,
            replica=number,
        )
        for number in range(config.replicas)
    ]
    shares_batch = pool.mode == "unmerged"
    return ReplicatedEngine(replicas, SharedPlacement() if shares_batch else ResidentPlacement(slice_s=config.slice_s))


def build_vllm_engine(
    pool: Pool,
    config: VLLMEngineConfig,
    *,
    run_dir: Path,
    served_tokens: ServedTokensByTenant | None = None,
    tokens: ExampleTokens | None = None,
    replica: int | None = None,
) -> VLLMEngine:
    """An engine whose recipes share a batch where the pool is served unmerged, and take turns otherwise; nothing is
    started.

    Args:
        pool, config, run_dir, tokens, replica: as `VLLMEngine`.
        served_tokens: what tenants were served, where several engines are to treat them alike.

    Raises:
        ConfigError: `args` or `env` set what is set here, or what cannot be read here.
    """
    stats = EngineStats()
    turns: Turns
    if pool.mode == "unmerged":
        turns = SharedTurns(
            max_in_flight=_max_in_flight(config),
            max_beside=_max_beside(config),
            served_tokens=served_tokens,
            stats=stats,
        )
    else:
        turns = ExclusiveTurns(
            slice_s=config.slice_s,
            drain_s=config.drain_s,
            background_delay_s=BACKGROUND_DELAY_SLICES * config.slice_s,
            patience_s=min(PATIENCE_SLICES * config.slice_s, PATIENCE_SHARE * config.queue_timeout_s),
            max_in_flight=_max_in_flight(config),
            served_tokens=served_tokens,
            stats=stats,
        )
    return VLLMEngine(pool, config, turns=turns, stats=stats, run_dir=run_dir, tokens=tokens, replica=replica)


def _on_its_devices(config: VLLMEngineConfig, number: int) -> VLLMEngineConfig:
    """What the configuration says of one replica."""
    if not config.devices:
        return config
    variable = DEVICE_VARIABLES["cpu" if is_cpu_build() else "gpu"]
    return config.model_copy(update={"env": {**config.env, variable: config.devices[number]}})


def _max_in_flight(config: VLLMEngineConfig) -> int:
    if config.max_concurrency is not None:
        return config.max_concurrency
    max_num_seqs = config.argument("max-num-seqs")
    if max_num_seqs is not None:
        try:
            return int(max_num_seqs)
        except (TypeError, ValueError):
            raise ConfigError(
                f"engine.args.max-num-seqs must be a number of requests, got {max_num_seqs!r}",
                param="engine.args.max-num-seqs",
            ) from None
    return MAX_IN_FLIGHT_CPU if _is_on_cpu(config) else MAX_IN_FLIGHT


def _max_beside(config: VLLMEngineConfig) -> int | None:
    if config.max_concurrency_beside is not None:
        return config.max_concurrency_beside
    return MAX_BESIDE_CPU if _is_on_cpu(config) else None


def _is_on_cpu(config: VLLMEngineConfig) -> bool:
    return config.type == "vllm" and is_cpu_build()
