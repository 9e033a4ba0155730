"""What answers under the pools as they are now: the models they have, and of cocktails those made of these."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cocktail_serve.cocktails.cocktail import Cocktail, ServedModel
from cocktail_serve.decisions import default_form
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import MethodNotServedError, ModelNotReadyError, NotFoundError
from cocktail_serve.methods import find_method
from cocktail_serve.pool import BASE, Pool
from cocktail_serve.recipe import Recipe, one_hot, settings_of
from cocktail_serve.suggestions import did_you_mean


class PoolModels:
    """The base and the experts of each pool as models, and what a cocktail is served by.

    Args:
        pools: by id, as the operator defines them now; whoever changes a pool changes this mapping too.
        dtypes: dtype of each pool's engine, which recipes round to.

    Attributes:
        by_id: what each pool and each expert is served by, by model id.
    """

    def __init__(self, pools: Mapping[str, Pool], dtypes: Mapping[str, DType]) -> None:
        self._pools = pools
        self._dtypes = dtypes
        self.by_id: dict[str, ServedModel] = {}
        self._ids: dict[tuple[str, str], list[str]] = {}
        self.reread()

    def reread(self) -> None:
        """A pool has other experts now."""
        served = [model for pool in self._pools.values() for model in _models(pool, self._dtypes[pool.id])]
        self.by_id = {model.model_id: model for model in sorted(served, key=lambda model: model.model_id)}
        ids = defaultdict(list)
        for model in served:
            ids[model.pool.id, model.recipe.digest].append(model.model_id)
        self._ids = dict(ids)

    def ids(self, pool_id: str, recipe_digest: str) -> Sequence[str]:
        """Ids of the models of a pool that are this recipe."""
        return self._ids.get((pool_id, recipe_digest), ())

    def served_model(self, cocktail: Cocktail) -> ServedModel:
        """What a snapshot is answered by.

        Raises:
            ModelNotReadyError: its job has not ended.
            NotFoundError: it failed, or its pool no longer has its models.
            MethodNotServedError: its pool no longer serves its method.
        """
        if not cocktail.is_final:
            raise ModelNotReadyError(
                f"{cocktail.id!r} is {cocktail.status}; follow it at /v1/cocktails/{cocktail.id}", param="model"
            )
        if cocktail.status != "ready":
            why = "" if cocktail.error is None else f": {cocktail.error.message}"
            raise NotFoundError(
                f"{cocktail.id!r} {'failed' if cocktail.status == 'failed' else 'was cancelled'}{why}; make it again",
                param="model",
                code="model_not_found",
            )
        pool, recipe = self._pools.get(cocktail.pool_id), cocktail.recipe
        if pool is not None and recipe is not None:
            if recipe.mode != pool.mode:
                raise MethodNotServedError(
                    f"{cocktail.id!r} is of method {recipe.method!r}, which needs merged parameters, and pool "
                    f"{pool.id!r} is served unmerged now; make it again by another, or have the operator set "
                    "engine.mode: merged",
                    param="model",
                )
            generation = settings_of(recipe, pool)
            if recipe.base == pool.base.fingerprint and generation is not None:
                form = cocktail.options.form or default_form(generation.chat_template)
                return ServedModel(cocktail.id, pool, recipe, generation, form)
        raise NotFoundError(
            f"{cocktail.id!r} is made of models that pool {cocktail.pool_id!r} no longer has; make it again",
            param="model",
            code="model_not_found",
        )

    def as_configured(self, cocktail: Cocktail) -> Cocktail:
        """A cocktail as this configuration serves it: the operator may have changed the engine's dtype or mode."""
        pool, recipe = self._pools.get(cocktail.pool_id), cocktail.recipe
        if pool is None or recipe is None:
            return cocktail
        mode = pool.mode if find_method(recipe.method).is_weighted_sum else recipe.mode
        configured = replace(recipe, dtype=self._dtypes[pool.id], mode=mode)
        if configured == recipe:
            return cocktail
        made, now = _rounding(recipe), _rounding(configured)
        warning = f"made for {made}; the engine runs {now} now, so the mixture rounds differently"
        return replace(cocktail, recipe=configured, warnings=(*cocktail.warnings, warning))


def _rounding(recipe: Recipe) -> str:
    return recipe.dtype if recipe.mode == "merged" else f"{recipe.mode} {recipe.dtype}"


def no_model(model_id: str, known: Iterable[str]) -> NotFoundError:
    """The error for a model id that means nothing to a tenant.

    Args:
        known: the models that there are for the tenant.
    """
    return NotFoundError(
        f"the model {model_id!r} does not exist; GET /v1/models lists those that do{did_you_mean(model_id, known)}",
        param="model",
        code="model_not_found",
    )


def _models(pool: Pool, dtype: DType) -> Iterator[ServedModel]:
    for member in pool:
        model_id = pool.id if member.name == BASE else f"{pool.id}/{member.name}"
        generation = pool.generation_of(member)
        recipe = one_hot(pool, member.name, dtype=dtype)
        yield ServedModel(model_id, pool, recipe, generation, default_form(generation.chat_template))
