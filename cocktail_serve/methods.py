"""The merging methods by name: their rules for coefficients and the checks of their parameters.

Recipes, requests and the documentation read this table; what each method computes is in `merging/merger.py`. Imports no
torch: a request is checked where no tensor is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cocktail_serve.errors import InvalidMixError
from cocktail_serve.pool import BASE
from cocktail_serve.suggestions import did_you_mean

MethodName = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"]

SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Option:
    """One parameter of a method, as `method_params` takes it.

    Attributes:
        kind: `number` (finite), `share` (above 0, at most 1), `flag` or `seed` (an integer of 64 bits).
    """

    kind: Literal["number", "share", "flag", "seed"]
    default: float | bool | int
    meaning: str

    @property
    def range(self) -> str:
        """What values it takes, in words."""
        return {
            "number": "a finite number",
            "share": "a number above 0 and at most 1",
            "flag": "true or false",
            "seed": "an integer of 64 bits",
        }[self.kind]

    def check(self, value: Any, *, param: str) -> float | bool | int:
        """The value as recipes hold it: 1 and 1.0 are one number and so one digest.

        Raises:
            InvalidMixError: another type, or out of range.
        """
        is_flag, is_integer = isinstance(value, bool), isinstance(value, int)
        if self.kind == "flag" and is_flag:
            return bool(value)
        if self.kind == "seed" and is_integer and not is_flag and -(2**63) <= value < 2**63:
            return int(value)
        if self.kind in ("number", "share") and isinstance(value, int | float) and not is_flag:
            try:
                number = float(value)
            except OverflowError:  # an integer of JSON can be larger than any float
                number = math.inf
            if math.isfinite(number) and (self.kind == "number" or 0.0 < number <= 1.0):
                return number
        raise InvalidMixError(f"{param} must be {self.range}, got {value!r:.40}", param=param)


@dataclass(frozen=True, slots=True)
class Method:
    """What a recipe of this method may hold.

    Attributes:
        paper: where it comes from.
        adds_task_vectors: whether coefficients scale differences to the base, which itself counts 1, and may be any
            finite numbers. Otherwise they are shares of models and sum to 1.
        num_models: how many models it mixes, exactly; None: any number.
        options: its parameters by name.
        is_weighted_sum: whether the mixture is the base plus a weighted sum of the models' differences to it, which can
            be served unmerged too.
    """

    name: MethodName
    paper: str
    adds_task_vectors: bool
    num_models: int | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    is_weighted_sum: bool = False

    def check_params(self, method_params: Mapping[str, Any], *, seed: int = 0) -> dict[str, Any]:
        """`method_params` with what was left out filled in.

        Args:
            seed: default of the parameter `seed`, where the method has one.

        Raises:
            InvalidMixError: an unknown name, or a value out of range; `param` names it.
        """
        unknown = sorted(set(method_params) - set(self.options))
        if unknown:
            if not self.options:
                raise InvalidMixError(f"method {self.name!r} takes no parameters, got {unknown}", param="method_params")
            raise InvalidMixError(
                f"method {self.name!r} has no parameter {unknown[0]!r}; it takes: {', '.join(self.options)}"
                f"{did_you_mean(unknown[0], self.options)}",
                param=f"method_params.{unknown[0]}",
            )
        given = {name: option.default for name, option in self.options.items()}
        if "seed" in given:
            given["seed"] = seed
        given |= method_params
        return {name: option.check(given[name], param=f"method_params.{name}") for name, option in self.options.items()}

    def coefficients(self, merging_weights: Mapping[str, float]) -> dict[str, float]:
        """The coefficients that merging weights over base, experts and target stand for, by model name.

        A method of task vectors scales each expert's by the expert's weight; the base's own share adds nothing, since
        the base is there whole.
        """
        if self.adds_task_vectors:
            return {BASE: 1.0} | {name: weight for name, weight in merging_weights.items() if name != BASE}
        return dict(merging_weights)


_DENSITY = "Share of each task vector's elements that is kept"
_LAMBDA = Option("number", 1.0, "Factor of the sum of task vectors.")
_NORMALIZE = "Divide by the sum of the weights whose models agree: a weighted mean instead of a sum."
_DARE = {
    "density": Option("share", 0.5, f"{_DENSITY}, drawn at random: 1 minus the paper's drop rate p."),
    "rescale": Option("flag", True, "Divide what is kept by density, so that its expectation stays."),
    "lambda": _LAMBDA,
    "seed": Option("seed", 0, "Seed of the draw; the request's `seed` if left out."),
}

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "LM-Cocktail, arXiv 2311.13534", adds_task_vectors=False, is_weighted_sum=True),
        Method(
            "task_arithmetic",
            "arXiv 2212.04089",
            adds_task_vectors=True,
            options={"lambda": _LAMBDA},
            is_weighted_sum=True,
        ),
        Method(
            "ties",
            "arXiv 2306.01708",
            adds_task_vectors=True,
            options={
                "density": Option("share", 0.2, f"{_DENSITY}, those of largest magnitude; the paper's k is 20 %."),
                "normalize": Option("flag", True, _NORMALIZE),
                "lambda": _LAMBDA,
            },
        ),
        Method("dare_linear", "arXiv 2311.03099", adds_task_vectors=True, options=_DARE),
        Method(
            "dare_ties",
            "arXiv 2311.03099 and 2306.01708",
            adds_task_vectors=True,
            options=_DARE | {"normalize": Option("flag", False, _NORMALIZE)},
        ),
        Method("slerp", "Shoemake, SIGGRAPH 1985", adds_task_vectors=False, num_models=2),
    )
}
assert set(METHODS) == set(get_args(MethodName))


def find_method(name: Any) -> Method:
    """The method of that name.

    Raises:
        InvalidMixError: there is none.
    """
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        meant = did_you_mean(name, METHODS) if isinstance(name, str) else ""
        raise InvalidMixError(f"method {name!r} is not known; use one of {', '.join(METHODS)}{meant}", param="method")
    return method
