"""What the control routes do to an engine whose recipes share a batch: load experts, report."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from cocktail_serve.errors import ConfigError, EngineError, InvalidMixError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.calls import ask_all, recipe_error
from vllm_cocktail.fence import Fence
from vllm_cocktail.manifest import Manifest
from vllm_cocktail.reload_check import ask
from vllm_cocktail.replies import MixReply, StatusReply, UnmergedWorker
from vllm_cocktail.unmerged.binding import require_rows
from vllm_cocktail.unmerged.row import ROW_ARG

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

# a child of vLLM's logger, whose handlers and level it so shares
logger = logging.getLogger("vllm.cocktail.control")


class EveryRecipe(Collection[str]):
    """What such an engine serves: any recipe that a request brings the coefficients of."""

    def __contains__(self, recipe_digest: object) -> bool:
        return isinstance(recipe_digest, str)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class UnmergedControl:
    """The door to an engine that holds the experts' factors beside the base.

    Args:
        engine: vLLM's engine client.
        fence: the fence in front of it.
        manifest: the experts.
    """

    def __init__(self, engine: EngineClient, fence: Fence, manifest: Manifest) -> None:
        self.engine = engine
        self.fence = fence
        self.manifest = manifest
        self._loaded: frozenset[str] = frozenset()
        self._loading = asyncio.Lock()

    async def start(self) -> None:
        """Has a request of all experts go through every layer that they adapt, and opens the fence.

        Raises:
            ConfigError: vLLM computes a layer otherwise, or the worker extension is missing; says what to start
                differently.
        """
        try:
            held: UnmergedWorker = await ask_all(self.engine, "cocktail_probe")
            everything = {
                ROW_ARG: [part for expert in held["experts"] for part in (expert, 1.0 / len(held["experts"]))]
            }
            await ask(self.engine, xargs=everything)
            held = await ask_all(self.engine, "cocktail_check_layers")
        except EngineError as error:
            raise ConfigError(f"vllm_cocktail: {error.message}") from error
        require_rows(self.engine)
        self._loaded = frozenset(held["experts"])
        logger.info(
            "cocktail: %d experts, %.1f MiB of factors, product by %s%s",
            len(held["experts"]),
            held["factor_bytes"] / 2**20,
            held["kernel"],
            f" ({held['kernel_because']})" if held["kernel_because"] else "",
        )
        self.fence.open(EveryRecipe())

    async def require_loaded(self, recipe: Recipe) -> None:
        """Has the workers load what experts of a recipe they lack: they were added while the server runs.

        Raises:
            InvalidMixError: code `invalid_recipe`: the pool has no such expert.
            CheckpointError, IncompatibleModelsError, ModelChangedError, NotFiniteError: its files cannot be served.
        """
        if self._lacking(recipe):
            async with self._loading:
                if lacking := self._lacking(recipe):
                    await self._load(lacking)

    async def mix(self, recipe: Recipe, *, drain_s: float) -> MixReply:
        """Refuses: nothing is merged here."""
        raise InvalidMixError(
            "this engine's recipes share a batch: send the recipe with each request (vllm_xargs.cocktail_recipe)",
            param="recipe",
        )

    async def forget(self, recipe_digest: str) -> None:
        """Nothing is kept of a recipe."""

    async def status(self) -> StatusReply:
        """What the fence and the workers hold. Asks the workers through the engine: a hung engine gives no answer.

        Raises:
            EngineError: the workers could not answer, or disagree.
        """
        held: UnmergedWorker = await ask_all(self.engine, "cocktail_probe")
        return {
            "resident": None,
            "state": self.fence.state,
            "in_flight": self.fence.in_flight,
            "mixing_path": "unmerged",
            "streams_because": held["kernel_because"],
            "captured": held["experts"],
            "captured_bytes": held["factor_bytes"],
            "mixing_kernel": held["kernel"],
            "cached": [],
            "cached_bytes": 0,
            "cache_bytes": 0,
            "weight_version": None,
            "model_dtype": self.manifest.dtype,
            "managed": self.fence.managed,
        }

    def _lacking(self, recipe: Recipe) -> list[str]:
        return [f for f in recipe.task_vector_coefficients if f not in self._loaded]

    async def _load(self, fingerprints: list[str]) -> None:
        try:
            held: UnmergedWorker = await ask_all(self.engine, "cocktail_load", json.dumps(fingerprints))
        except EngineError as error:
            raise recipe_error(error) from error
        self._loaded = frozenset(held["experts"])
