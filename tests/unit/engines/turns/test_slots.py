"""Slots shared out between tenants, by table: no loop, no clock."""

from __future__ import annotations

import pytest

from cocktail_serve.engines.fairness import HALF_LIFE_S, MAX_KEPT, ServedTokensByTenant
from cocktail_serve.engines.turns.slots import RETURN_S, Slots
from cocktail_serve.engines.turns.wait_queue import Claim
from cocktail_serve.recipe import Recipe

GAP_S = 2.0


def slots_of(
    max_in_flight: int | None,
    *,
    served_tokens: ServedTokensByTenant | None = None,
    max_beside: int | None = None,
    **in_flight: int,
) -> Slots:
    slots = Slots(
        served_tokens or ServedTokensByTenant(), max_in_flight=max_in_flight, gap_s=GAP_S, max_beside=max_beside
    )
    for tenant, number in in_flight.items():
        for _ in range(number):
            slots.take(tenant, 1, 0.0)
    return slots


def claim(tenant: str, arrived: float = 0.0) -> Claim:
    recipe = Recipe(base="base", coefficients=(("one", 1.0),), dtype="float32")
    return Claim(recipe=recipe, made_at=arrived, ranked_from=arrived, tenant=tenant)


@pytest.mark.parametrize(
    ("max_in_flight", "in_flight", "tenant", "expected"),
    [
        pytest.param(4, {}, "a", True, id="all are free"),
        pytest.param(4, {"a": 3}, "a", True, id="alone, the last one too"),
        pytest.param(4, {"a": 4}, "a", False, id="all are taken"),
        pytest.param(4, {"a": 4}, "b", False, id="by another"),
        pytest.param(4, {"a": 3}, "b", True, id="the first of a tenant"),
        pytest.param(4, {"a": 2, "b": 1}, "a", False, id="no more than a share of two"),
        pytest.param(4, {"a": 2, "b": 1}, "b", True, id="less than a share of two"),
        pytest.param(8, {"a": 2, "b": 1, "c": 1}, "a", False, id="a share of three is rounded down"),
        pytest.param(2, {"a": 1}, "c", True, id="more tenants than slots: the first of each"),
        pytest.param(2, {"a": 1, "b": 1}, "c", False, id="while there is one"),
        pytest.param(None, {"a": 1000, "b": 1}, "a", True, id="no bound"),
        pytest.param(1, {}, "a", True, id="one slot"),
    ],
)
def test_who_may_have_one_more(
    max_in_flight: int | None, in_flight: dict[str, int], tenant: str, expected: bool
) -> None:
    slots = slots_of(max_in_flight, **in_flight)
    assert slots.has_one_for(tenant, 0.0) is expected
    assert slots.num_taken == sum(in_flight.values())


@pytest.mark.parametrize(("since_s", "expected"), [(0.0, False), (GAP_S - 0.1, False), (GAP_S, True)])
def test_the_share_of_who_has_left_is_kept_for_a_moment(since_s: float, expected: bool) -> None:
    slots = slots_of(4, a=2, b=1)
    slots.leave("b", 10.0)
    assert slots.has_one_for("a", 10.0 + since_s) is expected


@pytest.mark.parametrize(
    ("in_flight", "tenant", "expected"),
    [
        pytest.param({"a": 15}, "a", True, id="alone, all"),
        pytest.param({"a": 4, "b": 1}, "a", True, id="as many as that beside another"),
        pytest.param({"a": 5, "b": 1}, "a", False, id="no more"),
        pytest.param({"a": 15, "b": 0}, "b", True, id="the other has its own"),
        pytest.param({"a": 5, "b": 4}, "a", False, id="one more than the other has"),
        pytest.param({"a": 5, "b": 5}, "a", True, id="two that flood go on in turn"),
        pytest.param({"a": 6, "b": 5}, "a", False, id="and never one alone"),
        pytest.param({"a": 6, "b": 5}, "b", True, id="but the other"),
        pytest.param({"a": 8, "b": 7}, "b", True, id="up to their shares"),
        pytest.param({"a": 8, "b": 8}, "b", False, id="as far as there are slots"),
        pytest.param({"a": 5, "b": 1, "c": 4}, "a", False, id="an equal share of three is no more"),
        pytest.param(dict.fromkeys("abcdefgh", 1), "a", True, id="many who ask a little"),
    ],
)
def test_a_tenant_that_floods_beside_others_that_ask_for_little(
    in_flight: dict[str, int], tenant: str, expected: bool
) -> None:
    assert slots_of(16, max_beside=5, **in_flight).has_one_for(tenant, 0.0) is expected


