"""What answers under the pools as they are now: the models they have, and of cocktails those made of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cocktail_serve.cocktails.cocktail import Cocktail, Served
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import CocktailError, ModelNotReadyError, NotFoundError
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.recipe import one_hot, settings_of


class Serving:
    """The pools, as far as answering is concerned.

    Args:
        pools: by id, as the operator defines them now; whoever changes a pool changes this mapping too.
        dtypes: dtype of each pool's engine, which recipes round to.

    Attributes:
        models: what each pool and each expert is served by, by model id.
    """

    def __init__(self, pools: Mapping[str, Pool], dtypes: Mapping[str, DType]) -> None:
        self.pools = pools
        self._dtypes = dtypes
        self.models = {served.model_id: served for pool in pools.values() for served in _models(pool, dtypes[pool.id])}

    def change_pool(self, pool: Pool) -> None:
        """Takes experts in or out of the models."""
        self.models = {
            **{model_id: served for model_id, served in self.models.items() if served.pool.id != pool.id},
            **{served.model_id: served for served in _models(pool, self._dtypes[pool.id])},
        }

    def serve(self, cocktail: Cocktail) -> Served | None:
        """What a snapshot is answered by; None unless it is ready and its pool still has its models."""
        pool = self.pools.get(cocktail.pool_id)
        if cocktail.status != "ready" or cocktail.recipe is None or pool is None:
            return None
        generation = settings_of(cocktail.recipe, pool)
        if cocktail.recipe.base != pool.base.fingerprint or generation is None:
            return None
        return Served(model_id=cocktail.id, pool=pool, recipe=cocktail.recipe, generation=generation)

    def adopt(self, cocktail: Cocktail) -> Cocktail:
        """A cocktail as this configuration serves it: the operator may have changed the engine's dtype."""
        dtype = self._dtypes.get(cocktail.pool_id)
        if dtype is None or cocktail.recipe is None or cocktail.recipe.dtype == dtype:
            return cocktail
        warning = f"made for {cocktail.recipe.dtype}; the engine runs {dtype} now, so the mixture rounds differently"
        return replace(cocktail, recipe=replace(cocktail.recipe, dtype=dtype), warnings=(*cocktail.warnings, warning))

    def why_not_served(self, cocktail: Cocktail) -> CocktailError:
        """The error for a cocktail that `serve` has nothing for."""
        if not cocktail.is_final:
            return ModelNotReadyError(
                f"{cocktail.id!r} is {cocktail.status}; follow it at /v1/cocktails/{cocktail.id}", param="model"
            )
        if cocktail.status == "ready":
            return NotFoundError(
                f"{cocktail.id!r} is made of models that pool {cocktail.pool_id!r} no longer has; make it again",
                param="model",
                code="model_not_found",
            )
        why = "" if cocktail.error is None else f": {cocktail.error.message}"
        return NotFoundError(
            f"{cocktail.id!r} {'failed' if cocktail.status == 'failed' else 'was cancelled'}{why}; make it again",
            param="model",
            code="model_not_found",
        )


def no_model(model_id: str) -> NotFoundError:
    """The error for a model id that means nothing to a tenant."""
    return NotFoundError(
        f"the model {model_id!r} does not exist; GET /v1/models lists those that do",
        param="model",
        code="model_not_found",
    )


def _models(pool: Pool, dtype: DType) -> Iterator[Served]:
    for member in pool:
        model_id = pool.id if member.name == BASE else f"{pool.id}/{member.name}"
        yield Served(model_id, pool, one_hot(pool, member.name, dtype=dtype), pool.generation_of(member))
