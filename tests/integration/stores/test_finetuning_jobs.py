"""Jobs in the database, of either kind: what their cocktails' changes make of them, and how long equal ones are one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cocktail_serve.cocktails.cocktail import Cocktail, Failure
from cocktail_serve.cocktails.store import Store
from cocktail_serve.database.database import Database
from cocktail_serve.errors import InvalidRequestError, NotFoundError
from cocktail_serve.finetuning.job import Job, ListedEvent
from cocktail_serve.finetuning.jobs import SAME_JOB_S, JobStore
from cocktail_serve.finetuning.request import JobRequest
from tests.cocktails import queued_cocktail


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A store of cocktails whose hook the jobs are."""

    def __init__(self, database: Database) -> None:
        self.clock = Clock()
        self.jobs = JobStore(database, clock=self.clock)
        self.cocktails = Store(database, change_hooks=[self.jobs])
        self.latest: dict[str, Cocktail] = {}

    async def enlist(self, cocktail: Cocktail, request: JobRequest, *, is_new: bool = False) -> Job:
        """Makes a job beside a cocktail, as a creation does."""
        made: list[Job] = []

        async def extra_writes(connection: Any, cocktail: Cocktail) -> None:
            made.append(await self.jobs.add(connection, request, cocktail))

        if is_new:
            self.latest[cocktail.uid] = await self.cocktails.add(cocktail, None, [], extra_writes=extra_writes)
        else:
            known = self.latest[cocktail.uid]
            self.latest[cocktail.uid] = await self.cocktails.update(known, before=known, extra_writes=extra_writes)
        return made[0]

    async def change(self, cocktail: Cocktail, **changes: Any) -> Cocktail:
        known = self.latest[cocktail.uid]
        self.latest[cocktail.uid] = await self.cocktails.update(replace(known, **changes), before=known)
        return self.latest[cocktail.uid]

    async def told(self, job: Job) -> list[ListedEvent]:
        """The oldest first."""
        return list((await self.jobs.events(job, after=None, limit=100)).data)[::-1]

    async def messages(self, job: Job) -> list[str]:
        return [listed.event.message for listed in await self.told(job)]


@pytest.fixture
async def world(database: Database) -> World:
    return World(database)


