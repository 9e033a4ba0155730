"""What the audit log says of cocktails: who made which recipe from which experts, and who deleted it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.cocktails.cocktail import Cocktail, version_id
from cocktail_serve.usage.actor import Actor
from cocktail_serve.usage.audit import record


async def made(connection: AsyncConnection, cocktail: Cocktail, actor: Actor) -> None:
    """A cocktail was asked for."""
    options = cocktail.options
    await record(
        connection,
        "cocktail.created",
        cocktail.id,
        actor=actor,
        tenant=cocktail.tenant,
        detail={
            "pool": cocktail.pool_id,
            "request_digest": cocktail.digest,
            "examples_digest": options.examples_digest,
            "num_examples": options.num_examples,
            "method": options.method,
            "weighting": options.weighting,
            "target": options.target,
            "peers": list(options.peers),
            "inline": options.inline,
        },
    )


async def changed(connection: AsyncConnection, before: Cocktail, after: Cocktail) -> None:
    """A cocktail's row was overwritten: written down where it became ready, in the name of the key that made it."""
    if after.status != "ready" or before.status == "ready" or after.recipe is None:
        return
    weights = after.merging_weights or {}
    detail: dict[str, Any] = {
        "pool": after.pool_id,
        "recipe_digest": after.recipe.digest,
        "method": after.recipe.method,
        "base": after.recipe.base,
        "experts": [{"model": name, "coefficient": weight} for name, weight in weights.items()],
        "fingerprints": [fingerprint for fingerprint, _ in after.recipe.coefficients],
    }
    maker = Actor(after.tenant, after.key_id)
    await record(connection, "cocktail.ready", after.id, actor=maker, tenant=after.tenant, detail=detail)


async def pinned(connection: AsyncConnection, tenant: str, name: str, digest: str | None, actor: Actor) -> None:
    """A name was made to mean one version; None: the newest again."""
    current = None if digest is None else version_id(name, digest)
    await record(connection, "cocktail.pinned", name, actor=actor, tenant=tenant, detail={"current": current})


async def deleted(connection: AsyncConnection, tenant: str, versions: Iterable[tuple[str, str]], actor: Actor) -> None:
    """Versions were deleted.

    Args:
        versions: name and digest of each.
    """
    for name, digest in versions:
        detail = {"request_digest": digest}
        subject = version_id(name, digest)
        await record(connection, "cocktail.deleted", subject, actor=actor, tenant=tenant, detail=detail)
