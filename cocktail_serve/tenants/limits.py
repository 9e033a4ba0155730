"""What a tenant may use a minute and at once, counted in this process: no database is on a request's path.

Two token buckets per tenant, one of requests and one of tokens: each holds a minute's worth and refills continuously.
(`limits` and `aiolimiter` know neither a charge that is corrected afterwards nor what is left of a bucket.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cocktail_serve.config import Limits
from cocktail_serve.errors import RateLimitError

MINUTE_S = 60.0

LimitsOf = Callable[[str], Limits]
"""The limits of a tenant now: `TenantsCache.limits_of` in a gateway."""

UNLIMITED = Limits()


def unlimited(tenant: str) -> Limits:
    """No limits for anybody."""
    return UNLIMITED


def merged(defaults: Limits, own: Mapping[str, int | None] | None) -> Limits:
    """The configuration's limits, and over them what the operator said for one tenant, by name."""
    return defaults.model_copy(update=dict(own or {}))


class Bucket:
    """A token bucket. Its level may fall below zero: a charge can turn out larger than what was left.

    Args:
        per_minute: capacity, and what flows in each minute.
        now: monotonic seconds; the bucket begins full.
    """

    __slots__ = ("_at", "capacity", "level")

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = per_minute
        self.level = float(per_minute)
        self._at = now

    def refill(self, per_minute: int, now: float) -> None:
        """Adds what flowed in since; what was used stays used where the limit has changed."""
        self.level += per_minute - self.capacity
        self.capacity = per_minute
        self.level = min(self.level + (now - self._at) * per_minute / MINUTE_S, per_minute)
        self._at = now

    def take(self, amount: float) -> None:
        """Takes out, or with a negative amount gives back."""
        self.level = min(self.level - amount, self.capacity)

    def seconds_until(self, level: float) -> float:
        """How long until it has refilled to a level."""
        return max(level - self.level, 0.0) * MINUTE_S / self.capacity


@dataclass(frozen=True, slots=True)
class Rate:
    """Where a tenant stands against one limit a minute.

    Attributes:
        remaining: what is left now, not below zero.
        reset_s: seconds until all of it is there again.
    """

    limit: int
    remaining: int
    reset_s: float

    @classmethod
    def of(cls, bucket: Bucket) -> Rate:
        return cls(bucket.capacity, max(int(bucket.level), 0), bucket.seconds_until(bucket.capacity))


@dataclass(frozen=True, slots=True)
class RateStatus:
    """Where a tenant stands; None where it has no such limit."""

    requests: Rate | None = None
    tokens: Rate | None = None


NO_RATES = RateStatus()


class _Use:
    """What one tenant uses."""

    __slots__ = ("in_flight", "requests", "tokens")

    def __init__(self) -> None:
        self.in_flight = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None

    def rate_status(self) -> RateStatus:
        return RateStatus(
            None if self.requests is None else Rate.of(self.requests),
            None if self.tokens is None else Rate.of(self.tokens),
        )


class Admission:
    """The answer to a request's question whether it may begin. End it when the request has.

    Attributes:
        rate_status: after this request.
        refusal: why it may not begin.
    """

    __slots__ = ("_reserved", "_use", "rate_status", "refusal")

    def __init__(
        self,
        rate_status: RateStatus,
        *,
        refusal: RateLimitError | None = None,
        use: _Use | None = None,
        reserved: int = 0,
    ) -> None:
        self.rate_status = rate_status
        self.refusal = refusal
        self._use = use
        self._reserved = reserved

    def end(self, num_tokens: int | None) -> None:
        """Frees the place and corrects the charge. May be called twice.

        Args:
            num_tokens: read and generated, as the engine said. None: it never said, and may have computed them: what
                was reserved stays charged.
        """
        use, self._use = self._use, None
        if use is None:
            return
        use.in_flight -= 1
        if use.tokens is not None and num_tokens is not None:
            use.tokens.take(num_tokens - self._reserved)


_FREE = Admission(NO_RATES)


