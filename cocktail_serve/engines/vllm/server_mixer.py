"""What an engine's server is told of recipes that are mixed into its parameters: to mix one, and to forget one."""

from __future__ import annotations

import asyncio
import logging

from cocktail_serve.engines.recipe_names import NamesOf, named_recipe, no_names
from cocktail_serve.engines.stats import EngineStats
from cocktail_serve.engines.vllm.errors import engine_error
from cocktail_serve.engines.vllm.server import EngineServer
from cocktail_serve.errors import CocktailError, EngineError, InvalidMixError
from cocktail_serve.recipe import Recipe
from vllm_cocktail.replies import FORGET_PATH, MIX_PATH, MixReply, ParameterSource

logger = logging.getLogger(__name__)

ABORT_S = 10.0
"""How long the engine may take to abort what we have given up, before a mix comes back as busy."""

FORGET_TIMEOUT_S = 120.0


class ServerMixer:
    """Mixes and forgets recipes in the server of one engine, counts and logs mixes.

    Args:
        pool_id: names the engine in logs.
        swap_timeout_s: how long a mix may take.
        stats: mixes are counted here.
    """

    def __init__(self, pool_id: str, *, swap_timeout_s: float, stats: EngineStats) -> None:
        self._pool_id = pool_id
        self._swap_timeout_s = swap_timeout_s
        self._stats = stats
        self._forgetting: set[asyncio.Task[None]] = set()
        self._names_of: NamesOf = no_names

    async def mix(self, server: EngineServer, recipe: Recipe) -> float | None:
        """Makes a recipe resident, as `turns.base.Mix` says.

        Raises:
            ClientError: the recipe cannot be mixed, and nothing changed.
            EngineError: nobody knows what the parameters are.
        """
        status, body = await server.call(
            "POST",
            MIX_PATH,
            {"recipe": recipe.to_json(), "drain_s": ABORT_S},
            timeout_s=ABORT_S + self._swap_timeout_s,
        )
        if status == 200:
            reply: MixReply = body
            if reply["resident"] == recipe.digest:
                self._count(recipe, source=reply["source"], seconds=reply["seconds"])
                return reply["seconds"]
        if status == 409:
            return None
        error = engine_error(status, body, what="mixing", unfit=InvalidMixError)
        if status == 400:  # refused, and nothing has changed
            raise error
        raise EngineError(error.message)  # whatever it is, nobody knows which parameters the engine holds now

    def forget(self, server: EngineServer, recipe_digest: str) -> None:
        """Begins to free what the server keeps of a recipe, once nothing in flight uses it."""
        task = asyncio.create_task(self._forget(server, recipe_digest))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    def name_recipes(self, names_of: NamesOf) -> None:
        """Has the log say what the recipes are served as."""
        self._names_of = names_of

    def close(self) -> None:
        """Ends what is still on its way. May be called twice."""
        for task in self._forgetting:
            task.cancel()

    def _count(self, recipe: Recipe, *, source: ParameterSource, seconds: float) -> None:
        stats = self._stats
        stats.observe_mix(seconds, source=source)
        stats.num_cache_hits += source == "cache"
        stats.num_cache_misses += source == "files"
        named = named_recipe(recipe.digest, self._names_of)
        logger.info("%s: recipe %s from %s in %.3f s", self._pool_id, named, source, seconds)

    async def _forget(self, server: EngineServer, recipe_digest: str) -> None:
        try:
            await server.call("POST", FORGET_PATH, {"digest": recipe_digest}, timeout_s=FORGET_TIMEOUT_S)
        except CocktailError as error:
            # the cache is bounded anyway, and a new life starts with an empty one
            logger.info("%s: recipe %s was not forgotten: %s", self._pool_id, recipe_digest[:8], error)
