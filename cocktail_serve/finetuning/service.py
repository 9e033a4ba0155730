"""Fine-tuning jobs: made, followed and cancelled. A job is a cocktail in other words, and is made with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from cocktail_serve.cocktails.cocktail import Cocktail
from cocktail_serve.cocktails.options import CocktailRequest
from cocktail_serve.cocktails.parsing import parse_request
from cocktail_serve.cocktails.service import CocktailService
from cocktail_serve.config import Settings
from cocktail_serve.errors import InvalidRequestError, NotFoundError, params_named
from cocktail_serve.examples import read_jsonl
from cocktail_serve.finetuning.files import PURPOSE, Files
from cocktail_serve.finetuning.job import Job, ListedEvent
from cocktail_serve.finetuning.jobs import JobStore
from cocktail_serve.finetuning.request import JobBody, JobRequest, param_of_job
from cocktail_serve.ids import Page
from cocktail_serve.pool import Pool
from cocktail_serve.usage.actor import SERVER, Actor


@dataclass(frozen=True, slots=True)
class FineTuning:
    """Jobs of all tenants.

    Attributes:
        cocktails: the service that `jobs` is a hook of.
        executor: where files are read into examples, away from the event loop.
    """

    settings: Settings
    pools: Mapping[str, Pool]
    cocktails: CocktailService
    files: Files
    jobs: JobStore
    executor: Executor

    async def create(
        self, tenant: str, body: JobBody, *, visible: Collection[str] | None = None, actor: Actor = SERVER
    ) -> Job:
        """Makes a job, or finds the identical one of the last ten minutes.

        Args:
            visible: ids of the pools that are there for the tenant; None: all.

        Returns:
            The job; it is durable, and so is its cocktail.

        Raises:
            InvalidRequestError: a field that is not served, an option that breaks its rule, rows that do not fit the
                pool (`param` `training_file` or `validation_file`).
            NotFoundError: no such model or file for this tenant.
            ConflictError: the suffix is a pool's id.
            StorageError: nothing was kept.
        """
        request = JobRequest.of(body)
        known = await self.jobs.recent(tenant, request.digest)
        if known is not None:
            return known
        asked = request.cocktail(self.pools, visible=visible)
        training = await self.files.content(tenant, request.training_file, param="training_file", purpose=PURPOSE)
        validation = None
        if request.validation_file is not None:
            validation = await self.files.content(
                tenant, request.validation_file, param="validation_file", purpose=PURPOSE
            )
        made: list[Job] = []

        async def enlist(connection: AsyncConnection, cocktail: Cocktail) -> None:
            made.append(await self.jobs.add(connection, request, cocktail))

        with params_named(param_of_job):
            wanted = await asyncio.get_running_loop().run_in_executor(
                self.executor, self._parse, asked, training, validation, visible
            )
            await self.cocktails.create(tenant, wanted, actor=actor, extra_writes=enlist)
        return made[-1]

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Ends an unfinished job and the making of its model, for whichever jobs wait for that.

        Raises:
            NotFoundError: unknown, or another tenant's.
            InvalidRequestError: it has succeeded or failed.
        """
        job = await self.jobs.get(tenant, job_id)
        if not job.is_final:
            with contextlib.suppress(NotFoundError):  # deleted meanwhile, which cancels the job too
                await self.cocktails.cancel(tenant, job.cocktail_id)
            job = await self.jobs.get(tenant, job_id)
        if job.status != "cancelled":
            raise InvalidRequestError(
                f"{job_id} has {job.status} already; what is finished cannot be cancelled", code="job_finished"
            )
        return job

    async def events(self, tenant: str, job_id: str, *, after: str | None, limit: int) -> Page[ListedEvent]:
        """What happened to a job, the newest first; raises as `JobStore.get`, and for an `after` of another list."""
        return await self.jobs.events(await self.jobs.get(tenant, job_id), after=after, limit=limit)

    def _parse(
        self, asked: Mapping[str, Any], training: bytes, validation: bytes | None, visible: Collection[str] | None
    ) -> CocktailRequest:
        """Bound by the CPU: files may be megabytes."""
        body = {**asked, "examples": _rows(training)}
        if validation is not None:
            body["validation_examples"] = _rows(validation)
        return parse_request(body, settings=self.settings, pools=self.pools, visible=visible)


def _rows(content: bytes) -> list[Any]:
    """The rows of a file, which was checked when it came."""
    return read_jsonl(content.decode("utf-8-sig"))
