"""What the fault suite shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.postgres import Postgres, find_binaries, running_postgres


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of this test's own, to be stopped."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here; apt-get install postgresql")
    with running_postgres(binaries) as server:
        yield server
