"""How a mixture is called, by how its models are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cocktail_serve.generation_settings import ChatTemplate, GenerationSettings, ignores_end, mixed_settings
from cocktail_serve.pool import Member, Pool
from cocktail_serve.recipe import make_recipe, one_hot, settings_of

OF_POOL, OF_EXPERT = ChatTemplate("pool's"), ChatTemplate("expert's")


def settings(*stops: int, template: ChatTemplate | None = None, **sampling: float) -> GenerationSettings:
    return GenerationSettings(stops[:1], tuple(sorted(stops)), sampling, template)


def member(name: str, generation: GenerationSettings, fingerprint: str | None = None) -> Member:
    return Member(name, Path("/models") / name, fingerprint or f"fp-{name}", "float32", 8, generation=generation)


BASE = settings(2, top_p=0.9, template=OF_POOL)
CHAT = settings(7, 8, temperature=0.6, template=OF_EXPERT)
POOL = Pool(
    "flan",
    "decoder",
    member("base", BASE),
    {
        "chat": member("chat", CHAT),
        "like-chat": member("like-chat", settings(9, temperature=0.6)),
        "plain": member("plain", settings(2)),
    },
    "text",
    chat_template=OF_POOL,
)


def called(**weights: float) -> GenerationSettings:
    found = settings_of(make_recipe(POOL, weights, dtype="float32"), POOL)
    assert found is not None
    return found


def test_what_ends_any_of_its_models_ends_a_mixture() -> None:
    both = called(base=0.3, chat=0.7)
    assert (both.end_token_ids, both.stop_token_ids) == ((2, 7), (2, 7, 8))
    assert called(**{"chat": 0.5, "like-chat": 0.5}).stop_token_ids == (2, 7, 8, 9), "the base's, which the engine runs"


@pytest.mark.parametrize(
    ("weights", "sampling"),
    [
        ({"base": 0.9, "chat": 0.1}, {"temperature": 0.6}),
        ({"chat": 0.5, "like-chat": 0.5}, {"temperature": 0.6}),
        ({"chat": 0.5, "plain": 0.5}, {"top_p": 0.9}),
        ({"base": 0.5, "plain": 0.5}, {}),
        ({"base": 1.5, "chat": -0.5}, {"top_p": 0.9}),
        ({"base": 0.5, "plain": 1.0, "chat": -0.5}, {}),
    ],
    ids=str,
)
def test_sampling_defaults_are_the_experts_where_they_agree(
    weights: dict[str, float], sampling: dict[str, float]
) -> None:
    assert called(**weights).sampling == sampling


def test_a_model_that_is_subtracted_ends_nothing() -> None:
    assert called(base=1.5, chat=-0.5).stop_token_ids == (2,)


def test_mixtures_are_asked_by_the_template_they_were_scored_with() -> None:
    assert called(base=0.1, chat=0.9).chat_template == OF_POOL


@pytest.mark.parametrize("name", ["base", "chat", "like-chat", "plain"])
def test_one_model_alone_is_called_as_itself(name: str) -> None:
    alone = POOL.generation_of(POOL.member(name))
    assert settings_of(one_hot(POOL, name, dtype="float32"), POOL) == alone
    own = POOL.member(name).generation
    assert (alone.end_token_ids, alone.sampling) == (own.end_token_ids, own.sampling)
    assert set(alone.stop_token_ids) == {*own.stop_token_ids, 2}
    assert alone.chat_template == (own.chat_template or OF_POOL)


def test_task_vectors_take_the_base_in() -> None:
    recipe = make_recipe(POOL, {"chat": 0.8}, dtype="float32", method="task_arithmetic")
    assert settings_of(recipe, POOL) == mixed_settings(BASE, [CHAT], chat_template=OF_POOL)


def test_two_names_of_the_same_parameters_are_the_first_in_a_mixture_and_themselves_alone() -> None:
    copied = replace(POOL, experts={"copy": member("copy", CHAT, "fp-base")})
    recipe = make_recipe(copied, {"base": 0.5, "copy": 0.5}, dtype="float32")
    assert settings_of(recipe, copied) == BASE
    assert copied.generation_of(copied.member("copy")).chat_template == OF_EXPERT


def test_a_pool_without_the_models_says_nothing() -> None:
    recipe = make_recipe(POOL, {"base": 0.5, "chat": 0.5}, dtype="float32")
    assert settings_of(recipe, replace(POOL, experts={})) is None


@pytest.mark.parametrize(
    ("value", "ignores"),
    [
        (None, False), (False, False), (0, False), ("false", False), ("no", False),
        (True, True), (1, True), ("true", True), ("Yes", True), ("on", True),
    ],
)  # fmt: skip
def test_values_are_read_as_vllm_reads_them(value: Any, ignores: bool) -> None:
    from pydantic import TypeAdapter

    assert ignores_end({"ignore_eos": value}) is ignores
    if value is not None:
        assert TypeAdapter(bool).validate_python(value) is ignores
