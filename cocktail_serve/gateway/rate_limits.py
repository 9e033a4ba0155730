"""A tenant's limits over HTTP: OpenAI's headers in every answer, and the refusal of a request that exceeds them."""

from __future__ import annotations

from collections.abc import Iterator

from cocktail_serve.gateway.exchange import Exchange
from cocktail_serve.tenants.limits import Admission, Rate, RateStatus


def enforce_limits(exchange: Exchange, admission: Admission) -> None:
    """Tells the client the tenant's limits, and ends here where they are exceeded.

    Raises:
        RateLimitError: the tenant may not ask now.
    """
    exchange.headers = tuple(_rate_limit_headers(admission.rate_status))
    if admission.refusal is not None:
        raise admission.refusal


def _rate_limit_headers(rate_status: RateStatus) -> Iterator[tuple[bytes, bytes]]:
    """OpenAI's headers, for the limits that the tenant has."""
    for name, rate in (("requests", rate_status.requests), ("tokens", rate_status.tokens)):
        if rate is not None:
            yield from _headers_of(name, rate)


def _headers_of(name: str, rate: Rate) -> Iterator[tuple[bytes, bytes]]:
    yield f"x-ratelimit-limit-{name}".encode(), str(rate.limit).encode()
    yield f"x-ratelimit-remaining-{name}".encode(), str(rate.remaining).encode()
    yield f"x-ratelimit-reset-{name}".encode(), format_duration(rate.reset_s).encode()


def format_duration(seconds: float) -> str:
    """`6m0s`, `1.5s`, `20ms`: as OpenAI writes them. Rounded up to a millisecond, or to a tenth above a second."""
    milliseconds = int(-(-seconds * 1000 // 1))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    tenths = -(-milliseconds // 100)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    shown = f"{tenths / 10:g}s"
    if hours:
        return f"{hours}h{minutes}m{shown}"
    return f"{minutes}m{shown}" if minutes else shown
