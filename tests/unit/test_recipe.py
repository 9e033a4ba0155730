"""The recipe: Eq. 1 and 3, the rule of the weights, and a digest that outlives the process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocktail_serve.errors import InvalidMixError, MethodNotServedError, NotFoundError
from cocktail_serve.methods import METHODS
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import DType, Recipe, make_recipe, one_hot
from cocktail_serve.weighting.softmax import with_target


def member(name: str, fingerprint: str) -> Member:
    return Member(name, Path("/models") / name, fingerprint, "bfloat16", 100)


POOL = Pool(
    "flan",
    "decoder",
    member("base", "m"),
    {"ag-news": member("ag-news", "z"), "nq": member("nq", "a"), "copy": member("copy", "a")},
    text_digest="text",
)


def test_base_goes_first_and_then_the_models_by_fingerprint() -> None:
    recipe = make_recipe(POOL, {"ag-news": 0.25, "nq": 0.25, "base": 0.5}, dtype="bfloat16")
    assert recipe.coefficients == (("m", 0.5), ("a", 0.25), ("z", 0.25))
    assert recipe.base == "m"


def test_models_of_weight_0_take_no_part() -> None:
    recipe = make_recipe(POOL, {"base": -0.0, "ag-news": 0.0, "nq": 1.0}, dtype="bfloat16")
    assert recipe.coefficients == (("a", 1.0),)
    assert recipe == one_hot(POOL, "nq", dtype="bfloat16")
    assert recipe.only_model == "a"


def test_two_names_of_the_same_parameters_are_one_ingredient() -> None:
    assert make_recipe(POOL, {"nq": 0.4, "copy": 0.6}, dtype="bfloat16").coefficients == (("a", 1.0),)


@pytest.mark.parametrize("weights", [{"base": 0.1, "nq": 0.1}, {}, {"base": 1.0, "nq": 2e-6}, {"base": 2.0}])
def test_weights_that_do_not_sum_to_1_are_refused(weights: dict[str, float]) -> None:
    """The reference's check lets a sum of 0.2 pass."""
    with pytest.raises(InvalidMixError, match="must sum to 1 within 1e-06, these sum to"):
        make_recipe(POOL, weights, dtype="bfloat16")


def test_sum_has_a_tolerance_and_weights_may_be_negative() -> None:
    make_recipe(POOL, {"base": 1.0, "nq": 9e-7}, dtype="bfloat16")
    make_recipe(POOL, {"base": 1.5, "nq": -0.5}, dtype="bfloat16")


@pytest.mark.parametrize("weight", [True, "0.5", None, float("nan"), float("inf"), 10**400, [1.0]])
def test_a_weight_that_is_no_finite_number_is_named(weight: object) -> None:
    with pytest.raises(InvalidMixError, match="weight of 'nq' must be a finite number") as caught:
        make_recipe(POOL, {"base": 0.5, "nq": weight}, dtype="bfloat16")  # type: ignore[dict-item]
    assert caught.value.param == "merging_weights.nq"


def test_unknown_model_and_method() -> None:
    with pytest.raises(NotFoundError) as caught:
        make_recipe(POOL, {"base": 0.5, "nope": 0.5}, dtype="bfloat16")
    assert caught.value.param == "merging_weights.nope"
    with pytest.raises(InvalidMixError, match="'fisher' is not known") as unknown:
        make_recipe(POOL, {"base": 1.0}, dtype="bfloat16", method="fisher")
    assert unknown.value.param == "method"
    with pytest.raises(InvalidMixError, match="takes no parameters"):
        make_recipe(POOL, {"base": 1.0}, dtype="bfloat16", method_params={"density": 0.5})


def test_digest_is_the_same_in_every_process_and_release() -> None:
    recipe = make_recipe(POOL, {"base": 0.1, "nq": 0.9}, dtype="bfloat16")
    assert recipe.digest == "2eb2ededb8dcbd03ba68669a7156a1ca8a24041367c86256014fadc56e451869"


def test_digest_changes_with_all_that_decides_the_bits() -> None:
    recipes = [
        Recipe("m", (("m", 0.5), ("a", 0.5)), "bfloat16"),
        Recipe("m", (("a", 0.5), ("m", 0.5)), "bfloat16"),
        Recipe("m", (("m", 0.5), ("a", math.nextafter(0.5, 1.0))), "bfloat16"),
        Recipe("a", (("m", 0.5), ("a", 0.5)), "bfloat16"),
        Recipe("m", (("m", 0.5), ("a", 0.5)), "float32"),
    ]
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    assert len(set(recipes)) == len(recipes)


