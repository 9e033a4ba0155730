"""What a tenant may use a minute and at once, by a clock of ours."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cocktail_serve.config import Limits
from cocktail_serve.tenants.limits import Admission, Limiter, merged, unlimited


@dataclass
class World:
    limits: Limits
    now: float = 1000.0
    limiter: Limiter = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = Limiter(lambda tenant: self.limits, timer=lambda: self.now)

    def ask(self, num_tokens: int = 0, *, tenant: str = "acme", is_batch: bool = False) -> Admission:
        return self.limiter.admit_model_request(tenant, num_tokens=num_tokens, is_batch=is_batch)

    def num_admitted(self, tries: int) -> int:
        return sum(self.ask().refusal is None for _ in range(tries))


def retry_after_s(admission: Admission) -> float:
    assert admission.refusal is not None
    assert admission.refusal.code == "rate_limit_exceeded"
    return admission.refusal.retry_after_s


def test_without_limits_nothing_is_counted() -> None:
    limiter = Limiter(unlimited)
    for _ in range(1000):
        admission = limiter.admit_model_request("acme", num_tokens=10**9)
        assert admission.refusal is None
        assert admission.rate_status.requests is admission.rate_status.tokens is None
    assert limiter._uses == {}


def test_what_the_operator_said_lies_over_the_configuration() -> None:
    defaults = Limits(requests_per_minute=60, cocktails=5)
    assert merged(defaults, {"cocktails": None, "scoring_jobs": 2}) == Limits(requests_per_minute=60, scoring_jobs=2)
    assert merged(defaults, None) == defaults


def test_each_tenant_has_its_own_limits() -> None:
    limits = {"acme": Limits(requests_per_minute=1), "other": Limits(requests_per_minute=2)}
    limiter = Limiter(limits.__getitem__, timer=lambda: 1000.0)
    for tenant, most in (("acme", 1), ("other", 2)):
        assert [limiter.admit_change(tenant).refusal is None for _ in range(3)].count(True) == most
        assert limiter.admit_model_request(tenant, num_tokens=1).refusal is not None, "they share the bucket"


class TestRequests:
    def test_a_minutes_worth_at_once_then_as_fast_as_they_come_back(self) -> None:
        world = World(Limits(requests_per_minute=30))
        assert world.num_admitted(40) == 30
        assert retry_after_s(world.ask()) == pytest.approx(2.0)
        world.now += 1.9
        assert world.num_admitted(3) == 0
        world.now += 0.2
        assert world.num_admitted(3) == 1
        world.now += 3600
        assert world.num_admitted(40) == 30, "never more than a minute's worth"

    def test_in_the_long_run_no_more_than_the_limit(self) -> None:
        world = World(Limits(requests_per_minute=60))
        admitted = 0
        for _ in range(6000):
            world.now += 0.1
            admitted += world.num_admitted(1)
        assert admitted == pytest.approx(60 + 600, abs=1)

    def test_rate_status(self) -> None:
        world = World(Limits(requests_per_minute=60))
        for remaining in (59, 58, 57):
            rate = world.ask().rate_status.requests
            assert rate is not None
            assert (rate.limit, rate.remaining) == (60, remaining)
            assert rate.reset_s == pytest.approx(60 - remaining)
        world.now += 1.5
        refreshed = world.ask().rate_status.requests
        assert refreshed is not None
        assert (refreshed.remaining, refreshed.reset_s) == (57, pytest.approx(2.5))

    def test_a_refused_request_takes_nothing(self) -> None:
        world = World(Limits(requests_per_minute=2, concurrent_requests=1))
        first = world.ask()
        for _ in range(10):
            assert world.ask().refusal is not None
        first.end(0)
        assert world.ask().refusal is None

    def test_changes_take_requests_and_no_place(self) -> None:
        world = World(Limits(requests_per_minute=2, concurrent_requests=1, tokens_per_minute=1))
        assert world.ask(5).refusal is None
        assert world.limiter.admit_change("acme").refusal is None, "neither the place nor the tokens matter"
        refused = world.limiter.admit_change("acme")
        assert retry_after_s(refused) == pytest.approx(30.0)
        assert str(refused.refusal) == "the limit of 2 requests a minute is reached; send them more slowly"

    def test_a_refused_change_takes_nothing(self) -> None:
        world = World(Limits(requests_per_minute=2))
        for remaining in (1, 0):
            admitted = world.limiter.admit_change("acme")
            assert admitted.refusal is None
            assert admitted.rate_status.requests is not None
            assert admitted.rate_status.requests.remaining == remaining
        for _ in range(10):
            refused = world.limiter.admit_change("acme")
            assert retry_after_s(refused) == pytest.approx(30.0)
            assert refused.rate_status.requests is not None
            assert refused.rate_status.requests.reset_s == pytest.approx(60.0)
        world.now += 30.1
        assert world.limiter.admit_change("acme").refusal is None
        assert world.limiter.admit_change("acme").refusal is not None

    def test_the_wait_is_told_within_what_the_contract_allows(self) -> None:
        world = World(Limits(requests_per_minute=1, tokens_per_minute=1))
        world.ask(1)
        world.ask().end(10_000)
        assert retry_after_s(world.ask()) <= 120

    def test_a_tenants_use_is_its_own(self) -> None:
        world = World(Limits(requests_per_minute=1))
        assert world.ask().refusal is None
        assert world.ask().refusal is not None
        assert world.ask(tenant="other").refusal is None

    def test_another_limit_holds_at_once_and_what_was_used_stays_used(self) -> None:
        world = World(Limits(requests_per_minute=10))
        assert world.num_admitted(8) == 8
        world.limits = Limits(requests_per_minute=20)
        assert world.num_admitted(20) == 12
        world.limits = Limits(requests_per_minute=5)
        assert world.num_admitted(5) == 0
        world.limits = Limits()
        assert world.num_admitted(50) == 50


class TestTokens:
    def test_an_estimate_is_reserved_and_corrected(self) -> None:
        world = World(Limits(tokens_per_minute=600))
        admission = world.ask(500)
        assert admission.rate_status.tokens is not None
        assert admission.rate_status.tokens.remaining == 100
        admission.end(40)
        after = world.ask().rate_status.tokens
        assert after is not None
        assert after.remaining == 560

    def test_a_full_bucket_has_nothing_to_wait_for(self) -> None:
        rate_status = World(Limits(tokens_per_minute=600)).ask(0).rate_status.tokens
        assert rate_status is not None
        assert (rate_status.remaining, rate_status.reset_s) == (600, 0.0)

    def test_a_limit_that_came_meanwhile_is_charged_whole(self) -> None:
        """Nothing was reserved for it: there was no limit to reserve of."""
        world = World(Limits(concurrent_requests=5))
        early = world.ask(100)
        world.limits = Limits(tokens_per_minute=600)
        world.ask(0)
        early.end(50)
        rate_status = world.ask(0).rate_status.tokens
        assert rate_status is not None
        assert rate_status.remaining == 550

    def test_what_the_engine_never_said_stays_charged(self) -> None:
        world = World(Limits(tokens_per_minute=600))
        world.ask(500).end(None)
        after = world.ask().rate_status.tokens
        assert after is not None
        assert after.remaining == 100

    def test_more_than_was_left_is_paid_back_by_waiting(self) -> None:
        world = World(Limits(tokens_per_minute=600))
        world.ask(10).end(700)
        refused = world.ask(1)
        assert retry_after_s(refused) == pytest.approx(10.1)
        message = "the limit of 600 tokens a minute is reached; send fewer or shorter requests"
        assert str(refused.refusal) == message
        assert refused.rate_status.tokens is not None
        assert refused.rate_status.tokens.remaining == 0
        world.now += 10.2
        assert world.ask(1).refusal is None

    def test_a_request_larger_than_the_limit_is_not_refused_for_ever(self) -> None:
        world = World(Limits(tokens_per_minute=600))
        large = world.ask(10_000)
        assert large.refusal is None
        assert retry_after_s(world.ask(1)) == pytest.approx(1.0, abs=0.2), "at most the whole limit is reserved"
        large.end(600)

    def test_ending_twice_counts_once(self) -> None:
        world = World(Limits(tokens_per_minute=600, concurrent_requests=2))
        admission = world.ask(100)
        for _ in range(3):
            admission.end(100)
        assert world.num_admitted(5) == 2
        rate_status = world.ask().rate_status.tokens
        assert rate_status is not None
        assert rate_status.remaining == 500


class TestConcurrency:
    def test_places_are_freed_by_the_end(self) -> None:
        world = World(Limits(concurrent_requests=3))
        held = [world.ask() for _ in range(5)]
        assert [admission.refusal is None for admission in held] == [True, True, True, False, False]
        assert retry_after_s(held[-1]) == 1.0
        message = "3 requests are in flight and the limit is 3 at once; wait for one to end"
        assert str(held[-1].refusal) == message
        held[-1].end(0)
        assert world.ask().refusal is not None, "a refused request holds no place that it could free"
        held[0].end(None)
        assert world.ask().refusal is None


class TestBatches:
    @pytest.mark.parametrize(("limit", "admitted"), [(1, 1), (2, 1), (5, 2), (20, 10)])
    def test_half_of_the_requests_is_left(self, limit: int, admitted: int) -> None:
        world = World(Limits(requests_per_minute=limit))
        answers = [world.ask(is_batch=True) for _ in range(limit + 1)]
        assert sum(answer.refusal is None for answer in answers) == admitted
        assert 1 <= retry_after_s(answers[-1]) <= 60
        assert world.num_admitted(limit) == limit - admitted

    def test_half_of_the_tokens_is_left(self) -> None:
        world = World(Limits(tokens_per_minute=1000))
        world.ask(400, is_batch=True)
        world.ask(200, is_batch=True)
        refused = world.ask(1, is_batch=True)
        assert refused.refusal is not None
        assert retry_after_s(refused) == pytest.approx(6.0), "100 of 1000 a minute"
        assert world.ask(400).refusal is None

    @pytest.mark.parametrize(("limit", "places"), [(1, 1), (2, 1), (8, 4)])
    def test_half_of_the_places_is_left(self, limit: int, places: int) -> None:
        world = World(Limits(concurrent_requests=limit))
        taken = [world.ask(is_batch=True) for _ in range(limit + 1)]
        assert [admission.refusal is None for admission in taken] == [True] * places + [False] * (limit + 1 - places)
