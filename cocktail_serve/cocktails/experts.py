"""Experts that the operator takes in and out while the server runs: "I have just fine-tuned this"."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import delete, insert, select

from cocktail_serve.checkpoints.opening import open_expert
from cocktail_serve.cocktails.catalog import Catalog
from cocktail_serve.cocktails.expert_roots import ExpertRoots
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.database.shield import Shield
from cocktail_serve.engines.base import Engine
from cocktail_serve.errors import (
    CheckpointError,
    ClientError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
)
from cocktail_serve.library_process import LibraryCall, LibraryProcess
from cocktail_serve.pool import BASE, NAME_PATTERN, Member, Pool
from cocktail_serve.suggestions import did_you_mean
from cocktail_serve.usage.actor import SERVER, Actor
from cocktail_serve.usage.audit import record

logger = logging.getLogger(__name__)

LEARN_S = 5.0
"""How often a server looks for experts that another server on the same database has added or removed."""


@dataclass(frozen=True, slots=True)
class Added:
    """An expert that was added, as the database keeps it.

    Attributes:
        path: the folder, resolved.
        added_at: seconds since the epoch.
    """

    pool_id: str
    name: str
    path: Path
    fingerprint: str
    added_at: float


class Experts:
    """The experts added to pools.

    Those of the configuration win: an added one whose name the configuration has taken since is left out, with a line
    in the log. So is one whose folder is gone, no longer fits the base, or has changed since it was added.

    Args:
        pools: by id; changed here, and read by whoever was given the same mapping.
        engines: by pool id; none, to look only at what `load` makes of the pools.
        roots: folders under which experts may lie; what is elsewhere is refused, whichever way a path leads there.
        cache_dir: where fingerprints are kept.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        database: Database,
        pools: MutableMapping[str, Pool],
        engines: Mapping[str, Engine],
        *,
        roots: Sequence[Path],
        cache_dir: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._pools = pools
        self._engines = engines
        self._roots = ExpertRoots(roots)
        self._cache_dir = cache_dir
        self._clock = clock
        self._added: dict[tuple[str, str], Added] = {}
        self._left_out: dict[tuple[str, str], str] = {}
        self._changing = asyncio.Lock()
        self._shield = Shield()
        self._catalog: Catalog | None = None
        self._learning: asyncio.Task[None] | None = None

    async def load(self) -> Mapping[str, str]:
        """Puts the experts that were added earlier into their pools and engines, before anything is served.

        Returns:
            Why, by model id, of those that are left out.
        """
        await self._catch_up()
        return {f"{pool_id}/{name}": why for (pool_id, name), why in self._left_out.items()}

    def start(self, catalog: Catalog) -> None:
        """Tells the catalog of changes from now on, those that other servers on the database make among them."""
        self._catalog = catalog
        self._learning = asyncio.create_task(self._learn(), name="experts")

    async def stop(self) -> None:
        """Ends what `start` began; a change that was begun is made."""
        await self._shield.until_done()
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.gather(self._learning, return_exceptions=True)

    def of(self, pool_id: str) -> Sequence[tuple[Member, Added | None]]:
        """The experts of a pool, and how each came in; None: by the configuration.

        Raises:
            NotFoundError: no such pool.
        """
        pool = self._pool(pool_id)
        return [(member, self._added.get((pool_id, name))) for name, member in pool.experts.items()]

    async def add(self, pool_id: str, name: str, path: str, *, actor: Actor = SERVER) -> tuple[Member, Added, bool]:
        """Takes a model in: checked, written down, and then shown.

        Returns:
            The expert, how it came in, and whether it was there already.

        Raises:
            NotFoundError: no such pool.
            InvalidRequestError: no name of an expert, or no folder.
            PermissionDeniedError: the folder, or a file that it links to, lies outside of the roots.
            ConflictError: the pool has another expert of that name.
            CheckpointError, IncompatibleModelsError: the model cannot be read, or mixed; nothing has changed.
            StorageError: the database or the engine could not be told; nothing has changed.
        """
        return await self._shield.run(self._add(pool_id, name, path, actor))

    async def remove(self, pool_id: str, name: str, *, force: bool, actor: Actor = SERVER) -> None:
        """Takes an added expert out, one that is left out too. Its files stay where they are.

        Args:
            force: though cocktails are made of it; those are no longer served then.

        Raises:
            NotFoundError: no such pool, or expert of it.
            ConflictError: it is of the configuration, or cocktails are made of it.
            StorageError: as `add`.
        """
        await self._shield.run(self._remove(pool_id, name, actor, force=force))

    async def _add(self, pool_id: str, name: str, path: str, actor: Actor) -> tuple[Member, Added, bool]:
        self._pool(pool_id)
        if not re.fullmatch(NAME_PATTERN, name) or name == BASE:
            raise InvalidRequestError(
                f"{name!r} is not a name of an expert: use {NAME_PATTERN}, and not {BASE!r}", param="name"
            )
        async with self._changing:
            pool = self._pool(pool_id)
            if name in pool.experts and (pool_id, name) not in self._added:
                raise ConflictError(f"pool {pool_id!r} has an expert {name!r} in the configuration", param="name")
            folder = await asyncio.to_thread(self._roots.find, path)
            with LibraryProcess() as libraries:
                member = await asyncio.to_thread(
                    libraries.call, open_expert, pool, name, folder, cache_dir=self._cache_dir
                )
            there = pool.experts.get(name)
            if there is not None:
                if there.fingerprint == member.fingerprint:
                    return there, self._added[pool_id, name], True
                raise ConflictError(
                    f"pool {pool_id!r} has another expert {name!r}; delete it first, or choose another name",
                    param="name",
                )
            added = Added(pool_id, name, folder, member.fingerprint, self._clock())
            grown = replace(pool, experts={**pool.experts, name: member})
            async with self._database.write() as connection:
                table = tables.experts
                query = select(table.c.name).where(table.c.pool == pool_id, table.c.name == name)
                if (await connection.execute(query)).first() is not None:
                    raise ConflictError(f"{name!r} was just added by another server, or is left out here", param="name")
                # the engine first: a model more than the database holds does no harm there, a model less would
                await self._engines[pool_id].change_pool(grown)
                await connection.execute(
                    insert(tables.experts).values(
                        pool=pool_id,
                        name=name,
                        path=str(folder),
                        fingerprint=member.fingerprint,
                        added_at=added.added_at,
                    )
                )
                detail = {"fingerprint": member.fingerprint, "path": str(folder)}
                await record(connection, "expert.added", f"{pool_id}/{name}", actor=actor, tenant=None, detail=detail)
            self._show(grown)
            self._added[pool_id, name] = added
            self._left_out.pop((pool_id, name), None)
            logger.info("expert %s/%s was added", pool_id, name)
            return member, added, False

    async def _remove(self, pool_id: str, name: str, actor: Actor, *, force: bool) -> None:
        async with self._changing:
            pool = self._pool(pool_id)
            if (pool_id, name) not in self._left_out:
                member = pool.member(name)
                if (pool_id, name) not in self._added:
                    raise ConflictError(
                        f"{name!r} is of the configuration; take it out there and start the server again", param="name"
                    )
                users = [] if self._catalog is None else await self._catalog.made_of(pool_id, member)
                if users and not force:
                    raise ConflictError(
                        f"{len(users)} cocktails are made of {pool_id}/{name}, among them {users[0].id!r}; delete "
                        "them, or repeat with ?force=true: they are not served any more then",
                        code="expert_in_use",
                    )
            async with self._database.write() as connection:
                table = tables.experts
                await connection.execute(delete(table).where(table.c.pool == pool_id, table.c.name == name))
                await record(connection, "expert.removed", f"{pool_id}/{name}", actor=actor, tenant=None)
            if self._left_out.pop((pool_id, name), None) is None:
                await self._unload(pool_id, name)

    async def _learn(self) -> None:
        """Follows what other servers on the database do."""
        while True:
            await asyncio.sleep(LEARN_S)
            try:
                await self._catch_up()
            except StorageError as error:
                logger.warning("the registry's experts could not be read: %s", error.message)
            except Exception:
                logger.exception("the registry's experts could not be followed")

    async def _catch_up(self) -> None:
        async with self._changing:
            rows = await self._database.rows(select(tables.experts))
            found = {
                (row["pool"], row["name"]): Added(
                    row["pool"], row["name"], Path(row["path"]), row["fingerprint"], row["added_at"]
                )
                for row in sorted(rows, key=lambda row: row["added_at"])
            }
            for key, added in list(self._added.items()):
                if found.get(key) != added:
                    await self._unload(*key)
            self._left_out = {key: why for key, why in self._left_out.items() if key in found}
            with LibraryProcess() as libraries:
                for key, added in found.items():
                    if key in self._added or key in self._left_out:
                        continue
                    try:
                        await self._load(added, libraries.call)
                    except ClientError as error:
                        self._left_out[key] = error.message
                        logger.error("expert %s/%s is left out: %s", *key, error.message)

    async def _unload(self, pool_id: str, name: str) -> None:
        pool = self._pools[pool_id]
        shrunk = replace(pool, experts={n: each for n, each in pool.experts.items() if n != name})
        self._show(shrunk)
        del self._added[pool_id, name]
        try:
            await self._engines[pool_id].change_pool(shrunk)
        except StorageError as error:  # it goes on knowing a model that nobody names any more
            logger.warning("expert %s/%s stays in the engine until its next start: %s", pool_id, name, error)
        logger.info("expert %s/%s was removed", pool_id, name)

    def _show(self, pool: Pool) -> None:
        self._pools[pool.id] = pool
        if self._catalog is not None:
            self._catalog.reread_pools()

    async def _load(self, added: Added, call: LibraryCall) -> None:
        pool = self._pool(added.pool_id)
        if added.name in pool.experts:
            raise ConflictError("the configuration has an expert of that name now, and wins")
        folder = await asyncio.to_thread(self._roots.find, str(added.path))
        member = await asyncio.to_thread(call, open_expert, pool, added.name, folder, cache_dir=self._cache_dir)
        if member.fingerprint != added.fingerprint:
            raise CheckpointError(f"{folder} holds other parameters than when it was added; add it under another name")
        grown = replace(pool, experts={**pool.experts, added.name: member})
        if pool.id in self._engines:
            await self._engines[pool.id].change_pool(grown)
        self._show(grown)
        self._added[added.pool_id, added.name] = added

    def _pool(self, pool_id: str) -> Pool:
        pool = self._pools.get(pool_id)
        if pool is None:
            known = ", ".join(sorted(self._pools))
            meant = did_you_mean(pool_id, self._pools)
            raise NotFoundError(f"there is no pool {pool_id!r}; there are: {known}{meant}", code="pool_not_found")
        return pool
