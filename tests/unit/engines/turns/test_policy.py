"""Whose turn is next and when a turn ends, by table: no loop, no clock. A slice is 2 s, the patience 20."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from cocktail_serve.engines.fairness import ServedTokensByTenant
from cocktail_serve.engines.turns.policy import TurnPolicy
from cocktail_serve.engines.turns.slots import Slots
from cocktail_serve.engines.turns.wait_queue import Claim
from cocktail_serve.recipe import Recipe

SLICE_S, PATIENCE_S = 2.0, 20.0
NOW = 100.0
KEPT_S = 0.2
"""A tenth of a slice."""


class Tenant(NamedTuple):
    """What a tenant was served up to now, and what it does here."""

    tokens: int = 0
    num_in_flight: int = 0
    left_at: float | None = None


def policy_of(**tenants: Tenant) -> TurnPolicy:
    served_tokens = ServedTokensByTenant()
    slots = Slots(served_tokens, max_in_flight=None, gap_s=SLICE_S)
    for name, tenant in tenants.items():
        if tenant.left_at is not None:
            slots.take(name, 0, 0.0)
            slots.leave(name, tenant.left_at)
        for _ in range(tenant.num_in_flight):
            slots.take(name, 0, NOW)
        slots.charge(name, tenant.tokens, NOW)
    return TurnPolicy(slots, slice_s=SLICE_S, patience_s=PATIENCE_S)


def claim(arrived: float, tenant: str = "t", **more: Any) -> Claim:
    recipe = Recipe(base="base", coefficients=((f"{tenant} {arrived}", 1.0),), dtype="float32")
    return Claim(recipe=recipe, made_at=arrived, ranked_from=arrived, tenant=tenant, **more)


def background(arrived: float) -> Claim:
    return claim(arrived, "", claimant="background")


EARLY, LATE = background(90.0), background(95.0)
A, B, A_EARLIER = claim(92.0, "a"), claim(93.0, "b"), claim(91.0, "a")
LONG_AGO = claim(NOW - PATIENCE_S, "starved")
LONGER_AGO = claim(NOW - PATIENCE_S - 1, "forgotten")

MUCH, LITTLE = Tenant(tokens=1000), Tenant(tokens=10)


@pytest.mark.parametrize(
    ("requests", "work", "tenants", "expected"),
    [
        pytest.param([], [], {}, None, id="nobody"),
        pytest.param([], [LATE, EARLY], {}, EARLY, id="the oldest of background work"),
        pytest.param([A], [LATE], {}, A, id="traffic before later background work"),
        pytest.param([A], [background(92.0)], {}, A, id="traffic before background work of the same moment"),
        pytest.param([A], [EARLY], {}, EARLY, id="background work that is the oldest in line"),
        pytest.param([B, LONG_AGO], [EARLY], {}, LONG_AGO, id="older than background work is any request"),
        pytest.param([B, A], [], {}, A, id="who came first, of tenants alike"),
        pytest.param([A, A_EARLIER], [], {}, A_EARLIER, id="a tenant's oldest request"),
        pytest.param([A, B], [], {"a": MUCH, "b": LITTLE}, B, id="the tenant served least"),
        pytest.param([A_EARLIER, A, B], [], {"a": LITTLE, "b": MUCH}, A_EARLIER, id="and of it who came first"),
        pytest.param([A, LONG_AGO], [], {"starved": MUCH}, LONG_AGO, id="one who starves, whatever it was served"),
        pytest.param(
            [A, claim(NOW - PATIENCE_S + 0.1, "starved")], [], {"starved": MUCH}, A, id="not before the patience ends"
        ),
        pytest.param([LONG_AGO, LONGER_AGO], [], {"forgotten": MUCH}, LONGER_AGO, id="of those who starve the longest"),
        pytest.param(
            [A, LONG_AGO], [], {"starved": Tenant(1000, left_at=81.0)}, A, id="not one who was served meanwhile"
        ),
        pytest.param(
            [A, LONG_AGO], [], {"starved": Tenant(1000, num_in_flight=1)}, A, id="nor one who is served just now"
        ),
    ],
)
def test_who_is_next(
    requests: Sequence[Claim], work: Sequence[Claim], tenants: dict[str, Tenant], expected: Claim | None
) -> None:
    policy = policy_of(**tenants)
    assert policy.next(requests, work, NOW, is_after_background=False) is expected
    assert policy.next(requests[::-1], work[::-1], NOW, is_after_background=False) is expected


@pytest.mark.parametrize(("requests", "expected"), [([A], A), ([], EARLY)])
def test_no_two_turns_in_a_row_are_for_backgrounds_sake_while_traffic_waits(
    requests: Sequence[Claim], expected: Claim
) -> None:
    assert policy_of().next(requests, [EARLY], NOW, is_after_background=True) is expected


@pytest.mark.parametrize(
    ("next_in_line", "started", "is_in_use", "tenants", "expected"),
    [
        pytest.param(claim(99.0), 90.0, True, {}, 92.0, id="nobody shares the turn: its start counts alone"),
        pytest.param(claim(99.0), 90.0, False, {}, NOW, id="nothing in flight: at once"),
        pytest.param(background(99.0), 90.0, True, {}, 101.0, id="background work: from its arrival"),
        pytest.param(background(90.0), 99.0, True, {}, 101.0, id="or from the turn's start"),
        pytest.param(background(90.0), 99.0, False, {}, NOW, id="background work, nothing in flight"),
        pytest.param(
            claim(99.0, "", claimant="operator"), 90.0, True, {"flood": Tenant(10, 1)}, 101.0, id="the operator's pin"
        ),
        pytest.param(
            claim(99.0, "a"), 90.0, True, {"a": Tenant(10), "b": Tenant(1000, 1)}, 92.0, id="behind all it waits for"
        ),
        pytest.param(
            claim(99.0, "a"), 90.0, True, {"a": Tenant(10), "b": Tenant(10, 1)}, 101.0, id="no further than they are"
        ),
        pytest.param(
            claim(99.0, "a"),
            90.0,
            True,
            {"a": Tenant(10), "b": Tenant(1000, 1), "c": Tenant(10, 1)},
            101.0,
            id="than one of them",
        ),
        pytest.param(
            claim(99.0, "a"), 90.0, True, {"a": Tenant(1000, left_at=95.0), "b": Tenant(10, 1)}, 102.0, id="look again"
        ),
        pytest.param(
            claim(81.0, "a"), 90.0, True, {"a": Tenant(1000), "b": Tenant(10, 1)}, 101.0, id="no longer than it starves"
        ),
        pytest.param(
            claim(80.0, "a"), 90.0, True, {"a": Tenant(1000), "b": Tenant(10, 1)}, 92.0, id="which it does by now"
        ),
        pytest.param(
            claim(80.0, "a"),
            90.0,
            True,
            {"a": Tenant(1000, left_at=90.0), "b": Tenant(10, 1)},
            102.0,
            id="it was served meanwhile",
        ),
        pytest.param(
            claim(99.0, "a"),
            90.0,
            False,
            {"a": Tenant(1000), "b": Tenant(10, left_at=NOW - 0.1)},
            NOW - 0.1 + KEPT_S,
            id="kept for who has just left",
        ),
        pytest.param(
            claim(99.0, "a"),
            90.0,
            False,
            {"a": Tenant(1000), "b": Tenant(10, left_at=NOW - 0.15), "c": Tenant(20, left_at=NOW - 0.05)},
            NOW - 0.05 + KEPT_S,
            id="for the last of them",
        ),
        pytest.param(
            claim(99.0, "a"),
            90.0,
            False,
            {"a": Tenant(1000), "b": Tenant(10, left_at=NOW - KEPT_S)},
            NOW,
            id="only for a moment",
        ),
        pytest.param(
            claim(99.0, "a"),
            90.0,
            False,
            {"a": Tenant(10), "b": Tenant(1000, left_at=NOW - 0.1)},
            NOW,
            id="not for who is ahead",
        ),
        pytest.param(
            claim(80.1, "a"),
            90.0,
            False,
            {"a": Tenant(1000), "b": Tenant(10, left_at=NOW)},
            100.1,
            id="nor longer than it starves",
        ),
        pytest.param(
            claim(99.5, "a"),
            99.0,
            True,
            {"a": Tenant(1000), "b": Tenant(10, left_at=NOW), "c": Tenant(2000, 1)},
            101.5,
            id="never before the slice is over",
        ),
    ],
)
def test_when_a_turn_ends(
    next_in_line: Claim, started: float, is_in_use: bool, tenants: dict[str, Tenant], expected: float
) -> None:
    policy = policy_of(**tenants)
    found = policy.ends_at(next_in_line, NOW, started=started, is_in_use=is_in_use)
    assert found == pytest.approx(expected, abs=1e-9)


def test_what_a_tenant_was_served_by_another_engine_counts() -> None:
    served_tokens = ServedTokensByTenant()
    here, there = (Slots(served_tokens, max_in_flight=8, gap_s=SLICE_S) for _ in range(2))
    there.take("a", 1000, NOW)
    assert policy_on(here).next([A, B], [], NOW, is_after_background=False) is B
    # but that it has a request in flight there is no service here
    assert policy_on(here).rank(claim(NOW - PATIENCE_S, "a"), NOW)[0] == 0


def policy_on(slots: Slots) -> TurnPolicy:
    return TurnPolicy(slots, slice_s=SLICE_S, patience_s=PATIENCE_S)
