"""What must survive a restart: cocktails, their examples, pins, and the scores kept to be used again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from sqlalchemy import Column, Table, delete, insert, select, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.cocktails.cocktail import Cocktail, Failure
from cocktail_serve.cocktails.request import CocktailOptions
from cocktail_serve.database import tables
from cocktail_serve.database.database import Database, to_the_end
from cocktail_serve.examples import ExampleSet
from cocktail_serve.recipe import Recipe
from cocktail_serve.weighting.candidates import Candidate


@dataclass(frozen=True, slots=True)
class ScoreKey:
    """What a score depends on besides the text.

    Attributes:
        model: fingerprint of the parameters.
        variant: digest of how it was made: version of the loss, tokenizer and modules, dtype, truncation.
    """

    model: str
    variant: str


class Witness(Protocol):
    """Writes down what a change of a cocktail means elsewhere, in the transaction of the change: both or neither."""

    async def changed(self, connection: AsyncConnection, before: Cocktail, after: Cocktail) -> None:
        """Called behind each change of a cocktail's row."""
        ...

    async def deleted(self, connection: AsyncConnection, uids: Sequence[str]) -> None:
        """Called before the rows of cocktails are deleted."""
        ...


Beside = Callable[[AsyncConnection, Cocktail], Awaitable[None]]
"""Writes rows that are to come with a cocktail, in the transaction that writes it."""

_IN_CLAUSE = 500
"""Parameters of one IN list: well under SQLite's and PostgreSQL's limits on bound variables."""


