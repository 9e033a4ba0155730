"""How the server of a decoder pool comes to answer by a recipe."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

from cocktail_serve.digest import canonical_json
from cocktail_serve.engines.base import NamesOf
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

MAX_LOGGED_NAMES = 3
"""Of what a recipe is served as, in a line of the log: tenants with the same examples have the same mixture."""


class Parameters(Protocol):
    """The recipes of one engine's server, life after life."""

    def begin_life(self, server: EngineServer) -> None:
        """A server is ready, which knows nothing but what it was started with."""
        ...

    def end_life(self) -> None:
        """The server is gone."""
        ...

    def request_fields(self, recipe: Recipe) -> Mapping[str, Any]:
        """What a request's body says, in place of what its client said, so that the recipe answers it.

        Known before the recipe is ready: bodies are written, and refused, before they wait.
        """
        ...

    async def until_ready(self, recipe: Recipe, *, since: float) -> float:
        """Returns when the server can answer by the recipe, for as long as the lease is held under which it is called.

        Args:
            since: by the monotonic clock, when the caller began to wait.

        Returns:
            Seconds of the mixing that the caller waited for: here, or before it was given the lease.

        Raises:
            ClientError: the recipe cannot be mixed; nothing else was disturbed.
            EngineError: the server failed.
        """
        ...

    def forget(self, recipe_digest: str) -> None:
        """Frees what is kept of a recipe, once nothing in flight uses it."""
        ...

    def name_recipes(self, names_of: NamesOf) -> None:
        """Has the log say what the recipes are served as."""
        ...

    def close(self) -> None:
        """Ends what is still on its way. May be called twice."""
        ...


class UnmergedParameters:
    """`Parameters` of a server that keeps the experts' factors apart: each request brings the coefficients of its own
    recipe, and any number of recipes are in one batch."""

    def begin_life(self, server: EngineServer) -> None:
        pass

    def end_life(self) -> None:
        pass

    def request_fields(self, recipe: Recipe) -> Mapping[str, Any]:
        return {"vllm_xargs": {"cocktail_recipe": canonical_json(recipe.to_json()).decode()}}

    async def until_ready(self, recipe: Recipe, *, since: float) -> float:
        return 0.0

    def forget(self, recipe_digest: str) -> None:
        pass

    def name_recipes(self, names_of: NamesOf) -> None:
        pass  # no recipe takes the place of another

    def close(self) -> None:
        pass


class ResidentParameters:
    """`Parameters` of a server that holds one recipe at a time: turns have made it resident before a lease is given.

    Args:
        pool_id: names the engine in logs.
        swap_timeout_s: how long a mix may take.
        stats: mixes are counted here.
    """

    def __init__(self, pool_id: str, *, swap_timeout_s: float, stats: EngineStats) -> None:
        self._pool_id = pool_id
        self._swap_timeout_s = swap_timeout_s
        self._stats = stats
        self._server: EngineServer | None = None  # of the life that the supervisor has told of
        self._last_mix_s = 0.0
        self._last_mixed_at = -math.inf
        self._forgetting: set[asyncio.Task[None]] = set()
        self._names_of: NamesOf = lambda _: ()

    def begin_life(self, server: EngineServer) -> None:
        self._server = server

    def end_life(self) -> None:
        self._server = None

    def request_fields(self, recipe: Recipe) -> Mapping[str, Any]:
        return {}

    async def until_ready(self, recipe: Recipe, *, since: float) -> float:
        # the last mix is the one that the caller's turn began with
        return self._last_mix_s if self._last_mixed_at >= since else 0.0

    async def mix(self, recipe: Recipe) -> bool:
        """Makes a recipe resident; False: the server was still busy and nothing changed. For `ExclusiveTurns`.

        Raises:
            ClientError: the recipe cannot be mixed, and nothing changed.
            EngineError: nobody knows what the parameters are.
        """
        if self._server is None:
            raise EngineError("the engine's server is not running")
        status, body = await self._server.call(
            "POST",
            MIX_PATH,
            {"recipe": recipe.to_json(), "drain_s": ABORT_S},
            timeout_s=ABORT_S + self._swap_timeout_s,
        )
        if status == 200:
            reply: MixReply = body
            if reply["resident"] == recipe.digest:
                self._count(recipe, source=reply["source"], seconds=reply["seconds"])
                return True
        if status == 409:
            return False
        error = engine_error(status, body, what="mixing", unfit=InvalidMixError)
        if status == 400:  # refused, and nothing has changed
            raise error
        raise EngineError(error.message)  # whatever it is, nobody knows which parameters the engine holds now

    def forget(self, recipe_digest: str) -> None:
        if self._server is not None:
            task = asyncio.create_task(self._forget(self._server, recipe_digest))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

    def name_recipes(self, names_of: NamesOf) -> None:
        self._names_of = names_of

    def close(self) -> None:
        for task in self._forgetting:
            task.cancel()

    def _count(self, recipe: Recipe, *, source: ParameterSource, seconds: float) -> None:
        stats = self._stats
        stats.observe_mix(seconds, source=source)
        stats.num_cache_hits += source == "cache"
        stats.num_cache_misses += source == "files"
        self._last_mix_s, self._last_mixed_at = seconds, time.monotonic()
        named = self._named(recipe.digest)
        logger.info("%s: recipe %s from %s in %.3f s", self._pool_id, named, source, seconds)

    def _named(self, digest: str) -> str:
        """A recipe for the log: the beginning of its digest, and what it is served as."""
        names = sorted(self._names_of(digest))
        shown = [*names[:MAX_LOGGED_NAMES], *(["..."] if len(names) > MAX_LOGGED_NAMES else [])]
        return f"{digest[:8]} ({', '.join(shown)})" if shown else digest[:8]

    async def _forget(self, server: EngineServer, recipe_digest: str) -> None:
        try:
            await server.call("POST", FORGET_PATH, {"digest": recipe_digest}, timeout_s=FORGET_TIMEOUT_S)
        except CocktailError as error:
            # the cache is bounded anyway, and a new life starts with an empty one
            logger.info("%s: recipe %s was not forgotten: %s", self._pool_id, recipe_digest[:8], error)
