"""What a request uses, from its admission to its end: held against the tenant's limits, and counted."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from starlette.requests import ClientDisconnect

from cocktail_serve.cocktails.cocktail import ServedModel
from cocktail_serve.gateway.authentication import Caller
from cocktail_serve.gateway.exchange import Exchange
from cocktail_serve.gateway.metrics import GatewayMetrics
from cocktail_serve.tenants.limits import Admission
from cocktail_serve.usage.amounts import UsageAmount
from cocktail_serve.usage.ledger import Ledger


class MeteredRequest:
    """One request to a model. A context manager: what is inside is done for it, and it has ended with that.

    A client that left before the engine said anything, so that `used` was not called, is charged the estimate.
    """

    __slots__ = ("_admission", "_caller", "_exchange", "_ledger", "_metrics", "_num_tokens")

    def __init__(
        self, caller: Caller, exchange: Exchange, admission: Admission, ledger: Ledger, metrics: GatewayMetrics
    ) -> None:
        self._caller = caller
        self._exchange = exchange
        self._admission = admission
        self._ledger = ledger
        self._metrics = metrics
        self._num_tokens: int | None = None

    def used(self, served: ServedModel, *, num_in: int, num_out: int = 0) -> None:
        """The engine has read and generated so many tokens; also where the answer broke off."""
        self._num_tokens = num_in + num_out
        self._exchange.num_tokens = num_in, num_out
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