class Store:
    """The tables of cocktails and scores in a database that is open. One process owns them.

    Every write is on disk when its coroutine returns. Every method raises StorageError when the database refuses.
    """

    def __init__(self, database: Database, *, witnesses: Sequence[Witness] = ()) -> None:
        self._database = database
        self._witnesses = witnesses

    @to_the_end
    async def load(self) -> tuple[list[Cocktail], dict[tuple[str, str], str]]:
        """All cocktails in the order they were asked for, and the uid that each pinned `(tenant, name)` means."""
        async with self._database.read() as connection:
            rows = (
                (await connection.execute(select(tables.cocktails).order_by(tables.cocktails.c.sequence)))
                .mappings()
                .all()
            )
            pins = (await connection.execute(select(tables.pins))).all()
        return [_cocktail(row) for row in rows], {(pin.tenant, pin.name): pin.uid for pin in pins}

    @to_the_end
    async def add(
        self,
        cocktail: Cocktail,
        examples: ExampleSet | None,
        items: Sequence[str],
        *,
        validation: ExampleSet | None = None,
        beside: Beside | None = None,
    ) -> None:
        """Writes a new cocktail with its examples and the keys its scores will be kept under."""
        async with self._database.write() as connection:
            await connection.execute(insert(tables.cocktails).values(_row(cocktail)))
            for table, given in ((tables.examples, examples), (tables.validation_examples, validation)):
                if given is not None:
                    rows = [
                        {"uid": cocktail.uid, "position": position, "body": body}
                        for position, body in enumerate(given.to_json())
                    ]
                    await connection.execute(insert(table), rows)
            if items:
                await connection.execute(
                    insert(tables.items), [{"uid": cocktail.uid, "item": item} for item in dict.fromkeys(items)]
                )
            if beside is not None:
                await beside(connection, cocktail)

    @to_the_end
    async def update(self, cocktail: Cocktail, *, before: Cocktail | None = None, beside: Beside | None = None) -> None:
        """Overwrites a cocktail's row; does nothing where it has been deleted.

        Args:
            before: what it was, for the witnesses; None: they need not hear of it.
        """
        row = _row(cocktail)
        async with self._database.write() as connection:
            updated = await connection.execute(
                update(tables.cocktails).where(tables.cocktails.c.uid == row.pop("uid")).values(row)
            )
            if not updated.rowcount:
                return
            if before is not None:
                for witness in self._witnesses:
                    await witness.changed(connection, before, cocktail)
            if beside is not None:
                await beside(connection, cocktail)

    @to_the_end
    async def touch(self, used_at: Mapping[str, float]) -> None:
        """Writes when cocktails were last used, by uid."""
        async with self._database.write() as connection:
            for uid, moment in used_at.items():
                await connection.execute(
                    update(tables.cocktails).where(tables.cocktails.c.uid == uid).values(used_at=moment)
                )

    @to_the_end
    async def pin(self, tenant: str, name: str, uid: str | None) -> None:
        """Pins a name to a version, or removes the pin."""
        async with self._database.write() as connection:
            await connection.execute(
                delete(tables.pins).where(tables.pins.c.tenant == tenant, tables.pins.c.name == name)
            )
            if uid is not None:
                await connection.execute(insert(tables.pins).values(tenant=tenant, name=name, uid=uid))

    @to_the_end
    async def delete(self, tenant: str, uids: Sequence[str]) -> None:
        """Deletes cocktails of a tenant with their examples, and the scores that no other of its cocktails needs."""
        async with self._database.write() as connection:
            for some in _chunks(uids):
                for witness in self._witnesses:
                    await witness.deleted(connection, some)
                going = select(tables.items.c.item).where(tables.items.c.uid.in_(some))
                staying = (
                    select(tables.items.c.item)
                    .join(tables.cocktails, tables.cocktails.c.uid == tables.items.c.uid)
                    .where(tables.cocktails.c.tenant == tenant, tables.cocktails.c.uid.not_in(some))
                )
                for scores in (tables.losses, tables.embeddings):
                    await connection.execute(
                        delete(scores).where(
                            scores.c.tenant == tenant, scores.c.item.in_(going), scores.c.item.not_in(staying)
                        )
                    )
                for table in (
                    tables.pins,
                    tables.items,
                    tables.examples,
                    tables.validation_examples,
                    tables.cocktails,
                ):
                    await connection.execute(delete(table).where(table.c.uid.in_(some)))
        await self._database.truncate_wal()

    @to_the_end
    async def examples(self, uid: str, *, validation: bool = False) -> list[dict[str, Any]]:
        """The examples of a cocktail as JSON rows, in order; empty where there are none.

        Args:
            validation: those of its validation.
        """
        table = tables.validation_examples if validation else tables.examples
        query = select(table.c.body).where(table.c.uid == uid).order_by(table.c.position)
        async with self._database.read() as connection:
            return list((await connection.execute(query)).scalars())

    @to_the_end
    async def losses(self, tenant: str, key: ScoreKey, items: Sequence[str]) -> dict[str, float]:
        """Losses kept for these examples of one model, by example digest."""
        return await self._kept(tables.losses, tables.losses.c.loss, tenant=tenant, key=key, items=items)

    @to_the_end
    async def keep_losses(self, uid: str, key: ScoreKey, losses: Mapping[str, float]) -> None:
        """Keeps losses measured for a cocktail; nothing where it has been deleted meanwhile."""
        await self._keep(tables.losses, "loss", uid=uid, key=key, values=losses)

    @to_the_end
    async def embeddings(self, tenant: str, key: ScoreKey, items: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeddings kept for these texts under one model, `[D]` float32, by text digest."""
        kept = await self._kept(tables.embeddings, tables.embeddings.c.vector, tenant=tenant, key=key, items=items)
        return {item: np.frombuffer(vector, dtype="<f4") for item, vector in kept.items()}

    @to_the_end
    async def keep_embeddings(self, uid: str, key: ScoreKey, vectors: Mapping[str, np.ndarray]) -> None:
        """Keeps embeddings made for a cocktail; nothing where it has been deleted meanwhile."""
        packed = {item: np.ascontiguousarray(vector, dtype="<f4").tobytes() for item, vector in vectors.items()}
        await self._keep(tables.embeddings, "vector", uid=uid, key=key, values=packed)

    async def _kept(
        self, table: Table, value: Column[Any], *, tenant: str, key: ScoreKey, items: Sequence[str]
    ) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        async with self._database.read() as connection:
            for some in _chunks(items):
                query = select(table.c.item, value).where(*_score_key(table, tenant, key, some))
                kept.update((row[0], row[1]) for row in await connection.execute(query))
        return kept

    async def _keep(self, table: Table, column: str, *, uid: str, key: ScoreKey, values: Mapping[str, Any]) -> None:
        async with self._database.write() as connection:
            owner = await connection.execute(select(tables.cocktails.c.tenant).where(tables.cocktails.c.uid == uid))
            tenant = owner.scalar_one_or_none()
            if tenant is None:
                return
            # two jobs may have measured the same: the first to come keeps its value
            present: set[str] = set()
            for some in _chunks(list(values)):
                query = select(table.c.item).where(*_score_key(table, tenant, key, some))
                present.update((await connection.execute(query)).scalars())
            rows = [
                {"tenant": tenant, "item": item, "model": key.model, "variant": key.variant, column: value}
                for item, value in values.items()
                if item not in present
            ]
            if rows:
                await connection.execute(insert(table), rows)


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _IN_CLAUSE):
        yield values[start : start + _IN_CLAUSE]


def _score_key(table: Table, tenant: str, key: ScoreKey, items: Sequence[str]) -> list[Any]:
    return [
        table.c.tenant == tenant,
        table.c.model == key.model,
        table.c.variant == key.variant,
        table.c.item.in_(items),
    ]


def _row(cocktail: Cocktail) -> dict[str, Any]:
    return {
        "uid": cocktail.uid,
        "tenant": cocktail.tenant,
        "name": cocktail.name,
        "pool_id": cocktail.pool_id,
        "kind": cocktail.kind,
        "digest": cocktail.digest,
        "request": cocktail.request.to_json(),
        "created_at": cocktail.created_at,
        "ready_at": cocktail.ready_at,
        "used_at": cocktail.used_at,
        "sequence": cocktail.sequence,
        "status": cocktail.status,
        "progress": cocktail.progress,
        "losses": dict(cocktail.losses),
        "merging_weights": None if cocktail.merging_weights is None else dict(cocktail.merging_weights),
        "entropy": cocktail.entropy,
        "mixed_loss": cocktail.mixed_loss,
        "validation_loss": cocktail.validation_loss,
        "recipe": None if cocktail.recipe is None else cocktail.recipe.to_json(),
        "error": None if cocktail.error is None else cocktail.error.to_json(),
        "warnings": list(cocktail.warnings),
        "candidates": [asdict(candidate) for candidate in cocktail.candidates],
    }


def _cocktail(row: RowMapping) -> Cocktail:
    values = dict(row)
    return Cocktail(
        **{
            **values,
            "request": CocktailOptions.from_json(values["request"]),
            "recipe": None if values["recipe"] is None else Recipe.from_json(values["recipe"]),
            "error": None if values["error"] is None else Failure(**values["error"]),
            "warnings": tuple(values["warnings"]),
            "candidates": tuple(Candidate(**candidate) for candidate in values["candidates"] or ()),
        }
    )
