"""What computes: engines behind the seam of `base`, each built only when a pool asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cocktail_serve.build import VLLM_DISTRIBUTIONS
from cocktail_serve.errors import ConfigError
from cocktail_serve.loading import INSTALL_ENCODERS, INSTALL_VLLM, library_loading, version_of

if TYPE_CHECKING:
    from cocktail_serve.config import PoolConfig
    from cocktail_serve.engines.base import AnyEngine
    from cocktail_serve.pool import Pool


def check_installed(config: PoolConfig) -> None:
    """Raises ConfigError where what computes a pool is not installed; says what to install. Imports nothing."""
    needed = {"sentence_transformers": ("sentence-transformers",), "vllm": VLLM_DISTRIBUTIONS}
    distributions = needed.get(config.engine.type, ())
    if distributions and not any(version_of(name) for name in distributions):
        install = INSTALL_VLLM if config.engine.type == "vllm" else INSTALL_ENCODERS
        raise ConfigError(f"pool {config.id!r}: {distributions[0]} is not installed: {install}", param="engine.type")


def build_engine(pool: Pool, config: PoolConfig, *, run_dir: Path) -> AnyEngine:
    """The engine that a pool's configuration asks for; nothing is started.

    Args:
        run_dir: folder for what the engine writes while it runs: logs, the manifest.

    Raises:
        ConfigError: `engine.args` or `engine.env` set what cocktail-serve sets itself; or no engine serves the pool.
    """
    engine = config.served_engine
    if engine.type == "sentence_transformers":
        with library_loading:
            from cocktail_serve.engines.in_process.encoder_engine import EncoderEngine
            from cocktail_serve.engines.in_process.reranker_engine import RerankerEngine

        return RerankerEngine(pool, config) if config.kind == "reranker" else EncoderEngine(pool, config)
    from cocktail_serve.engines.vllm.build import build_decoder_engine

    return build_decoder_engine(pool, engine, run_dir=run_dir)
