"""The recipe: what a mixture is made of, by content. A few hundred bytes that reproduce it bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from cocktail_serve.digest import digest_of
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import InvalidMixError, MethodNotServedError
from cocktail_serve.generation_settings import GenerationSettings, mixed_settings
from cocktail_serve.methods import METHODS, SUM_TOLERANCE, Method, find_method
from cocktail_serve.pool import BASE, Mode, Pool

RECIPE_VERSION = 2
"""Part of every digest: raised when the same fields come to mean other bits."""


@dataclass(frozen=True)
class Recipe:
    """Base, coefficients and method of a mixture.

    Attributes:
        base: fingerprint of the pool's base, which integer tensors are taken from and task vectors are relative to.
        coefficients: `(fingerprint, coefficient)` of the models that take part, zeros left out; the base first if it
            takes part, then by fingerprint. Their order is the order of accumulation, so it is part of the digest. In
            a method of task vectors the base always takes part, with 1; slerp keeps its two models, zero or not.
        method: `linear`, the weighted sum of parameters (LM-Cocktail, arXiv 2311.13534), or another of
            `methods.METHODS`.
        method_params: further parameters of the method, all of them.
        dtype: dtype of the mixed parameters, reached by one rounding from the accumulated sum; unmerged, of the base's
            parameters and of the factors, each by itself.
        mode: how it reaches the engine, which decides what is rounded.
    """

    base: str
    coefficients: tuple[tuple[str, float], ...]
    dtype: DType
    method: str = "linear"
    method_params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    mode: Mode = "merged"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the bits of the mixture, 64 hex characters."""
        return digest_of(self.to_json())

    @property
    def only_model(self) -> str | None:
        """The fingerprint of the only model, where the recipe is that model itself."""
        if self.method == "linear" and len(self.coefficients) == 1 and self.coefficients[0][1] == 1.0:
            return self.coefficients[0][0]
        return None

    @property
    def task_vector_coefficients(self) -> dict[str, float]:
        """What each expert's difference to the base is multiplied with, by fingerprint: the mixture is the base and the
        sum of these. Where the base's coefficient is what remains to 1, it plays no part.

        Raises:
            MethodNotServedError: the method's mixture is no such sum.
        """
        check_mode(self.method, "unmerged")
        scale = self.method_params.get("lambda", 1.0)
        return {fingerprint: scale * value for fingerprint, value in self.coefficients if fingerprint != self.base}

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back to an equal recipe."""
        return {
            "version": RECIPE_VERSION,
            "base": self.base,
            "coefficients": [[fingerprint, coefficient] for fingerprint, coefficient in self.coefficients],
            "method": self.method,
            "method_params": dict(self.method_params),
            "dtype": self.dtype,
            # called form here, and left out where it is merged: digests stay what they were
            **({} if self.mode == "merged" else {"form": self.mode}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Reads what `to_json` wrote.

        Raises:
            InvalidMixError: another version, a field missing or of another type, or coefficients off their rule.
        """
        try:
            if value["version"] != RECIPE_VERSION:
                raise InvalidMixError(
                    f"recipe version {value['version']!r} is not supported; this release reads version {RECIPE_VERSION}"
                )
            if value["dtype"] not in get_args(DType):
                raise InvalidMixError(f"recipe dtype {value['dtype']!r} is not float32, float16 or bfloat16")
            mode = value.get("form", "merged")
            if mode not in get_args(Mode):
                raise InvalidMixError(f"recipe form {mode!r} is not one of {', '.join(get_args(Mode))}")
            method = find_method(value["method"])
            check_mode(method.name, mode)
            method_params = method.check_params(value["method_params"])
            coefficients = tuple((str(f), _finite(f, c)) for f, c in value["coefficients"])
            if len(dict(coefficients)) < len(coefficients):
                raise InvalidMixError("not a recipe: a model has two coefficients", param="recipe.coefficients")
            base = str(value["base"])
            _check_rule(method, base, coefficients)
            return cls(base, coefficients, value["dtype"], method.name, method_params, mode)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidMixError(f"not a recipe: {error!r}") from error


