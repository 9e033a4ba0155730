"""Which days a question about usage means."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from cocktail_serve.errors import InvalidRequestError

DEFAULT_DAYS = 30

MAX_DAYS = 366


def usage_days(start: date | None, end: date | None) -> tuple[date, date]:
    """The first and the last day, both included; left out, the last is today (UTC) and the first 29 days before it.

    Raises:
        InvalidRequestError: the first comes after the last, or they are more than a year apart.
    """
    last = end or datetime.now(UTC).date()
    first = start or date.fromordinal(max(last.toordinal() - DEFAULT_DAYS + 1, 1))
    if first > last:
        raise InvalidRequestError(f"start {first} comes after end {last}", param="start")
    if last - first >= timedelta(days=MAX_DAYS):
        raise InvalidRequestError(f"from {first} to {last} are more than {MAX_DAYS} days; ask for fewer", param="start")
    return first, last