@given(st.floats(-10, 10))
def test_json_brings_back_the_same_recipe(weight: float) -> None:
    recipe = make_recipe(POOL, {"base": 1.0 - weight, "nq": weight}, dtype="float16")
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.digest == recipe.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"dtype": "int8"},
        {"method": "fisher"},
        {"method": ["ties"]},
        {"method": "slerp"},
        {"method": "ties", "method_params": {"density": 0}},
        {"method": "ties", "coefficients": [["a", 1.0]]},
        {"method": "ties", "coefficients": [["a", 0.5], ["m", 1.0]]},
        {"method": "ties", "coefficients": [["m", 0.5], ["a", 0.5]]},
        {"method": "ties", "coefficients": []},
        {"method_params": {"density": 1}},
        {"method_params": 3},
        {"coefficients": [["m", 0.1], ["a", 0.1]]},
        {"coefficients": [["m", 0.5], ["m", 0.5]]},
        {"coefficients": [["m", "1"]]},
        {"coefficients": [["m", float("nan")]]},
        {"coefficients": [["m"]]},
        {"coefficients": 1},
        {"coefficients": []},
    ],
    ids=str,
)
def test_json_that_is_no_recipe_is_refused(changes: dict[str, object]) -> None:
    value = one_hot(POOL, "base", dtype="bfloat16").to_json() | changes
    with pytest.raises(InvalidMixError):
        Recipe.from_json(value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_json_of_every_dtype_is_read(dtype: DType) -> None:
    recipe = one_hot(POOL, "base", dtype=dtype)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"version": 1}, "recipe version 1 is not supported; this release reads version 2", None),
        ({"dtype": "int8"}, "recipe dtype 'int8' is not float32, float16 or bfloat16", None),
        (
            {"coefficients": [["m", 0.5], ["m", 0.5]]},
            "not a recipe: a model has two coefficients",
            "recipe.coefficients",
        ),
        (
            {"coefficients": [["m", float("inf")]]},
            "the weight of 'm' must be a finite number, got inf",
            "merging_weights.m",
        ),
    ],
    ids=str,
)
def test_json_that_is_no_recipe_says_why(changes: dict[str, object], message: str, param: str | None) -> None:
    with pytest.raises(InvalidMixError) as caught:
        Recipe.from_json(one_hot(POOL, "base", dtype="bfloat16").to_json() | changes)
    assert (str(caught.value), caught.value.param) == (message, param)


@pytest.mark.parametrize("key", ["version", "base", "coefficients", "method", "method_params", "dtype"])
def test_json_without_a_field_is_refused(key: str) -> None:
    value = one_hot(POOL, "base", dtype="bfloat16").to_json()
    del value[key]
    with pytest.raises(InvalidMixError, match=key):
        Recipe.from_json(value)


TASK_VECTOR_METHODS = [name for name, method in METHODS.items() if method.adds_task_vectors]


@pytest.mark.parametrize("method", TASK_VECTOR_METHODS)
def test_coefficients_of_task_vectors_are_any_finite_numbers_and_the_base_counts_1(method: str) -> None:
    recipes = [
        make_recipe(POOL, weights, dtype="bfloat16", method=method)
        for weights in ({"ag-news": 1.7, "nq": -0.3}, {"base": 1, "nq": -0.3, "ag-news": 1.7})
    ]
    assert recipes[0] == recipes[1]
    assert recipes[0].coefficients == (("m", 1.0), ("a", -0.3), ("z", 1.7))
    assert recipes[0].only_model is None


@pytest.mark.parametrize("method", TASK_VECTOR_METHODS)
@pytest.mark.parametrize("weight", [0.0, 0.9, 2])
def test_another_coefficient_of_the_base_is_refused(method: str, weight: float) -> None:
    with pytest.raises(
        InvalidMixError, match=r"base, whose coefficient is always 1; leave it out, or give 1$"
    ) as caught:
        make_recipe(POOL, {"base": weight, "nq": 0.5}, dtype="bfloat16", method=method)
    assert caught.value.param == "merging_weights.base"


def test_without_task_vectors_the_base_is_left() -> None:
    """A copy of the base, and an expert of coefficient 0, add nothing."""
    pool = replace(POOL, experts={**POOL.experts, "twin": member("twin", "m")})
    recipe = make_recipe(pool, {"twin": 0.4, "nq": 0.0}, dtype="bfloat16", method="ties")
    assert recipe.coefficients == (("m", 1.0),)
    recipe = make_recipe(pool, {"twin": 0.4, "nq": 0.3}, dtype="bfloat16", method="ties")
    assert recipe.coefficients == (("m", 1.0), ("a", 0.3)), "and hide none that comes after"


