"""What the making of cocktails uses of the engines, counted in the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.engines.engine_time import EngineTime, EngineTimeTotal
from cocktail_serve.usage.amounts import UsageAmount
from cocktail_serve.usage.ledger import Ledger


class EngineUse:
    """Counts in a ledger; None: nobody counts."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    @contextmanager
    def counted(self, tenant: str, key_id: str | None, *, model: str, pool_id: str) -> Iterator[EngineTimeTotal]:
        """A total for the calls inside, which is counted at their end, however that comes, if there is any."""
        total = EngineTimeTotal()
        try:
            yield total
        finally:
            if self._ledger is not None and total.time != EngineTime():
                use = UsageAmount(scoring_s=total.time.scoring_s, mixing_s=total.time.mixing_s)
                self._ledger.add(tenant, key_id, model, pool_id, use)

    def counted_for(self, cocktail: Cocktail) -> AbstractContextManager[EngineTimeTotal]:
        """As `counted`, for who asked for a cocktail first."""
        return self.counted(cocktail.tenant, cocktail.key_id, model=cocktail.id, pool_id=cocktail.pool_id)
