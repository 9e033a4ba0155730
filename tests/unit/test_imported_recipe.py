"""A recipe that travels: read as servers and folders write it, and taken only where the same bits come of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.checkpoints.folder import describe
from cocktail_serve.errors import InvalidMixError, MethodNotServedError
from cocktail_serve.gateway.schemas.cocktails import RecipeView
from cocktail_serve.imported_recipe import read_recipe
from cocktail_serve.methods import METHODS
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import Recipe, make_recipe


def member(name: str, fingerprint: str) -> Member:
    return Member(name, Path("/models") / name, fingerprint * 64, "bfloat16", 100)


HERE = Pool("flan", "decoder", member("base", "b"), {"ag-news": member("ag-news", "f"), "nq": member("nq", "a")}, "t")
THERE = Pool("other", "decoder", member("base", "b"), {"news": member("news", "f"), "qa": member("qa", "a")}, "t")
"""The same models by other names."""

RECIPE = make_recipe(HERE, {"base": 0.1, "ag-news": 0.2, "nq": 0.7}, dtype="bfloat16")


def exported(recipe: Recipe, pool: Pool = HERE) -> dict[str, Any]:
    """As it travels."""
    value: dict[str, Any] = json.loads(RecipeView.of(recipe, pool).model_dump_json())
    return value


def refused(value: Any, pool: Pool = THERE, *, dtype: Any = "bfloat16") -> InvalidMixError:
    with pytest.raises(InvalidMixError) as caught:
        read_recipe(value).weights_in(pool, dtype=dtype)
    return caught.value


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_is_the_same_recipe_under_other_names(method: str, mode: Any) -> None:
    if mode == "unmerged" and not METHODS[method].is_weighted_sum:
        return
    pool, weights = replace(HERE, mode=mode), {"ag-news": 0.3, "nq": 0.7}
    recipe = make_recipe(pool, weights, dtype="bfloat16", method=method)
    there = replace(THERE, mode=mode)
    imported = read_recipe(exported(recipe, pool))
    made = imported.weights_in(there, dtype="bfloat16")
    assert made.items() >= {"news": 0.3, "qa": 0.7}.items()
    again = make_recipe(there, made, dtype="bfloat16", method=method, method_params=imported.recipe.method_params)
    assert again.digest == recipe.digest


def test_a_folders_file_is_the_same() -> None:
    imported = read_recipe(json.loads(json.dumps(describe(RECIPE, HERE))))
    assert imported == replace(read_recipe(exported(RECIPE)), names=imported.names)
    assert imported.names == {"b" * 64: "base", "f" * 64: "ag-news", "a" * 64: "nq"}
    assert imported.weights_in(THERE, dtype="bfloat16") == {"base": 0.1, "qa": 0.7, "news": 0.2}


def test_another_base_is_refused() -> None:
    error = refused(exported(RECIPE), replace(THERE, base=member("base", "c")))
    assert error.param == "recipe.base"
    assert "of the base bbbbbbbbbbbb, and that of pool 'other' is cccccccccccc" in error.message
    assert "name a pool of the recipe's base" in error.message


def test_experts_that_the_pool_lacks_are_named_as_they_are_called_there() -> None:
    pool = replace(THERE, experts={"news": member("news", "f"), "qa": member("qa", "d")})
    error = refused(exported(RECIPE), pool)
    assert error.param == "recipe.coefficients"
    assert "lacks what the recipe mixes: 'nq' (aaaaaaaaaaaa);" in error.message
    assert "POST /admin/pools/other/experts" in error.message
    assert "mixes: aaaaaaaaaaaa;" in refused(RECIPE.to_json(), pool).message


def test_of_many_experts_that_are_lacking_a_few_are_named() -> None:
    coefficients = [[digit * 64, 0.125] for digit in "01234567"]
    message = refused(RECIPE.to_json() | {"coefficients": coefficients}).message
    assert "444444444444, 8 in all; have the operator add" in message
    assert "5" * 12 not in message


def test_another_dtype_is_refused_with_the_coefficients_to_give_instead() -> None:
    error = refused(exported(RECIPE), dtype="float16")
    assert error.param == "recipe.dtype"
    assert "rounds to bfloat16, and pool 'other' runs in float16: have the operator set engine.dtype: bfloat16" in (
        error.message
    )
    fields = json.loads(error.message.partition("other bits: ")[2])
    assert fields == {"merging_weights": {"base": 0.1, "qa": 0.7, "news": 0.2}}
    ties = make_recipe(HERE, {"nq": 0.7}, dtype="bfloat16", method="ties", method_params={"density": 0.5})
    told = json.loads(refused(exported(ties), dtype="float16").message.partition("other bits: ")[2])
    body = {"merging_weights": {"base": 1.0, "qa": 0.7}, "method": "ties", "method_params": ties.method_params}
    assert told == body


@pytest.mark.parametrize(("recipes", "pools"), [("merged", "unmerged"), ("unmerged", "merged")])
def test_another_mode_is_refused(recipes: Any, pools: Any) -> None:
    error = refused(exported(replace(RECIPE, mode=recipes)), replace(THERE, mode=pools))
    assert error.param == "recipe.form"
    assert f"the recipe is {recipes}, and pool 'other' is served {pools}" in error.message
    assert f"engine.mode: {recipes}" in error.message


def test_a_method_that_needs_merged_parameters_is_told_as_such() -> None:
    error = refused(
        exported(make_recipe(HERE, {"nq": 1.0}, dtype="bfloat16", method="ties")), replace(THERE, mode="unmerged")
    )
    assert isinstance(error, MethodNotServedError)
    assert error.param == "recipe.method"


@pytest.mark.parametrize(
    "coefficients",
    [[["a" * 64, 0.7], ["b" * 64, 0.3]], [["b" * 64, 1.0], ["a" * 64, 0.0]]],
    ids=["the base last", "with a zero"],
)
def test_an_order_of_accumulation_that_nobody_writes_is_refused(coefficients: Any) -> None:
    error = refused(RECIPE.to_json() | {"coefficients": coefficients})
    assert error.param == "recipe.coefficients"
    assert "export it again" in error.message


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"coefficients": [["b" * 64, 0.2], ["a" * 64, 0.8]]}, "recipe.digest"),
        ({"form": "unmerged"}, "recipe.digest"),
        ({"digest": 3}, "recipe.digest"),
        ({"version": 1}, "recipe"),
        ({"dtype": "int8"}, "recipe"),
        ({"method": "fisher"}, "recipe.method"),
        ({"method_params": {"density": 1}}, "recipe.method_params"),
        ({"coefficients": [["b" * 64, 0.2]]}, "recipe.coefficients"),
        ({"coefficients": [["b" * 64, "1"]]}, "recipe.coefficients"),
        ({"base": None}, "recipe.digest"),
    ],
    ids=str,
)
def test_what_was_changed_on_its_way_is_refused(changes: Mapping[str, Any], param: str) -> None:
    assert refused({**exported(RECIPE), **changes}).param == param


@pytest.mark.parametrize("value", [[], "x", 1, {}, {"recipe": 3}, {"recipe": {"recipe": {}}}], ids=str)
def test_what_is_no_recipe_is_refused(value: Any) -> None:
    assert (refused(value).param or "").startswith("recipe")


def test_a_field_that_nobody_knows_is_refused_unless_the_digest_says_that_it_does_not_count() -> None:
    assert "unknown field 'mode'" in refused(RECIPE.to_json() | {"mode": "unmerged"}).message
    later = exported(RECIPE) | {"made_by": "a later release"}
    assert read_recipe(later).recipe == RECIPE
    assert read_recipe(exported(RECIPE) | {"names": [1]}).names == {}
