"""Batches of all tenants: made, followed and cancelled."""

from __future__ import annotations

from dataclasses import dataclass

from cocktail_serve.batches.batch import Batch
from cocktail_serve.batches.request import BatchBody
from cocktail_serve.batches.runner import BatchRunner
from cocktail_serve.batches.store import BatchStore
from cocktail_serve.finetuning.files import Files, check_purpose
from cocktail_serve.ids import Page
from cocktail_serve.usage.actor import Actor


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of all tenants.

    Attributes:
        runner: works on those of this gateway.
    """

    store: BatchStore
    files: Files
    runner: BatchRunner

    async def create(self, tenant: str, body: BatchBody, *, actor: Actor) -> Batch:
        """Makes a batch, which begins at once. What its file says is checked then: a batch may fail by it.

        Raises:
            InvalidRequestError: what is not served, or a file that is for something else.
            NotFoundError: no such file for this tenant.
            RateLimitError: the tenant has too many that are unfinished.
            QuotaExceededError: it keeps as many bytes of examples and files as it may.
            StorageError: nothing was kept.
        """
        body.check()
        file = await self.files.get(tenant, body.input_file_id, param="input_file_id")
        check_purpose(file.id, file.purpose, "batch", param="input_file_id")
        batch = await self.store.add(tenant, body, owner=self.runner.me, actor=actor)
        self.runner.submit(batch)
        return batch

    async def get(self, tenant: str, batch_id: str) -> Batch:
        """As `BatchStore.get`."""
        return await self.store.get(tenant, batch_id)

    async def list(self, tenant: str, *, after: str | None, limit: int) -> Page[Batch]:
        """As `BatchStore.list`."""
        return await self.store.list(tenant, after=after, limit=limit)

    async def cancel(self, tenant: str, batch_id: str, *, actor: Actor) -> Batch:
        """Ends a batch: what was answered by then is in its files. Raises as `BatchStore.cancel`."""
        batch = await self.store.cancel(tenant, batch_id, actor=actor)
        self.runner.cancel(batch.id)
        return batch
