"""A cocktail as it stands in the store, for tests that make none."""

from __future__ import annotations

from dataclasses import replace

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.options import CocktailOptions


def queued_cocktail(uid: str = "1", tenant: str = "acme", **changes: object) -> Cocktail:
    """A queued cocktail `films` of the pool `flan`.

    Args:
        uid: a hexadecimal number: its place in the order of asking.
        changes: fields that are to be otherwise.
    """
    options = CocktailOptions(
        name="films", pool="flan", pool_fingerprint="fp", peers=("base", "nq"), examples_digest="e", num_examples=2
    )
    made = Cocktail(
        uid=uid,
        tenant=tenant,
        name="films",
        pool_id="flan",
        kind="decoder",
        digest=uid * 8,
        request=options,
        created_at=1_700_000_000.123456,
        sequence=int(uid, 16),
    )
    return replace(made, **changes)  # type: ignore[arg-type]
