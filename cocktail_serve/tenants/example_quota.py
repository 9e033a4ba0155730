"""How many bytes of examples a tenant keeps: those of its cocktails and its files."""

from __future__ import annotations

from sqlalchemy import func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.database import tables
from cocktail_serve.errors import QuotaExceededError


async def check_example_bytes(
    connection: AsyncConnection, tenant: str, num_new: int, limit: int | None, *, now: float
) -> None:
    """Checks what a transaction is about to add. Writes take turns, so two at once do not both fit into the last place.

    Args:
        num_new: bytes to add.
        limit: of the tenant; None: none.
        now: seconds since the epoch; files that have expired do not count.

    Raises:
        QuotaExceededError: it would be more than the limit.
    """
    if limit is None or not num_new:
        return
    files, cocktails = tables.files, tables.cocktails
    # equal contents are kept once
    contents = (
        select(files.c.digest, files.c.num_bytes)
        .where(files.c.tenant == tenant, or_(files.c.expires_at.is_(None), files.c.expires_at > now))
        .distinct()
        .subquery()
    )
    of_files = await connection.execute(select(func.coalesce(func.sum(contents.c.num_bytes), 0)))
    of_cocktails = await connection.execute(
        select(func.coalesce(func.sum(cocktails.c.example_bytes), 0)).where(cocktails.c.tenant == tenant)
    )
    kept = int(of_files.scalar_one()) + int(of_cocktails.scalar_one())
    if kept + num_new > limit:
        raise QuotaExceededError(
            f"examples of {num_new} bytes would make {kept + num_new} bytes kept, and the limit is {limit}; delete "
            "cocktails or files first"
        )
