"""Starts the engines of one pool again, one after the other, while the others answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

from cocktail_serve.engines.replicas.base import ReplicaEngine
from cocktail_serve.engines.replicas.dispatcher import Dispatcher
from cocktail_serve.engines.snapshot import RestartProgress
from cocktail_serve.errors import CocktailError, ConflictError, EngineError, ModelNotReadyError

logger = logging.getLogger(__name__)

POLL_S = 0.25
OTHERS_S = 600.0
"""How long one waits for another that answers in its place, before the restart is given up."""


class RollingRestart:
    """One at a time. A request in line at the one that is next goes to another; what it has in flight may finish.

    Args:
        engines: by name, in the order in which they are restarted.
        dispatcher: sends requests to the others meanwhile.

    Attributes:
        progress: of the last one; None: there was none.
    """

    def __init__(self, engines: Mapping[str, ReplicaEngine], dispatcher: Dispatcher) -> None:
        self._engines = engines
        self._dispatcher = dispatcher
        self._task: asyncio.Task[None] | None = None
        self.progress: RestartProgress | None = None

    def begin(self, *, drain_s: float) -> None:
        """Begins in the background.

        Args:
            drain_s: how long what an engine has in flight may take, seconds.

        Raises:
            ConflictError: another goes on.
            ModelNotReadyError: the operator has drained the pool: nobody would answer meanwhile.
        """
        if self._task is not None and not self._task.done():
            raise ConflictError("the engines of this pool are being restarted already; ask again when that has ended")
        if all(engine.load().is_drained for engine in self._engines.values()):
            raise ModelNotReadyError("all engines of this pool are drained: end that before they are restarted")
        self.progress = RestartProgress(num_done=0, num_total=len(self._engines), replica=0)
        self._task = asyncio.create_task(self._restart_all(drain_s), name="rolling restart")

    async def stop(self) -> None:
        """Ends it where it is. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _restart_all(self, drain_s: float) -> None:
        assert self.progress is not None
        try:
            for number, name in enumerate(self._engines):
                self.progress = replace(self.progress, num_done=number, replica=int(name))
                await self._restart(name, drain_s)
            self.progress = replace(self.progress, num_done=len(self._engines), replica=None)
        except CocktailError as error:
            # those that are left answer as before: better an old server than none
            logger.error("the restart of replica %s failed, and the rest is left as it is: %s", name, error)
            self.progress = replace(self.progress, replica=None, error=f"replica {name}: {error.message}")

    async def _restart(self, name: str, drain_s: float) -> None:
        engine = self._engines[name]
        was_drained = engine.load().is_drained
        await self._until_another_answers(name)
        try:
            self._dispatcher.recall(name)
            engine.drain(True)
            await engine.restart(drain_s=drain_s)
        finally:
            engine.drain(was_drained)
        logger.info("%s: replica %s was restarted", engine.pool.id, name)

    async def _until_another_answers(self, name: str) -> None:
        others = [engine for other, engine in self._engines.items() if other != name]
        try:
            async with asyncio.timeout(OTHERS_S):
                while not any(_answers(engine) for engine in others):
                    if all(engine.load().is_drained for engine in others):
                        raise EngineError("the operator drains all the others: nobody would answer in its place")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EngineError(f"no other replica was ready to answer in the place of {name}") from None


def _answers(engine: ReplicaEngine) -> bool:
    load = engine.load()
    return load.is_up and not load.is_drained
