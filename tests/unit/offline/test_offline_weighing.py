"""Weighing without a server: the rules are the server's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from cocktail_serve.cocktails.options import CocktailOptions
from cocktail_serve.errors import NotFiniteError
from cocktail_serve.offline.weighing import weigh_by
from cocktail_serve.pool import Pool
from cocktail_serve.recipe import Recipe
from tests.fakes import make_fake_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_fake_pool(tmp_path_factory.mktemp("pool"))


def losses_of(overflows: Callable[[Recipe], bool]) -> Callable[[Recipe, Sequence[int] | None], list[float]]:
    """Losses of three examples; those of recipes that overflow are not finite from the second on."""

    def of_recipe(recipe: Recipe, rows: Sequence[int] | None) -> list[float]:
        losses = [1.0, math.inf, math.nan] if overflows(recipe) else [1.0, 2.0, 3.0]
        return [losses[row] for row in (range(3) if rows is None else rows)]

    return of_recipe


def weigh(pool: Pool, weighting: str, overflows: Callable[[Recipe], bool]) -> None:
    options = CocktailOptions(
        name="films",
        pool=pool.id,
        pool_fingerprint=pool.fingerprint,
        peers=("base", "ag-news", "nq"),
        weighting=weighting,
        temperature=1.0,
    )
    weigh_by(pool, options, losses_of(overflows), "float16", lambda *_: None)


def test_a_loss_that_is_not_finite_is_told_as_the_server_tells_it(pool: Pool) -> None:
    with pytest.raises(NotFiniteError) as caught:
        weigh(pool, "softmax", lambda recipe: recipe.only_model == pool.member("nq").fingerprint)
    assert (caught.value.code, caught.value.param) == ("not_finite", "examples")
    assert caught.value.message == (
        "row 2: the loss of 'nq' on this example is inf: what it computes overflows in float16; leave the model out "
        "with 'experts', or have engine.dtype set to float32"
    )


def test_so_is_one_of_a_mixture_that_was_tried(pool: Pool) -> None:
    with pytest.raises(NotFiniteError, match=r"^row 2: the loss of the mixture on this example is inf: .*'experts'"):
        weigh(pool, "search", lambda recipe: recipe.only_model is None)