def test_no_weights_at_all_are_refused() -> None:
    with pytest.raises(InvalidMixError) as caught:
        make_recipe(POOL, {}, dtype="bfloat16", method="ties")
    assert str(caught.value) == "merging_weights names no model: there is nothing to mix"
    assert caught.value.param == "merging_weights"


def test_slerp_keeps_its_two_models_whatever_their_coefficients() -> None:
    recipe = make_recipe(POOL, {"nq": 1.0, "base": 0.0}, dtype="bfloat16", method="slerp")
    assert recipe.coefficients == (("m", 0.0), ("a", 1.0))


@pytest.mark.parametrize(
    "weights", [{"base": 1.0}, {"nq": 0.5, "copy": 0.5}, {"base": 0.2, "nq": 0.3, "ag-news": 0.5}], ids=str
)
def test_slerp_takes_two_different_models(weights: dict[str, float]) -> None:
    with pytest.raises(InvalidMixError, match="mixes 2 different models, got") as caught:
        make_recipe(POOL, weights, dtype="bfloat16", method="slerp")
    assert caught.value.param == "merging_weights"


def test_the_weights_of_slerp_sum_to_1() -> None:
    with pytest.raises(InvalidMixError, match="'slerp' must sum to 1") as caught:
        make_recipe(POOL, {"base": 0.5, "nq": 0.6}, dtype="bfloat16", method="slerp")
    assert caught.value.param == "merging_weights"


def test_a_recipe_records_every_parameter_of_its_method() -> None:
    recipes = [
        make_recipe(POOL, {"nq": 0.5}, dtype="bfloat16", method="dare_ties", method_params=given)
        for given in ({}, {"density": 0.5, "rescale": True, "lambda": 1, "seed": 0, "normalize": False})
    ]
    assert recipes[0].digest == recipes[1].digest
    assert recipes[0].method_params == {
        "density": 0.5,
        "rescale": True,
        "lambda": 1.0,
        "seed": 0,
        "normalize": False,
    }


@pytest.mark.parametrize(
    "given", [{}, {"density": 0.25}, {"rescale": False}, {"lambda": 0.5}, {"seed": 1}, {"normalize": True}], ids=str
)
def test_json_brings_back_method_and_parameters(given: dict[str, object]) -> None:
    recipe = make_recipe(POOL, {"nq": 0.5}, dtype="bfloat16", method="dare_ties", method_params=given)
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.digest == recipe.digest
    default = make_recipe(POOL, {"nq": 0.5}, dtype="bfloat16", method="dare_ties")
    assert (recipe.digest == default.digest) == (not given)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("ties", "density", 0.0),
        ("ties", "density", 1.0001),
        ("ties", "density", "0.5"),
        ("ties", "density", True),
        ("ties", "normalize", 1),
        ("ties", "lambda", float("inf")),
        ("ties", "lambda", 10**400),
        ("ties", "seed", 1),
        ("task_arithmetic", "density", 0.5),
        ("dare_linear", "normalize", True),
        ("dare_linear", "seed", 2**63),
        ("dare_linear", "seed", 1.0),
        ("dare_linear", "seed", True),
        ("dare_linear", "rescale", None),
    ],
)
def test_a_parameter_out_of_range_is_named(method: str, name: str, value: object) -> None:
    with pytest.raises(InvalidMixError, match=name) as caught:
        make_recipe(POOL, {"nq": 0.5}, dtype="bfloat16", method=method, method_params={name: value})
    assert caught.value.param == f"method_params.{name}"


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidMixError, match="not a recipe"):
        Recipe.from_json([])  # type: ignore[arg-type]


def test_eq_1_target_and_peers() -> None:
    weights = with_target({"base": 0.25, "nq": 0.75}, target="ag-news", alpha=0.4)
    assert weights == pytest.approx({"base": 0.15, "nq": 0.45, "ag-news": 0.4})
    assert math.fsum(weights.values()) == pytest.approx(1.0)


def test_eq_1_without_target_is_the_mixture_of_the_others() -> None:
    assert with_target({"base": 0.25, "nq": 0.75}, target=None, alpha=0.4) == {"base": 0.25, "nq": 0.75}


def test_eq_3_mono_specialist() -> None:
    assert with_target(None, target="nq", alpha=0.7) == pytest.approx({"base": 0.3, "nq": 0.7})
    assert with_target(None, target="base", alpha=0.7) == pytest.approx({"base": 1.0})


