"""What the tests of vLLM's plugin mix: a pool of real files, and its recipes."""

from __future__ import annotations

from pathlib import Path

from cocktail_serve.checkpoints.opening import open_pool
from cocktail_serve.config import PoolConfig
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe, make_recipe
from tests.models import make_decoder_pool, pool_section


def make_plugin_pool(folder: Path) -> Pool:
    """`base`, `red` and `green`, made and opened."""
    folders = make_decoder_pool(folder, ("red", "green"))
    config = PoolConfig.model_validate(pool_section("pico", "decoder", folders, {"type": "vllm"}))
    return open_pool(config, cache_dir=folder / "cache")


def recipe_of(pool: Pool, **merging_weights: float) -> Recipe:
    """A linear recipe in the dtype of the files."""
    return make_recipe(pool, merging_weights, dtype="float32")