def request(**changes: Any) -> JobRequest:
    made = JobRequest(
        model="flan",
        training_file="file-1",
        validation_file=None,
        suffix="films",
        metadata={"owner": "é"},
        hyperparameters={"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
        seed=0,
    )
    return replace(made, **changes)


async def test_a_job_follows_its_cocktail(world: World) -> None:
    asked = request(hyperparameters={"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5})
    of = queued_cocktail()
    job = await world.enlist(of, asked, is_new=True)
    assert await world.jobs.get("acme", job.id) == job
    assert (job.status, job.finished_at, job.request, job.cocktail_id) == ("queued", None, asked, of.id)
    of = await world.change(of, status="scoring")
    of = await world.change(of, losses={"base": 2.0}, progress=0.4)
    assert (await world.jobs.get("acme", job.id)).status == "running"
    of = await world.change(of, losses={"base": 2.0, "nq": 1.0}, progress=0.8)
    of = await world.change(of, status="mixing", merging_weights={"base": 0.25, "nq": 0.75}, entropy=0.5)
    of = await world.change(of, progress=0.9)
    world.clock.now += 5
    await world.change(of, status="ready", progress=1.0, mixed_loss=0.5, warnings=("nq alone is better",))
    done = await world.jobs.get("acme", job.id)
    assert (done.status, done.finished_at) == ("succeeded", world.clock.now)
    told = await world.told(job)
    assert [listed.event.message for listed in told] == [
        f"Created fine-tuning job: {job.id}",
        "Ignored n_epochs 3, learning_rate_multiplier 0.5: models are mixed, not trained",
        "Scoring 2 models on 2 examples",
        "Loss on the examples (nats): base 2",
        "Loss on the examples (nats): nq 1",
        "Merging weights: nq 0.75, base 0.25",
        "Loss of the mixture (nats): 0.5 on the training examples",
        "nq alone is better",
        f"New fine-tuned model created: {of.id}",
        "The job has successfully completed",
    ]
    assert [listed.event.level for listed in told].count("warn") == 2
    weighed = told[5].event.data
    assert weighed is not None
    assert (weighed["losses"], weighed["merging_weights"]) == ({"base": 2.0, "nq": 1.0}, {"base": 0.25, "nq": 0.75})


async def test_a_search_tells_its_progress_now_and_then(world: World) -> None:
    of = queued_cocktail()
    job = await world.enlist(of, request(), is_new=True)
    of = await world.change(of, status="scoring", losses={"base": 2.0, "nq": 1.0}, progress=0.32)
    for step in range(40):
        of = await world.change(of, progress=0.32 + step / 100)
    assert sum("Trying mixtures" in message for message in await world.messages(job)) == 4


async def test_a_failure_names_the_field_of_the_job(world: World) -> None:
    of = queued_cocktail()
    job = await world.enlist(of, request(), is_new=True)
    await world.change(of, status="failed", error=Failure("InvalidExamplesError", "invalid_examples", "no", "examples"))
    failed = await world.jobs.get("acme", job.id)
    assert (failed.status, failed.finished_at) == ("failed", world.clock.now)
    assert failed.error == Failure("InvalidExamplesError", "invalid_examples", "no", "training_file")
    last = (await world.told(job))[-1].event
    assert (last.level, last.message) == ("error", "The job failed: no")


async def test_what_is_finished_does_not_change(world: World) -> None:
    of = queued_cocktail()
    job = await world.enlist(of, request(), is_new=True)
    of = await world.change(of, status="cancelled")
    cancelled, told = await world.jobs.get("acme", job.id), await world.messages(job)
    of = await world.change(of, status="queued")
    again = await world.enlist(of, request())
    assert again.id != job.id
    await world.change(of, status="ready")
    assert (await world.jobs.get("acme", again.id)).status == "succeeded"
    assert await world.jobs.get("acme", job.id) == cancelled
    assert await world.messages(job) == told


async def test_an_identical_request_is_the_same_job_for_ten_minutes(world: World) -> None:
    of = queued_cocktail()
    job = await world.enlist(of, request(), is_new=True)
    world.clock.now += SAME_JOB_S - 1
    assert (await world.enlist(of, request())).id == job.id
    assert (await world.enlist(of, request(seed=1))).id != job.id
    assert await world.jobs.recent("acme", request().digest) == job
    assert await world.jobs.recent("other", request().digest) is None
    world.clock.now += 1
    assert await world.jobs.recent("acme", request().digest) is None
    assert (await world.enlist(of, request())).id != job.id


async def test_a_deletion_takes_what_was_measured_and_ends_what_is_unfinished(world: World) -> None:
    ready, working = queued_cocktail("1"), queued_cocktail("2")
    done = await world.enlist(ready, request(), is_new=True)
    scored = await world.change(ready, status="scoring", losses={"base": 2.0}, progress=0.4)
    await world.change(scored, status="ready", mixed_loss=0.5, warnings=("0.5 is more than base alone",))
    unfinished = await world.enlist(working, request(seed=1), is_new=True)
    await world.change(working, status="scoring", losses={"base": 3.0})
    await world.cocktails.delete("acme", ["1", "2"])
    assert [(await world.jobs.get("acme", each.id)).status for each in (done, unfinished)] == ["succeeded", "cancelled"]
    assert await world.messages(done) == [
        f"Created fine-tuning job: {done.id}",
        "Scoring 2 models on 2 examples",
        f"New fine-tuned model created: {ready.id}",
        "The job has successfully completed",
        "The fine-tuned model was deleted",
    ]
    assert (await world.messages(unfinished))[-1] == "The job was cancelled: its model was deleted"
    assert await world.jobs.recent("acme", request().digest) is None, "it stands for no new one"


async def test_events_come_in_pages_that_do_not_shift(world: World) -> None:
    of = queued_cocktail()
    job = await world.enlist(of, request(), is_new=True)
    of = await world.change(of, status="scoring", losses={"base": 2.0})
    first = await world.jobs.events(job, after=None, limit=2)
    assert ([each.event.message for each in first.data], first.has_more) == (
        ["Loss on the examples (nats): base 2", "Scoring 2 models on 2 examples"],
        True,
    )
    await world.change(of, status="ready")
    rest = await world.jobs.events(job, after=first.data[-1].id, limit=2)
    assert ([each.event.message for each in rest.data], rest.has_more) == (
        [f"Created fine-tuning job: {job.id}"],
        False,
    )
    for wrong in ("", "ftevent-1", f"ftevent-{'0' * 28}-1", f"{first.data[0].id}\n", first.data[0].id[:-1] + "²"):
        with pytest.raises(InvalidRequestError, match="not an event of this job"):
            await world.jobs.events(job, after=wrong, limit=2)


async def test_another_tenants_job_does_not_exist(world: World) -> None:
    mine = await world.enlist(queued_cocktail("1"), request(), is_new=True)
    theirs = await world.enlist(queued_cocktail("2", tenant="other"), request(), is_new=True)
    assert mine.id != theirs.id
    with pytest.raises(NotFoundError):
        await world.jobs.get("other", mine.id)
    for tenant, job in (("acme", mine), ("other", theirs)):
        assert (await world.jobs.list(tenant, after=None, limit=9)).data == [job]
        assert (await world.jobs.list(tenant, after=None, limit=9, metadata={"owner": "é"})).data == [job]
    assert (await world.jobs.list("acme", after=None, limit=9, metadata={})).data == []


async def test_a_sweep_removes_jobs_that_ended_long_ago(world: World) -> None:
    ended = await world.enlist(queued_cocktail("1"), request(), is_new=True)
    await world.change(queued_cocktail("1"), status="failed", error=Failure("EngineError", "engine_error", "it died"))
    running = await world.enlist(queued_cocktail("2"), request(seed=1), is_new=True)
    world.clock.now += 3600
    await world.jobs.sweep(older_than_s=3601)
    assert (await world.jobs.get("acme", ended.id)).status == "failed"
    await world.jobs.sweep(older_than_s=3600)
    with pytest.raises(NotFoundError):
        await world.jobs.get("acme", ended.id)
    assert await world.told(ended) == []
    assert (await world.jobs.get("acme", running.id)).status == "queued"
    assert len((await world.cocktails.load()).cocktails) == 2, "what they made stays"
