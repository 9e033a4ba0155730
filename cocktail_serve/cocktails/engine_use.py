"""What the making of cocktails uses of the engines, counted in the ledger."""

from __future__ import annotations

from contextlib import AbstractContextManager

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.engines.engine_time import EngineTime, EngineTimeTotal, totalled
from cocktail_serve.usage.amounts import UsageAmount
from cocktail_serve.usage.ledger import Ledger


class EngineUse:
    """Counts in a ledger; None: nobody counts."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    def counted(
        self, tenant: str, key_id: str | None, *, model: str, pool_id: str
    ) -> AbstractContextManager[EngineTimeTotal]:
        """A total for the calls inside, which is counted at their end, however that comes."""

        def count(time: EngineTime) -> None:
            if self._ledger is not None:
                use = UsageAmount(scoring_s=time.scoring_s, mixing_s=time.mixing_s)
                self._ledger.add(tenant, key_id, model, pool_id, use)

        return totalled(count)

    def counted_for(self, cocktail: Cocktail) -> AbstractContextManager[EngineTimeTotal]:
        """As `counted`, for who asked for a cocktail first."""
        return self.counted(cocktail.tenant, cocktail.key_id, model=cocktail.id, pool_id=cocktail.pool_id)
