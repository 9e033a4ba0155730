"""Which engine a request goes to, by table: no loop, no clock, no engine. A slice is 2 s, a swap 0.5, a request 1."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocktail_serve.engines.load import EngineLoad
from cocktail_serve.engines.replicas.placement import (
    PlacedRequest,
    Placement,
    ResidentPlacement,
    SharedPlacement,
    homes,
    idle,
)

RESIDENT: Placement = ResidentPlacement(slice_s=2.0)
SHARED: Placement = SharedPlacement()
SLOTS = 8
REQUEST_S = 1.0

NAMES = ["0", "1", "2"]
HOME, SECOND, THIRD = homes("r", NAMES)
"""Of the recipe `r`."""


def load(**more: Any) -> EngineLoad:
    return EngineLoad(**{"is_up": True, "num_slots": SLOTS, "swap_s": 0.5, **more})


IDLE = load()
HOLDING = load(resident="r")
BUSY = load(resident="x", num_in_flight=1, turn_left_s=2.0)
"""Another recipe has just begun its turn."""
SLOW = load(swap_s=5.0)
ENDING = load(resident="x", num_in_flight=1, waiting={"r": 1}, swap_s=1.0)
"""Its turn ends for the sake of the recipe."""
DOWN = load(is_up=False)


def placed(policy: Placement, loads: dict[str, EngineLoad], **request: Any) -> str:
    wanted = PlacedRequest(**{"recipe_digest": "r", **request})
    return policy.choose(wanted, {name: loads.get(name, IDLE) for name in NAMES}, request_s=REQUEST_S)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param({}, HOME, id="home, where it is nowhere"),
        pytest.param({THIRD: HOLDING}, THIRD, id="where it is resident, whoever else is idle"),
        pytest.param({THIRD: HOLDING, HOME: HOLDING}, HOME, id="home, of those that have it"),
        pytest.param({HOME: load(resident="x")}, HOME, id="home, though another recipe is there and nobody asks it"),
        pytest.param({SECOND: load(waiting={"r": 3}, resident="x")}, SECOND, id="where others wait for it"),
        pytest.param({HOME: BUSY}, SECOND, id="the next home, where a turn would have to end"),
        pytest.param({HOME: BUSY, SECOND: BUSY}, THIRD, id="wherever nobody is"),
        pytest.param(dict.fromkeys(NAMES, BUSY), HOME, id="home, where all are busy alike"),
        pytest.param(
            {HOME: load(resident="x", num_in_flight=1, turn_left_s=0.0), SECOND: BUSY, THIRD: BUSY},
            HOME,
            id="home, where its turn is soon",
        ),
        pytest.param(
            {**dict.fromkeys(NAMES, BUSY), HOME: load(resident="x", num_in_flight=1, waiting=dict.fromkeys("abcd", 1))},
            SECOND,
            id="the shortest line, where home's would last for many turns",
        ),
        pytest.param(
            {**dict.fromkeys(NAMES, SLOW), HOME: load(resident="x", swap_s=5.0, num_in_flight=1, turn_left_s=2.0)},
            HOME,
            id="home, where a swap costs more than the wait",
        ),
    ],
)
def test_a_recipe_that_takes_turns(loads: dict[str, EngineLoad], expected: str) -> None:
    assert placed(RESIDENT, loads) == expected


@pytest.mark.parametrize(
    ("in_flight", "expected"),
    [(0, THIRD), (3, THIRD), (SLOTS - 1, THIRD), (SLOTS + 2, THIRD), (SLOTS + 4, HOME), (SLOTS + 12, HOME)],
)
def test_a_recipe_hot_enough_for_two_gets_two(in_flight: int, expected: str) -> None:
    """One holds it and is full: its line is as long as a swap and what that brings about, and home is idle."""
    holding = load(resident="r", num_in_flight=min(in_flight, SLOTS), waiting={"r": max(0, in_flight - SLOTS)})
    assert placed(RESIDENT, {THIRD: holding}) == expected


def test_of_two_that_have_a_hot_recipe_the_emptier_is_next() -> None:
    full, half = load(resident="r", num_in_flight=SLOTS), load(resident="r", num_in_flight=SLOTS - 1)
    assert placed(RESIDENT, {HOME: full, THIRD: half}) == THIRD
    assert placed(RESIDENT, {HOME: half, THIRD: full}) == HOME


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param({}, "home", id="home of tenant and recipe"),
        pytest.param({"home": load(num_in_flight=1)}, "home", id="home, as long as it is not much fuller"),
        pytest.param({"home": load(num_in_flight=2)}, "second", id="the next, where it is"),
        pytest.param({"home": load(num_in_flight=2), "second": load(num_in_flight=2)}, "third", id="the emptiest"),
        pytest.param({"home": load(waiting={"x": 2})}, "second", id="who waits counts too"),
        pytest.param(
            {"home": load(num_in_flight=6), "second": load(num_in_flight=6), "third": load(num_in_flight=5)},
            "home",
            id="home, where all are full alike",
        ),
    ],
)
def test_a_recipe_that_shares_a_batch(loads: dict[str, EngineLoad], expected: str) -> None:
    order = dict(zip(("home", "second", "third"), homes("acme\0r", NAMES), strict=True))
    assert placed(SHARED, {order[name]: each for name, each in loads.items()}, tenant="acme") == order[expected]


@pytest.mark.parametrize("policy", [RESIDENT, SHARED])
@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param({HOME: DOWN, SECOND: DOWN}, {THIRD}, id="the one that is up"),
        pytest.param({HOME: load(is_drained=True), SECOND: DOWN}, {THIRD}, id="not where the operator drains"),
        pytest.param({HOME: load(pinned="x"), SECOND: DOWN}, {THIRD}, id="not where another recipe is pinned"),
        pytest.param(
            {HOME: load(is_drained=True), SECOND: load(is_drained=True), THIRD: load(pinned="r")},
            {THIRD},
            id="where it is pinned itself",
        ),
        pytest.param(
            {HOME: load(is_up=False, is_failed=True), SECOND: DOWN, THIRD: load(is_drained=True)},
            {SECOND},
            id="in the line of one that may come up, where none is",
        ),
        pytest.param(
            dict.fromkeys(NAMES, load(is_up=False, is_failed=True)), set(NAMES), id="any that says why, where none will"
        ),
        pytest.param(dict.fromkeys(NAMES, load(is_drained=True)), set(NAMES), id="or why it is kept out"),
    ],
)
def test_who_cannot_answer_is_not_asked(policy: Placement, loads: dict[str, EngineLoad], expected: set[str]) -> None:
    for is_background in (False, True):
        assert placed(policy, loads, is_background=is_background) in expected


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        pytest.param({}, HOME, id="home, where all idle"),
        pytest.param({HOME: load(background={"x": 1})}, SECOND, id="away from another expert's visit"),
        pytest.param({HOME: load(num_in_flight=1, resident="x")}, SECOND, id="away from traffic"),
        pytest.param(
            {HOME: load(background={"x": 1}), SECOND: load(background={"r": 2}), THIRD: load(background={"y": 1})},
            SECOND,
            id="into a visit for the same expert",
        ),
        pytest.param({HOME: load(num_background=1, resident="x")}, SECOND, id="away from scoring that runs"),
        pytest.param({SECOND: load(num_background=1, resident="r")}, HOME, id="home, where it is scored elsewhere too"),
    ],
)
def test_scoring_spreads_over_who_idles(loads: dict[str, EngineLoad], expected: str) -> None:
    assert placed(RESIDENT, loads, is_background=True) == expected


def test_scoring_of_rows_goes_to_the_emptiest() -> None:
    loads = {HOME: load(num_background=2), SECOND: load(num_in_flight=1), THIRD: load(background={"r": 2})}
    assert placed(SHARED, loads, is_background=True) == SECOND


@pytest.mark.parametrize(
    ("at", "waited_s", "expected"),
    [
        pytest.param(ENDING, 0.0, False, id="its turn is soon"),
        pytest.param(BUSY, 0.0, True, id="its turn would be later than a swap elsewhere"),
        pytest.param(ENDING, 1.9, False, id="it has waited a while"),
        pytest.param(ENDING, 2.1, True, id="it has waited for long"),
        pytest.param(load(resident="r", num_in_flight=SLOTS, waiting={"r": 1}), 0.3, False, id="for a slot"),
    ],
)
def test_who_waits_goes_to_one_that_idles_where_that_is_sooner(at: EngineLoad, waited_s: float, expected: bool) -> None:
    request = PlacedRequest("r")
    loads = {"0": at, "1": load(swap_s=1.0)}
    assert RESIDENT.should_move(request, "0", "1", loads, request_s=REQUEST_S, waited_s=waited_s) is expected


def test_rows_in_line_go_to_who_has_far_fewer() -> None:
    request = PlacedRequest("r", "acme")
    for fewer, expected in ((SLOTS - 1, False), (SLOTS - 2, True), (0, True)):
        loads = {"0": load(num_in_flight=SLOTS - 1, waiting={"r": 1}), "1": load(num_in_flight=fewer)}
        assert SHARED.should_move(request, "0", "1", loads, request_s=1.0, waited_s=0.0) is expected


@pytest.mark.parametrize(
    ("each", "is_idle"),
    [
        (IDLE, True),
        (HOLDING, True),
        (load(num_in_flight=SLOTS // 2 - 1), True),
        (load(num_in_flight=SLOTS // 2), False),
        (load(waiting={"x": 1}), False),
        (load(background={"x": 1}), False),
        (load(is_drained=True), False),
        (DOWN, False),
        (load(num_slots=1), True),
        (load(num_slots=1, num_in_flight=1), False),
    ],
)
def test_who_takes_from_the_lines_of_others(each: EngineLoad, is_idle: bool) -> None:
    assert list(idle({"0": each})) == (["0"] if is_idle else [])


def test_homes_are_spread_evenly_and_stay_where_engines_come_and_go() -> None:
    keys = [f"recipe {number}" for number in range(3000)]
    ten = [str(number) for number in range(10)]
    first = {key: homes(key, ten)[0] for key in keys}
    assert all(240 < number < 360 for number in Counter(first.values()).values())
    without = {key: homes(key, [name for name in ten if name != "3"])[0] for key in keys}
    assert {key for key in keys if first[key] != without[key]} == {key for key in keys if first[key] == "3"}


@given(
    st.lists(
        st.builds(
            load,
            is_up=st.booleans(),
            is_failed=st.booleans(),
            is_drained=st.booleans(),
            pinned=st.sampled_from([None, "r", "x"]),
            resident=st.sampled_from([None, "r", "x"]),
            num_in_flight=st.integers(0, SLOTS),
            waiting=st.dictionaries(st.sampled_from("rxyz"), st.integers(1, 40)),
            background=st.dictionaries(st.sampled_from("rxyz"), st.integers(1, 40)),
            turn_left_s=st.floats(0, 2),
            swap_s=st.none() | st.floats(0, 60),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from([RESIDENT, SHARED]),
)
def test_whatever_they_do_one_is_chosen_that_can_answer_if_any_can(
    loads: list[EngineLoad], is_background: bool, policy: Placement
) -> None:
    by_name = {str(number): each for number, each in enumerate(loads)}
    request = PlacedRequest("r", is_background=is_background)
    chosen = policy.choose(request, by_name, request_s=REQUEST_S)
    can = [name for name, each in by_name.items() if each.is_up and not each.keeps_out("r")]
    assert chosen in (can or by_name)
    assert chosen == policy.choose(request, dict(reversed(by_name.items())), request_s=REQUEST_S), "order says nothing"
