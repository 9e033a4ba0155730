"""How many cocktails a tenant may keep, and how many of its jobs may run; its bytes: `tenants.example_quota`."""

from __future__ import annotations

from cocktail_serve.config import Limits
from cocktail_serve.errors import QuotaExceededError, RateLimitError

JOBS_RETRY_S = 10.0
"""When to ask again where a job has to end first; jobs take seconds to minutes."""


def check_cocktails(num_kept: int, limits: Limits) -> None:
    """Raises QuotaExceededError where there is no place for one more cocktail."""
    if limits.cocktails is not None and num_kept >= limits.cocktails:
        raise QuotaExceededError(
            f"{num_kept} cocktails are kept and the limit is {limits.cocktails}; delete one first "
            "(GET /v1/cocktails lists them)"
        )


def check_jobs(num_running: int, limits: Limits) -> None:
    """Raises RateLimitError where there is no place for one more job."""
    if limits.scoring_jobs is not None and num_running >= limits.scoring_jobs:
        raise RateLimitError(
            f"{num_running} jobs have not ended and the limit is {limits.scoring_jobs} at once; wait for one to end",
            retry_after_s=JOBS_RETRY_S,
        )
