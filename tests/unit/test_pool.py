"""The pool: models named by content."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cocktail_serve.errors import NotFoundError
from cocktail_serve.generation_settings import GenerationSettings
from cocktail_serve.pool import Member, Pool


def member(name: str, fingerprint: str | None = None) -> Member:
    return Member(name, Path("/models") / name, fingerprint or f"fp-{name}", "bfloat16", 100)


def pool(**changes: object) -> Pool:
    return dataclasses.replace(
        Pool("flan", "decoder", member("base"), {n: member(n) for n in ("nq", "ag-news")}, text_digest="text"),
        **changes,  # type: ignore[arg-type]
    )


def test_models_and_pools_can_be_told_apart_in_sets() -> None:
    called = dataclasses.replace(member("nq"), generation=GenerationSettings(sampling={"temperature": 0.5}))
    assert len({member("nq"), called, member("nq")}) == 2
    assert len({pool().base, pool().base}) == 1


def test_iterates_over_the_base_and_then_the_experts_by_name() -> None:
    assert [m.name for m in pool()] == ["base", "ag-news", "nq"]
    assert list(pool().members) == ["base", "ag-news", "nq"]


def test_fingerprint_does_not_depend_on_the_order_or_the_place_of_the_models() -> None:
    moved = {n: dataclasses.replace(member(n), path=Path("/elsewhere")) for n in ("ag-news", "nq")}
    assert pool(experts=moved).fingerprint == pool().fingerprint
    assert pool(id="another").fingerprint == pool().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "encoder"},
        {"base": member("base", "other")},
        {"text_digest": "other"},
        {"experts": {"nq": member("nq"), "ag-news": member("ag-news", "other")}},
        {"experts": {"nq": member("nq"), "agnews": member("ag-news")}},
        {"experts": {"nq": member("nq")}},
    ],
    ids=["kind", "base", "text", "expert", "name", "fewer"],
)
def test_fingerprint_changes_with_what_the_pool_is(changes: dict[str, object]) -> None:
    assert pool(**changes).fingerprint != pool().fingerprint


def test_the_base_stands_for_an_expert_of_the_same_parameters() -> None:
    """Servers are started on the base's folder, so a recipe of the base must lead there."""
    twin = dataclasses.replace(member("ag-news"), fingerprint=member("base").fingerprint)
    made = pool(experts={"ag-news": twin, "nq": member("nq")})
    paths = {fingerprint: found.path for fingerprint, found in made.by_fingerprint.items()}
    assert paths == {"fp-base": Path("/models/base"), "fp-nq": Path("/models/nq")}


def test_experts_cannot_be_added_later() -> None:
    experts = {"nq": member("nq")}
    made = pool(experts=experts)
    experts["late"] = member("late")
    assert list(made.experts) == ["nq"]
    with pytest.raises(TypeError):
        made.experts["late"] = member("late")  # type: ignore[index]


def test_unknown_expert_names_those_there_are() -> None:
    assert pool().member("nq").name == "nq"
    assert pool().member("base") == member("base")
    with pytest.raises(NotFoundError, match="no expert 'nope'; it has: base, ag-news, nq") as caught:
        pool().member("nope", param="target")
    assert caught.value.code == "expert_not_found"
    assert caught.value.param == "target"