def make_recipe(
    pool: Pool,
    merging_weights: Mapping[str, float],
    *,
    dtype: DType,
    method: str = "linear",
    method_params: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
) -> Recipe:
    """The recipe of a pool's models with the given weights, by name.

    Args:
        merging_weights: coefficient by model name (`base` or an expert); names left out weigh 0, except that the base
            counts 1 in a method of task vectors.
        mode: how it reaches the engine; None: as the pool is served.

    Raises:
        NotFoundError: a name is not in the pool.
        MethodNotServedError: the method needs merged parameters, and the mode is another.
        InvalidMixError: no weight, one that is not finite, or the method's rule is broken: a sum that is not 1 within
            1e-6, a base that does not count 1, another number of models; or a parameter of the method is out of range.
    """
    chosen = find_method(method)
    mode = mode or pool.mode
    check_mode(chosen.name, mode)
    checked_params = chosen.check_params(method_params or {})
    base = pool.base.fingerprint
    by_fingerprint: dict[str, float] = {}
    for name, weight in merging_weights.items():
        member = pool.member(name, param=f"merging_weights.{name}")
        value = _finite(name, weight)
        if chosen.adds_task_vectors and name != BASE and member.fingerprint == base:
            continue  # a copy of the base has no task vector
        # two names of the same parameters are one ingredient
        by_fingerprint[member.fingerprint] = by_fingerprint.get(member.fingerprint, 0.0) + value
    if chosen.adds_task_vectors:
        if not merging_weights:
            raise InvalidMixError("merging_weights names no model: there is nothing to mix", param="merging_weights")
        by_fingerprint.setdefault(base, 1.0)
    keeps_zeros = chosen.num_models is not None
    taking_part = {f: w for f, w in by_fingerprint.items() if w != 0.0 or keeps_zeros}
    order = sorted(taking_part, key=lambda f: (f != base, f))
    coefficients = tuple((f, taking_part[f]) for f in order)
    _check_rule(chosen, base, coefficients)
    return Recipe(base, coefficients, dtype, chosen.name, checked_params, mode)


def one_hot(pool: Pool, name: str, *, dtype: DType, mode: Mode | None = None) -> Recipe:
    """The recipe that is one model of the pool itself; `mode` as of `make_recipe`."""
    return make_recipe(pool, {name: 1.0}, dtype=dtype, mode=mode)


def check_mode(method: str, mode: Mode) -> None:
    """Raises MethodNotServedError where mixtures of a method do not come in a mode."""
    if mode == "unmerged" and not METHODS[method].is_weighted_sum:
        linear = " and ".join(sorted(name for name, each in METHODS.items() if each.is_weighted_sum))
        raise MethodNotServedError(
            f"method {method!r} needs merged parameters, and this pool is served unmerged, which {linear} alone can "
            "be: use one of them, or have the operator serve the models in a pool with engine.mode: merged",
            param="method",
        )


def settings_of(recipe: Recipe, pool: Pool) -> GenerationSettings | None:
    """How a mixture of a pool's models is called, by its recipe alone; None where the pool lacks one of the models.

    Of two names of the same parameters, the first counts.
    """
    members = pool.by_fingerprint
    if not {recipe.base, *(fingerprint for fingerprint, _ in recipe.coefficients)} <= members.keys():
        return None
    if recipe.only_model is not None:
        return pool.generation_of(members[recipe.only_model])
    experts = [members[f].generation for f, weight in recipe.coefficients if f != recipe.base and weight > 0.0]
    return mixed_settings(members[recipe.base].generation, experts, chat_template=pool.chat_template)


def _check_rule(method: Method, base: str, coefficients: Sequence[tuple[str, float]]) -> None:
    if method.adds_task_vectors:
        if not coefficients or coefficients[0] != (base, 1.0):
            raise InvalidMixError(
                f"method {method.name!r} adds task vectors to the base, whose coefficient is always 1; leave it out, "
                "or give 1",
                param=f"merging_weights.{BASE}",
            )
        return
    if method.num_models is not None and len(coefficients) != method.num_models:
        raise InvalidMixError(
            f"method {method.name!r} mixes {method.num_models} different models, got {len(coefficients)}",
            param="merging_weights",
        )
    total = math.fsum(coefficient for _, coefficient in coefficients)
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise InvalidMixError(
            f"merging weights of method {method.name!r} must sum to 1 within {SUM_TOLERANCE:g}, these sum to "
            f"{total:.9g}; scale them, or leave them out and give examples",
            param="merging_weights",
        )


def _finite(name: str, weight: Any) -> float:
    try:
        value = float(weight) if isinstance(weight, int | float) and not isinstance(weight, bool) else math.nan
    except OverflowError:  # an integer of JSON can be larger than any float
        value = math.inf
    if not math.isfinite(value):
        raise InvalidMixError(
            f"the weight of {name!r} must be a finite number, got {weight!r:.40}", param=f"merging_weights.{name}"
        )
    return value