@pytest.mark.parametrize(("alpha", "expected"), [(0, {"base": 1.0, "nq": 0.0}), (1, {"base": 0.0, "nq": 1.0})])
def test_alpha_reaches_both_ends(alpha: float, expected: dict[str, float]) -> None:
    assert with_target({"base": 1.0}, target="nq", alpha=alpha) == expected


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf"), "0.5", None, True, 10**400])
def test_alpha_out_of_bounds(alpha: object) -> None:
    with pytest.raises(InvalidMixError, match="alpha must lie between 0 and 1") as caught:
        with_target({"base": 1.0}, target="nq", alpha=alpha)  # type: ignore[arg-type]
    assert caught.value.param == "alpha"


def test_the_target_is_not_its_own_peer() -> None:
    with pytest.raises(InvalidMixError, match="'nq' is among the peers") as caught:
        with_target({"base": 0.5, "nq": 0.5}, target="nq")
    assert caught.value.param == "target"
    with pytest.raises(InvalidMixError, match="'base' is among the peers"):
        with_target({"base": 0.5, "nq": 0.5}, target="base")


def test_nothing_to_mix() -> None:
    with pytest.raises(InvalidMixError) as caught:
        with_target(None, target=None)
    assert str(caught.value) == "give examples, merging_weights or a target: there is nothing to mix"
    assert caught.value.param == "examples"


class TestMode:
    """How a recipe reaches the engine: part of what it is, where it is not merged."""

    MERGED = make_recipe(POOL, {"base": 0.5, "ag-news": 0.3, "nq": 0.2}, dtype="bfloat16")
    UNMERGED = make_recipe(POOL, {"base": 0.5, "ag-news": 0.3, "nq": 0.2}, dtype="bfloat16", mode="unmerged")

    def test_digests_of_merged_recipes_are_what_they_were(self) -> None:
        assert "form" not in self.MERGED.to_json()
        assert self.MERGED.mode == "merged"
        assert self.UNMERGED.to_json() == {**self.MERGED.to_json(), "form": "unmerged"}
        assert self.UNMERGED.digest != self.MERGED.digest

    @pytest.mark.parametrize("recipe", [MERGED, UNMERGED], ids=["merged", "unmerged"])
    def test_it_is_read_back(self, recipe: Recipe) -> None:
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe

    def test_it_is_the_pools_unless_another_is_named(self) -> None:
        pool = replace(POOL, mode="unmerged")
        assert one_hot(pool, "nq", dtype="bfloat16") == one_hot(POOL, "nq", dtype="bfloat16", mode="unmerged")
        assert one_hot(pool, "nq", dtype="bfloat16", mode="merged") == one_hot(POOL, "nq", dtype="bfloat16")
        assert pool.fingerprint == POOL.fingerprint

    def test_coefficients_of_a_linear_mixture_are_the_experts_own(self) -> None:
        assert self.UNMERGED.task_vector_coefficients == {"a": 0.2, "z": 0.3}
        assert one_hot(POOL, "nq", dtype="bfloat16").task_vector_coefficients == {"a": 1.0}
        assert one_hot(POOL, "base", dtype="bfloat16").task_vector_coefficients == {}

    def test_coefficients_of_task_arithmetic_are_scaled(self) -> None:
        params = {"lambda": 0.5}
        recipe = make_recipe(
            POOL,
            {"ag-news": 0.4, "nq": 2.0},
            dtype="bfloat16",
            method="task_arithmetic",
            method_params=params,
            mode="unmerged",
        )
        assert recipe.task_vector_coefficients == {"z": 0.2, "a": 1.0}

    @pytest.mark.parametrize("name", sorted(METHODS))
    def test_a_method_that_is_no_sum_needs_merged_parameters(self, name: str) -> None:
        weights = {"ag-news": 0.5, "nq": 0.5}
        recipe = make_recipe(POOL, weights, dtype="bfloat16", method=name)
        if METHODS[name].is_weighted_sum:
            assert make_recipe(POOL, weights, dtype="bfloat16", method=name, mode="unmerged").mode == "unmerged"
            return
        for refused in (
            lambda: make_recipe(POOL, weights, dtype="bfloat16", method=name, mode="unmerged"),
            lambda: Recipe.from_json({**recipe.to_json(), "form": "unmerged"}),
            lambda: recipe.task_vector_coefficients,
        ):
            with pytest.raises(MethodNotServedError, match=r"linear and task_arithmetic alone.*engine\.mode") as caught:
                refused()
            assert caught.value.param == "method"

    @pytest.mark.parametrize("form", ["folded", None, 1])
    def test_another_form_is_none(self, form: object) -> None:
        with pytest.raises(InvalidMixError, match=r"recipe form .* is not one of merged, unmerged"):
            Recipe.from_json({**self.MERGED.to_json(), "form": form})