class Limiter:
    """Admits requests of all tenants. Synchronous: a decision and its charge are one step of the event loop.

    Args:
        timer: monotonic seconds.
    """

    def __init__(self, limits_of: LimitsOf, *, timer: Callable[[], float] = time.monotonic) -> None:
        self._limits_of = limits_of
        self._timer = timer
        self._uses: dict[str, _Use] = {}

    def admit_model_request(self, tenant: str, *, num_tokens: int, is_batch: bool = False) -> Admission:
        """A request to a model: takes one request, reserves tokens, and holds a place until its end.

        It is admitted while any tokens are left, so that one larger than the limit is not refused for ever.

        Args:
            num_tokens: an estimate of what it will read and generate.
            is_batch: whether it is a line of a batch, which leaves half of each limit to what the tenant asks itself.
        """
        limits = self._limits_of(tenant)
        if limits.requests_per_minute is limits.tokens_per_minute is limits.concurrent_requests is None:
            return _FREE
        use = self._refilled(tenant, limits)
        refusal = self._refusal_of_batch(use, limits) if is_batch else self._refusal(use, limits)
        if refusal is not None:
            return Admission(use.rate_status(), refusal=refusal)
        use.in_flight += 1
        reserved = 0
        if use.requests is not None:
            use.requests.take(1)
        if use.tokens is not None:
            reserved = min(num_tokens, use.tokens.capacity)
            use.tokens.take(reserved)
        return Admission(use.rate_status(), use=use, reserved=reserved)

    def admit_change(self, tenant: str) -> Admission:
        """A request that makes, changes or deletes something: takes one request."""
        limits = self._limits_of(tenant)
        if limits.requests_per_minute is None:
            return _FREE
        use = self._refilled(tenant, limits)
        refusal = _out_of_requests(use)
        if refusal is None and use.requests is not None:
            use.requests.take(1)
        return Admission(use.rate_status(), refusal=refusal)

    def _refilled(self, tenant: str, limits: Limits) -> _Use:
        use = self._uses.get(tenant)
        if use is None:
            use = self._uses[tenant] = _Use()
        now = self._timer()
        use.requests = _refilled(use.requests, limits.requests_per_minute, now)
        use.tokens = _refilled(use.tokens, limits.tokens_per_minute, now)
        return use

    def _refusal_of_batch(self, use: _Use, limits: Limits) -> RateLimitError | None:
        most, requests, tokens = limits.concurrent_requests, use.requests, use.tokens
        waits_s = []
        if most is not None and use.in_flight >= max(1, most // 2):
            waits_s.append(1.0)
        # this one, and half: but a limit of one is no reason never to ask
        if requests is not None and requests.level < (least := min(requests.capacity, 1 + requests.capacity / 2)):
            waits_s.append(requests.seconds_until(least))
        if tokens is not None and tokens.level < (half := tokens.capacity / 2):
            waits_s.append(tokens.seconds_until(half))
        if not waits_s:
            return None
        return RateLimitError("half of the tenant's limits is left to what it asks itself", retry_after_s=max(waits_s))

    def _refusal(self, use: _Use, limits: Limits) -> RateLimitError | None:
        most = limits.concurrent_requests
        if most is not None and use.in_flight >= most:
            return RateLimitError(
                f"{use.in_flight} requests are in flight and the limit is {most} at once; wait for one to end",
                retry_after_s=1.0,
            )
        refusal = _out_of_requests(use)
        if refusal is None and use.tokens is not None and use.tokens.level <= 0.0:
            refusal = RateLimitError(
                f"the limit of {use.tokens.capacity} tokens a minute is reached; send fewer or shorter requests",
                retry_after_s=use.tokens.seconds_until(1.0),
            )
        return refusal


def _refilled(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.refill(per_minute, now)
    return bucket


def _out_of_requests(use: _Use) -> RateLimitError | None:
    if use.requests is None or use.requests.level >= 1.0:
        return None
    return RateLimitError(
        f"the limit of {use.requests.capacity} requests a minute is reached; send them more slowly",
        retry_after_s=use.requests.seconds_until(1.0),
    )
