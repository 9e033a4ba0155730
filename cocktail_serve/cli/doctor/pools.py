"""A pool: its models, and whether its engine starts with them. What passes here, starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from cocktail_serve.cli.doctor.finding import Check, tried
from cocktail_serve.config import PoolConfig, Settings, VLLMEngineConfig
from cocktail_serve.pool import Pool
from cocktail_serve.progress import OnProgress


def check_pool(settings: Settings, config: PoolConfig, report: OnProgress, pools: dict[str, Pool]) -> Iterator[Check]:
    """Opens a pool, and goes through its engine's start as far as that is possible without serving.

    Args:
        pools: the pool is put here, where it can be opened.
    """
    name = f"pool {config.id}"
    warnings: list[str] = []
    yield tried(name, lambda: _check(settings, config, report, pools, warnings))
    pool = pools.get(config.id)
    for warning in (*(() if pool is None else pool.warnings), *warnings):
        yield Check(name, "warning", warning)
    if pool is not None and (reason := config.engine.reason_of_mode(pool)) is not None:
        yield Check(f"{name}: mode", "ok", f"{pool.mode}: {reason}{_held(pool)}")
    if pool is not None and isinstance(config.engine, VLLMEngineConfig) and config.engine.type == "vllm":
        from cocktail_serve.cli.doctor.replicas import check_replicas

        yield from check_replicas(pool, config.engine)
    if pool is not None and pool.kind in ("decoder", "encoder_decoder"):
        scored = tried(f"{name}: examples", lambda: _check_tokenizer(pool), status="warning")
        if scored.status != "ok":
            yield scored


def _check(
    settings: Settings, config: PoolConfig, report: OnProgress, pools: dict[str, Pool], warnings: list[str]
) -> str:
    from cocktail_serve.engines import build_engine, check_installed
    from cocktail_serve.offline.models import check_loads
    from cocktail_serve.offline.opened import open_with_progress

    check_installed(config)
    pool = pools[config.id] = open_with_progress(settings, config, report)
    with tempfile.TemporaryDirectory() as run_dir:
        engine = build_engine(pool, config, run_dir=Path(run_dir))
        if config.engine.type == "vllm":
            check_loads(pool)
        report(f"{config.id}: trying the start", 0, 1)
        warnings += engine.check_start()
        report(f"{config.id}: trying the start", 1, 1)
    size = sum(member.num_bytes for member in pool)
    base = "base" if pool.base.quantisation is None else f"base (quantised, {pool.base.quantisation})"
    return (
        f"{pool.kind}, {base} and {len(pool.experts)} experts can be mixed, {size / 1e9:.2f} GB, "
        f"fingerprint {pool.fingerprint[:12]}"
    )


def _held(pool: Pool) -> str:
    """What an engine holds beside the base, where nothing is merged."""
    if pool.mode == "merged":
        return ""
    size = sum(expert.num_bytes for expert in pool.experts.values())
    return f"; their factors, {size / 1e6:,.1f} MB as stored, are held beside the base"


def _check_tokenizer(pool: Pool) -> str:
    """Raises ConfigError where no examples could be scored: a pool may be served without."""
    from cocktail_serve.scoring.tokenizer import load_fast_tokenizer, load_tokenizer

    (load_fast_tokenizer if pool.kind == "decoder" else load_tokenizer)(pool.base.path)
    return "can be scored"