@pytest.mark.parametrize(
    ("came_s", "since_s", "expected"),
    [
        pytest.param(RETURN_S / 2, RETURN_S / 2, False, id="between two of its requests"),
        pytest.param(RETURN_S / 2, RETURN_S, True, id="it has not come back"),
        pytest.param(RETURN_S, 0.0, True, id="it asks now and then"),
    ],
)
def test_who_asks_one_thing_after_the_other_is_expected_back(came_s: float, since_s: float, expected: bool) -> None:
    slots = slots_of(16, max_beside=5, a=5, b=1)
    slots.leave("b", 10.0)
    slots.take("b", 1, 10.0 + came_s)
    slots.leave("b", 20.0)
    assert slots.has_one_for("a", 20.0 + since_s) is expected


def test_who_came_once_is_not_expected_back() -> None:
    slots = slots_of(16, max_beside=5, a=5, b=2)
    slots.take("b", 1, 0.1)
    for _ in range(3):
        slots.leave("b", 0.1)
    assert slots.has_one_for("a", 0.1)


def test_more_tenants_than_slots_have_a_first_one_each() -> None:
    slots = slots_of(2, a=1, b=1)
    slots.leave("a", 0.0)
    slots.leave("b", 0.0)
    slots.take("c", 1, 0.0)
    # a share of three in two slots is none
    assert slots.has_one_for("d", 0.0)
    assert not slots.has_one_for("c", 0.0)


def test_another_turn_keeps_no_share_of_the_last() -> None:
    slots = slots_of(4, a=2, b=1)
    slots.leave("b", 10.0)
    slots.share_anew()
    assert slots.has_one_for("a", 10.0)


@pytest.mark.parametrize(
    ("in_flight", "waiting", "expected"),
    [
        pytest.param({}, [], None, id="nobody waits"),
        pytest.param({}, [("a", 2.0), ("b", 1.0)], "b", id="who came first"),
        pytest.param({"a": 1}, [("a", 1.0), ("b", 2.0)], "b", id="who was served less"),
        pytest.param({"a": 2}, [("a", 1.0)], "a", id="alone, as many as there are"),
        pytest.param({"a": 2, "b": 1}, [("a", 1.0)], None, id="who may have no more"),
    ],
)
def test_whose_is_the_next_slot(
    in_flight: dict[str, int], waiting: list[tuple[str, float]], expected: str | None
) -> None:
    found = slots_of(4, **in_flight).first_in([claim(*each) for each in waiting], 0.0)
    assert (None if found is None else found.tenant) == expected


def test_slots_that_are_left_are_free_and_charges_stay() -> None:
    slots = slots_of(2)
    slots.take("a", 40, 0.0)
    slots.take("a", 40, 0.0)
    slots.leave("a", 0.0)
    assert (slots.num_taken, slots.of("a").num_in_flight, slots.of("a").left_at) == (1, 1, 0.0)
    assert slots.served("a", 0.0) == 80
    slots.charge("a", -30, HALF_LIFE_S)
    assert slots.served("a", HALF_LIFE_S) == 10
    assert slots.of("b").num_in_flight == 0


def test_engines_that_share_accounts_have_slots_of_their_own() -> None:
    served_tokens = ServedTokensByTenant()
    here, there = slots_of(2, served_tokens=served_tokens), slots_of(2, served_tokens=served_tokens, a=2)
    assert here.has_one_for("a", 0.0)
    assert not there.has_one_for("a", 0.0)
    here.take("b", 1, 0.0)
    # what it was served there counts here
    found = here.first_in([claim("a", 1.0), claim("b", 2.0)], 0.0)
    assert found is not None
    assert found.tenant == "b"


def test_who_is_served_or_was_a_moment_ago() -> None:
    slots = slots_of(None, a=1, b=1, c=1)
    slots.leave("b", 10.0)
    slots.leave("c", 7.0)
    assert set(slots.sharing(10.0, 1.0)) == {"a", "b"}
    assert set(slots.sharing(11.0, 1.0)) == {"a"}


def test_of_many_tenants_those_who_left_long_ago_are_forgotten() -> None:
    slots = slots_of(None, busy=1)
    for number in range(MAX_KEPT - 2):
        slots.take(str(number), 1, 0.0)
        slots.leave(str(number), 0.0)
    slots.take("late", 1, 1.0)
    slots.leave("late", 1.0)
    slots.take("new", 1, HALF_LIFE_S)
    assert slots.of("0").left_at == float("-inf")
    assert slots.of("late").left_at == 1.0
    assert (slots.of("busy").num_in_flight, slots.of("new").num_in_flight) == (1, 1)
