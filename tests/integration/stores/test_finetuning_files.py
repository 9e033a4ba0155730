"""Files in the database, of either kind: whose they are, how long they stay, and that deletion leaves nothing."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from cocktail_serve.database import tables
from cocktail_serve.database.database import Database
from cocktail_serve.errors import NotFoundError
from cocktail_serve.finetuning.files import Files

CONTENT = b'{"input": "a", "output": "b"}\n'


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


async def num_contents(database: Database) -> int:
    async with database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(tables.file_contents))).scalar_one()


async def listed(files: Files, tenant: str) -> list[str]:
    return [file.id for file in (await files.list(tenant, after=None, limit=10, order="asc")).data]


async def test_content_is_kept_once_and_goes_with_its_last_file(database: Database) -> None:
    files = Files(database)
    first = await files.add("acme", "a", CONTENT)
    second = await files.add("acme", "b", CONTENT)
    other = await files.add("other", "a", CONTENT)
    assert await num_contents(database) == 2
    await files.delete("acme", first.id)
    assert await files.content("acme", second.id) == CONTENT
    await files.delete("acme", second.id)
    assert await num_contents(database) == 1
    assert await files.content("other", other.id) == CONTENT


async def test_another_tenants_file_does_not_exist(database: Database) -> None:
    files = Files(database)
    mine = await files.add("acme", "a", CONTENT)
    for ask in (files.get, files.content, files.delete):
        with pytest.raises(NotFoundError, match=mine.id):
            await ask("other", mine.id)
    assert await listed(files, "other") == []
    assert await files.get("acme", mine.id) == mine


async def test_an_expired_file_is_gone_at_once_and_its_content_at_the_next_sweep(database: Database) -> None:
    clock = Clock()
    files = Files(database, clock=clock)
    short = await files.add("acme", "a", CONTENT, expires_after_s=3600)
    clock.now += 3599
    assert await listed(files, "acme") == [short.id]
    clock.now += 1
    assert await listed(files, "acme") == []
    with pytest.raises(NotFoundError):
        await files.content("acme", short.id)
    await files.add("acme", "b", CONTENT + CONTENT)
    assert await num_contents(database) == 2
    await files.sweep()
    assert await num_contents(database) == 1
    assert len(await listed(files, "acme")) == 1


async def test_a_sweep_removes_what_has_expired(database: Database) -> None:
    clock = Clock()
    files = Files(database, clock=clock)
    await files.add("acme", "short", CONTENT, expires_after_s=3600)
    kept = await files.add("other", "long", CONTENT, expires_after_s=7200)
    await files.sweep()
    assert await num_contents(database) == 2
    clock.now += 3600
    await files.sweep()
    assert await num_contents(database) == 1
    assert await files.content("other", kept.id) == CONTENT
