"""What a request uses, from its admission to its end: held against the tenant's limits, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect

from cocktail_serve.cocktails.cocktail import ServedModel
from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.tenants.limits import Admission, Rate, RateStatus
from cocktail_serve.usage.amounts import UsageAmount
from cocktail_serve.usage.ledger import Ledger


class MeteredRequest:
    """One request to a model. A context manager: what is inside is done for it, and it has ended with that.

    A client that left before the engine said anything, so that `used` was not called, is charged the estimate.
    """

    __slots__ = ("_admission", "_caller", "_ledger", "_metrics", "_num_tokens")

    def __init__(self, caller: Caller, admission: Admission, ledger: Ledger, metrics: GatewayMetrics) -> None:
        self._caller = caller
        self._admission = admission
        self._ledger = ledger
        self._metrics = metrics
        self._num_tokens: int | None = None

    def used(self, served: ServedModel, *, num_in: int, num_out: int = 0) -> None:
        """The engine has read and generated so many tokens; also where the answer broke off."""
        self._num_tokens = num_in + num_out
        use = UsageAmount(requests=1, tokens_in=num_in, tokens_out=num_out)
        self._ledger.add(self._caller.tenant, self._caller.key_id, served.model_id, served.pool.id, use)
        self._metrics.count_tokens(served.pool.id, num_in=num_in, num_out=num_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_unknown = self._num_tokens is None and isinstance(error, ClientDisconnect)
        self._admission.end(None if is_unknown else self._num_tokens or 0)


def rate_limit_headers(rate_status: RateStatus) -> Iterator[tuple[bytes, bytes]]:
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
