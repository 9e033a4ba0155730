"""The right to use an engine: what its owner is told of it, and what becomes of it at its end."""

from __future__ import annotations

import pytest

from cocktail_serve.engines.turns.lease import Lease
from cocktail_serve.errors import DrainedError


class Owner:
    """Takes note of what it is told."""

    def __init__(self) -> None:
        self.is_draining = False
        self.given_back: list[Lease] = []
        self.charged: list[tuple[str, int]] = []

    def give_back(self, lease: Lease) -> None:
        self.given_back.append(lease)

    def charge(self, tenant: str, num_tokens: int) -> None:
        self.charged.append((tenant, num_tokens))


def test_tokens_are_charged_once_they_are_more_than_the_estimate() -> None:
    owner = Owner()
    lease = Lease(owner, tenant="acme", num_tokens=10)
    lease.emitted(6)
    lease.emitted(4)
    assert owner.charged == [], "the estimate was charged when it was granted"
    lease.emitted(3)
    lease.emitted(2)
    assert owner.charged == [("acme", 3), ("acme", 2)]
    lease.settle(15)
    assert len(owner.charged) == 2
    lease.settle(12)
    assert owner.charged[2:] == [("acme", -3)]


def test_without_an_estimate_every_token_is_charged() -> None:
    owner = Owner()
    Lease(owner, tenant="acme").emitted(1)
    assert owner.charged == [("acme", 1)]


def test_background_work_is_charged_to_nobody() -> None:
    owner = Owner()
    lease = Lease(owner)
    lease.emitted(5)
    lease.settle(7)
    assert owner.charged == []


def test_it_is_given_back_at_the_end_of_its_block_and_calls_back_no_more() -> None:
    owner, called = Owner(), []
    with Lease(owner) as lease:
        lease.on_end(lambda: called.append("ended"))
        assert owner.given_back == []
    assert owner.given_back == [lease]
    lease.end(DrainedError("too long"))
    assert called == []


def test_its_end_calls_back_once_and_is_told_to_who_goes_on() -> None:
    lease, called = Lease(Owner()), []
    lease.on_end(lambda: called.append("ended"))
    lease.end(DrainedError("too long"))
    lease.end(DrainedError("too long"))
    assert called == ["ended"]
    for use in (lease.raise_if_ended, lambda: lease.on_end(list)):
        with pytest.raises(DrainedError, match="too long"):
            use()


def test_an_end_that_nobody_listens_for_is_an_error_alone() -> None:
    lease = Lease(Owner())
    lease.raise_if_ended()
    lease.end(DrainedError("too long"))
    assert isinstance(lease.error, DrainedError)


@pytest.mark.parametrize("is_draining", [False, True])
def test_long_work_gives_way_once_its_owner_drains(is_draining: bool) -> None:
    owner = Owner()
    owner.is_draining = is_draining
    assert Lease(owner).should_yield is is_draining
