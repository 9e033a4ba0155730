"""Scores kept to be used again: losses and embeddings, per tenant, until the last cocktail that needs them goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Column, Table, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, chunks, insert_missing, shielded


@dataclass(frozen=True, slots=True)
class ScoreKey:
    """What a score depends on besides the text.

    Attributes:
        model: fingerprint of the parameters.
        variant: digest of how it was made: version of the loss, tokenizer and modules, dtype, truncation.
    """

    model: str
    variant: str


class ScoreStore:
    """The tables of scores in a database that is open. Every method raises StorageError when the database refuses."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @shielded
    async def losses(self, tenant: str, key: ScoreKey, items: Sequence[str]) -> dict[str, float]:
        """Losses kept for these examples of one model, by example digest."""
        return await self._kept(tables.losses, tables.losses.c.loss, tenant=tenant, key=key, items=items)

    @shielded
    async def keep_losses(self, uid: str, key: ScoreKey, losses: Mapping[str, float]) -> None:
        """Keeps losses measured for a cocktail; nothing where it has been deleted meanwhile."""
        await self._keep(tables.losses, "loss", uid=uid, key=key, values=losses)

    @shielded
    async def embeddings(self, tenant: str, key: ScoreKey, items: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeddings kept for these texts under one model, `[D]` float32, by text digest."""
        kept = await self._kept(tables.embeddings, tables.embeddings.c.vector, tenant=tenant, key=key, items=items)
        return {item: np.frombuffer(vector, dtype="<f4") for item, vector in kept.items()}

    @shielded
    async def keep_embeddings(self, uid: str, key: ScoreKey, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps embeddings made for a cocktail; nothing where it has been deleted meanwhile."""
        packed = {item: np.ascontiguousarray(vector, dtype="<f4").tobytes() for item, vector in vectors.items()}
        await self._keep(tables.embeddings, "vector", uid=uid, key=key, values=packed)

    async def _kept(
        self, table: Table, value: Column[Any], *, tenant: str, key: ScoreKey, items: Sequence[str]
    ) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        async with self._database.read() as connection:
            for some in chunks(items):
                query = select(table.c.item, value).where(*_score_key(table, tenant, key, some))
                kept.update((row[0], row[1]) for row in await connection.execute(query))
        return kept

    async def _keep(self, table: Table, column: str, *, uid: str, key: ScoreKey, values: Mapping[str, Any]) -> None:
        async with self._database.write() as connection:
            there = select(tables.cocktails.c.tenant).where(tables.cocktails.c.uid == uid)
            # a deletion through another gateway comes before this, or after it and finds what this wrote
            owner = await connection.execute(there.with_for_update(read=True))
            tenant = owner.scalar_one_or_none()
            if tenant is None:
                return
            rows = [
                {"tenant": tenant, "item": item, "model": key.model, "variant": key.variant, column: value}
                for item, value in values.items()
            ]
            if rows:
                # two jobs may have measured the same: the first to come keeps its value
                await connection.execute(insert_missing(connection, table), rows)


async def forget_scores(connection: AsyncConnection, tenant: str, uids: Sequence[str]) -> None:
    """Deletes the scores of a tenant's cocktails that no other of them needs; to be called before their rows go.

    Args:
        uids: as many as one statement takes.
    """
    going = select(tables.items.c.item).where(tables.items.c.uid.in_(uids))
    staying = (
        select(tables.items.c.item)
        .join(tables.cocktails, tables.cocktails.c.uid == tables.items.c.uid)
        .where(tables.cocktails.c.tenant == tenant, tables.cocktails.c.uid.not_in(uids))
    )
    for scores in (tables.losses, tables.embeddings):
        await connection.execute(
            delete(scores).where(scores.c.tenant == tenant, scores.c.item.in_(going), scores.c.item.not_in(staying))
        )


def _score_key(table: Table, tenant: str, key: ScoreKey, items: Sequence[str]) -> list[Any]:
    return [
        table.c.tenant == tenant,
        table.c.model == key.model,
        table.c.variant == key.variant,
        table.c.item.in_(items),
    ]
