"""`/v1/fine_tuning/jobs` with the official client, strict about every answer: upload, job, events, model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from tests.gateways import EXAMPLES, PAIRS, LiveGateway, live_gateway

MESSAGES: Any = [{"role": "user", "content": "is fig a fruit?"}]
VALIDATION = [{"input": "is kiwi a fruit?", "output": "yes"}]
ADMIN = "the-operators-own"
DEADLINE_S = 60.0
ROOT = Path(__file__).parents[2]


def jsonl(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def strict(live: LiveGateway, key: str = "none") -> OpenAI:
    return OpenAI(base_url=live.base_url, api_key=key, max_retries=0, _strict_response_validation=True)


def upload(client: OpenAI, *rows: object) -> str:
    return client.files.create(file=("examples.jsonl", jsonl(*rows)), purpose="fine-tune").id


def finished(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    deadline = time.monotonic() + DEADLINE_S
    while job.status in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def succeeded(client: OpenAI, **fields: Any) -> FineTuningJob:
    job = finished(client, client.fine_tuning.jobs.create(**({"model": "flan"} | fields)))
    assert job.status == "succeeded", job.error
    return job


def events_of(client: OpenAI, job: FineTuningJob) -> list[FineTuningJobEvent]:
    """The oldest first."""
    return list(client.fine_tuning.jobs.list_events(job.id))[::-1]


def data_of(event: FineTuningJobEvent) -> dict[str, Any]:
    assert isinstance(event.data, dict)
    return event.data


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[OpenAI]:
    with strict(gateway) as client:
        yield client


@pytest.fixture(scope="module")
def training_file(client: OpenAI) -> str:
    return upload(client, *EXAMPLES)


class TestOneJob:
    def test_from_upload_to_answer(self, client: OpenAI, training_file: str) -> None:
        validation_file = upload(client, *VALIDATION)
        metadata = {"temperature": "0.5", "weighting": "softmax", "owner": "fruit"}
        job = client.fine_tuning.jobs.create(
            model="flan",
            training_file=training_file,
            validation_file=validation_file,
            suffix="fruit",
            seed=7,
            metadata=metadata,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
        )
        assert job.status in ("queued", "running", "succeeded")
        done = finished(client, job)
        assert (done.status, done.error, done.model, done.seed) == ("succeeded", None, "flan", 7)
        assert (done.training_file, done.validation_file) == (training_file, validation_file)
        assert (done.metadata, done.organization_id, done.result_files) == (metadata, "default", [])
        assert (done.hyperparameters.n_epochs, done.hyperparameters.batch_size) == (3, "auto")
        assert done.method is not None
        assert done.method.supervised is not None
        assert done.method.supervised.hyperparameters is not None
        assert done.method.supervised.hyperparameters.n_epochs == 3
        assert done.finished_at is not None
        assert done.finished_at >= done.created_at == job.created_at
        assert done.fine_tuned_model is not None
        assert done.fine_tuned_model.startswith("fruit@")
        for name in (done.fine_tuned_model, "fruit"):
            answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=4)
            assert answer.model == done.fine_tuned_model

        cocktail = httpx.get(f"{client.base_url}cocktails/{done.fine_tuned_model}").json()
        report = httpx.get(f"{client.base_url}cocktails/{done.fine_tuned_model}/report").json()
        assert (cocktail["temperature"], cocktail["seed"], cocktail["metadata"]) == (0.5, 7, metadata)
        assert report["validation_loss"] == cocktail["validation_loss"] is not None
        told = events_of(client, done)
        assert {event.object for event in told} == {"fine_tuning.job.event"}
        assert [event.level for event in told if "n_epochs 3" in event.message] == ["warn"]
        measured = [data_of(event) for event in told if event.type == "metrics"]
        assert measured[-2]["losses"] == cocktail["losses"]
        assert measured[-2]["merging_weights"] == cocktail["merging_weights"]
        assert measured[-1]["validation_loss"] == cocktail["validation_loss"]
        progress = [data["progress"] for event in told if "progress" in (data := event.data or {})]  # type: ignore[operator]
        assert progress == sorted(progress)
        assert progress[-1] == 1.0
        assert told[0].message == f"Created fine-tuning job: {done.id}"
        assert told[-1].message == "The job has successfully completed"

    def test_the_documented_example_runs(
        self, gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(ROOT)
        page = (ROOT / "docs" / "how-to" / "fine-tuning.md").read_text()
        code = page.partition("```python\n")[2].partition("```")[0]
        for demos, ours in (("http://127.0.0.1:8000/v1", gateway.base_url), ('model="trivia"', 'model="flan"')):
            assert demos in code
            code = code.replace(demos, ours)
        exec(code, {})  # the repository's own page
        told = capsys.readouterr().out
        assert "New fine-tuned model created: travel@" in told
        assert "The job has successfully completed" in told

    def test_every_field_is_sent(self, gateway: LiveGateway, client: OpenAI, training_file: str) -> None:
        job = succeeded(client, training_file=training_file, suffix="whole")
        sent = httpx.get(f"{gateway.base_url}/fine_tuning/jobs/{job.id}").json()
        assert sent.keys() >= FineTuningJob.model_fields.keys()
        event = httpx.get(f"{gateway.base_url}/fine_tuning/jobs/{job.id}/events?limit=1").json()["data"][0]
        assert event.keys() >= FineTuningJobEvent.model_fields.keys()
        assert (sent["metadata"], sent["estimated_finish"], sent["trained_tokens"], sent["seed"]) == (None, None, 0, 0)
        assert sent["hyperparameters"] == {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}

    async def test_the_async_client(self, gateway: LiveGateway) -> None:
        async with AsyncOpenAI(
            base_url=gateway.base_url, api_key="none", max_retries=0, _strict_response_validation=True
        ) as client:
            file = await client.files.create(file=jsonl(*EXAMPLES), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model="flan/nq", training_file=file.id, suffix="asynchronous")
            while job.status in ("queued", "running"):
                await asyncio.sleep(0.02)
                job = await client.fine_tuning.jobs.retrieve(job.id)
            assert job.fine_tuned_model is not None
            assert job.id in [each.id async for each in client.fine_tuning.jobs.list(limit=1)]
            told = [event.message async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
            assert told[0] == "The job has successfully completed"
            assert told[-1] == f"Created fine-tuning job: {job.id}"
            assert [each async for each in client.fine_tuning.jobs.checkpoints.list(job.id)] == []
            answer = await client.chat.completions.create(model=job.fine_tuned_model, messages=MESSAGES, max_tokens=2)
            assert answer.model == job.fine_tuned_model
            with pytest.raises(openai.BadRequestError):
                await client.fine_tuning.jobs.cancel(job.id)

    def test_a_target_and_options_in_the_metadata(self, client: OpenAI, training_file: str) -> None:
        metadata = {"alpha": "0.25", "weighting": "uniform", "method": "task_arithmetic", "method_params": "{}"}
        job = succeeded(client, model="flan/nq", training_file=training_file, suffix="aimed", metadata=metadata)
        cocktail = httpx.get(f"{client.base_url}cocktails/{job.fine_tuned_model}").json()
        assert (cocktail["target"], cocktail["alpha"]) == ("nq", 0.25)
        assert (cocktail["weighting"], cocktail["method"]) == ("uniform", "task_arithmetic")
        one = {"experts": "ag-news", "method": "slerp", "weighting": "softmax"}
        job = succeeded(client, training_file=training_file, suffix="narrow", metadata=one)
        cocktail = httpx.get(f"{client.base_url}cocktails/{job.fine_tuned_model}").json()
        assert (cocktail["experts"], sorted(cocktail["losses"])) == (["ag-news"], ["ag-news", "base"])

    def test_an_encoder(self, client: OpenAI) -> None:
        job = succeeded(client, model="bge", training_file=upload(client, *PAIRS), suffix="finder")
        assert job.fine_tuned_model is not None
        embedded = client.embeddings.create(model=job.fine_tuned_model, input="where is paris", encoding_format="float")
        assert embedded.model == job.fine_tuned_model

    def test_without_a_suffix_the_name_is_of_the_pool_and_the_job(self, client: OpenAI, training_file: str) -> None:
        first = succeeded(client, training_file=training_file, metadata={"run": "1"})
        second = succeeded(client, training_file=training_file, metadata={"run": "2"})
        names = [str(job.fine_tuned_model).partition("@")[0] for job in (first, second)]
        assert names[0] != names[1]
        assert all(name.startswith("flan-") for name in names)
        assert client.models.retrieve(names[0]).owned_by == "default"

    def test_the_model_is_listed_retrieved_and_deleted(self, client: OpenAI) -> None:
        secret = {"input": "who opens the vault?", "output": "nobody"}
        job = succeeded(client, training_file=upload(client, *EXAMPLES, secret), suffix="doomed")
        model = str(job.fine_tuned_model)
        assert {"doomed", model} <= {entry.id for entry in client.models.list()}
        assert client.models.retrieve(model).owned_by == "default"
        assert [event.type for event in events_of(client, job)].count("metrics") >= 2
        assert client.models.delete(model).deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)
        after = client.fine_tuning.jobs.retrieve(job.id)
        assert (after.status, after.fine_tuned_model) == ("succeeded", model), "what has happened has happened"
        told = events_of(client, job)
        assert told[-1].message == "The fine-tuned model was deleted"
        assert all(event.type == "message" and "oss" not in event.message for event in told), "nothing measured is left"

    def test_its_file_may_go_once_the_job_is_made(self, client: OpenAI) -> None:
        file = upload(client, *EXAMPLES)
        job = succeeded(client, training_file=file, suffix="independent")
        client.files.delete(file)
        assert client.fine_tuning.jobs.create(model="flan", training_file=file, suffix="independent").id == job.id
        assert client.chat.completions.create(model="independent", messages=MESSAGES, max_tokens=2).choices


class TestIdenticalJobs:
    def test_are_the_same_job(self, client: OpenAI, training_file: str) -> None:
        def create(**fields: Any) -> str:
            body = {"model": "flan", "training_file": training_file, "suffix": "twins"} | fields
            return client.fine_tuning.jobs.create(**body).id

        with ThreadPoolExecutor(8) as pool:
            ids = {made.result() for made in [pool.submit(create) for _ in range(16)]}
        assert len(ids) == 1
        assert create(metadata={"alpha": "0.5"}) not in ids
        assert create(hyperparameters={"n_epochs": 2}) not in ids
        assert create(hyperparameters={"n_epochs": "auto"}) in ids, "what a request omits is what it says by default"

    def test_a_deleted_model_is_made_again(self, client: OpenAI, training_file: str) -> None:
        first = succeeded(client, training_file=training_file, suffix="again")
        client.models.delete("again")
        second = succeeded(client, training_file=training_file, suffix="again")
        assert first.id != second.id
        assert first.fine_tuned_model == second.fine_tuned_model

    def test_another_job_for_the_same_mixture_finds_it(self, client: OpenAI, training_file: str) -> None:
        first = succeeded(client, training_file=training_file, suffix="shared")
        second = client.fine_tuning.jobs.create(
            model="flan", training_file=training_file, suffix="shared", metadata={"by": "another"}
        )
        assert second.id != first.id
        assert (second.status, second.fine_tuned_model) == ("succeeded", first.fine_tuned_model)
        assert any("made this model before" in event.message for event in events_of(client, second))


class TestLists:
    def test_pages(self, tmp_path: Path) -> None:
        with live_gateway(tmp_path) as live, strict(live) as client:
            empty = client.fine_tuning.jobs.list()
            assert (empty.data, empty.has_more) == ([], False)
            file = upload(client, *EXAMPLES)
            pairs = [{"team": "a"}, {"team": "b", "run": "1"}, None, {"team": "b", "run": "2"}, {}]
            jobs = [
                succeeded(client, training_file=file, suffix=f"page-{number}", metadata=metadata).id
                for number, metadata in enumerate(pairs)
            ]
            newest = jobs[::-1]
            assert [job.id for job in client.fine_tuning.jobs.list()] == newest
            assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == newest, "walked page by page"
            page = client.fine_tuning.jobs.list(limit=2, after=newest[0])
            assert ([job.id for job in page.data], page.has_more) == (newest[1:3], True)
            assert page.model_extra is not None
            assert (page.model_extra["first_id"], page.model_extra["last_id"]) == (newest[1], newest[2])
            assert not client.fine_tuning.jobs.list(limit=2, after=newest[2]).has_more

            def by(**metadata: str) -> list[str]:
                return [job.id for job in client.fine_tuning.jobs.list(metadata=metadata, limit=1)]

            assert by(team="b") == [jobs[3], jobs[1]]
            assert by(team="b", run="1") == [jobs[1]]
            assert by(team="c") == by(**{'"]': "b"}) == []
            without = httpx.get(f"{live.base_url}/fine_tuning/jobs?metadata=null").json()["data"]
            assert [job["id"] for job in without] == [jobs[4], jobs[2]]

            events = list(client.fine_tuning.jobs.list_events(jobs[0]))
            assert list(client.fine_tuning.jobs.list_events(jobs[0], limit=1)) == events
            assert len({event.id for event in events}) == len(events) > 4
            page_of_events = client.fine_tuning.jobs.list_events(jobs[0], after=events[0].id, limit=2)
            assert (page_of_events.data, page_of_events.has_more) == (events[1:3], True)

    @pytest.mark.parametrize("query", ["limit=0", "limit=1001", "after=ftjob-1", "metadata=x"])
    def test_are_asked_for_properly(self, gateway: LiveGateway, query: str) -> None:
        answer = httpx.get(f"{gateway.base_url}/fine_tuning/jobs?{query}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == query.partition("=")[0]

    def test_a_cursor_of_another_jobs_events_is_refused(self, client: OpenAI, training_file: str) -> None:
        one, other = (succeeded(client, training_file=training_file, suffix=f"cursor-{n}") for n in range(2))
        event = client.fine_tuning.jobs.list_events(one.id, limit=1).data[0]
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.list_events(other.id, after=event.id)
        assert caught.value.param == "after"


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
            ({"method": {"type": "reinforcement"}}, "method.type"),
            ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
            ({"method": {"type": "magic"}}, "method.type"),
            ({"method": {}}, "method.type"),
            ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
            ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
            ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
            ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
            ({"hyperparameters": {"learning_rate_multiplier": True}}, "hyperparameters.learning_rate_multiplier"),
            ({"hyperparameters": {"depth": 3}}, "hyperparameters.depth"),
            ({"suffix": "Not A Name"}, "suffix"),
            ({"suffix": "base"}, "suffix"),
            ({"suffix": ""}, "suffix"),
            ({"seed": "1"}, "seed"),
            ({"metadata": {"alpha": "half"}}, "metadata.alpha"),
            ({"metadata": {"alpha": "2"}}, "metadata.alpha"),
            ({"metadata": {"temperature": "nan"}}, "metadata.temperature"),
            ({"metadata": {"weighting": "fair"}}, "metadata.weighting"),
            ({"metadata": {"method": "stir"}}, "metadata.method"),
            ({"metadata": {"method_params": "{"}}, "metadata.method_params"),
            ({"metadata": {"budget": "1e3"}}, "metadata.budget"),
            ({"metadata": {"k": "v" * 513}}, "metadata"),
            ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
            ({"metadata": {"k": "\0"}}, "metadata"),
            ({"metadata": {"k": 1}}, "metadata.k"),
            ({"colour": "red"}, "colour"),
            ({"training_file": None}, "training_file"),
            ({"model": 1}, "model"),
        ],
    )
    def test_400(self, client: OpenAI, training_file: str, fields: dict[str, Any], param: str) -> None:
        body = {"model": "flan", "training_file": training_file, "suffix": "refused"} | fields
        answer = httpx.post(f"{client.base_url}fine_tuning/jobs", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    def test_null_means_left_out(self, client: OpenAI, training_file: str) -> None:
        names = ("validation_file", "metadata", "hyperparameters", "method", "seed", "integrations")
        body = {"model": "flan", "training_file": training_file, "suffix": "nulls"}
        plain = httpx.post(f"{client.base_url}fine_tuning/jobs", json=body).json()
        nulls = httpx.post(f"{client.base_url}fine_tuning/jobs", json=body | dict.fromkeys(names)).json()
        assert plain["id"] == nulls["id"]

    def test_rows_that_do_not_fit_the_pool(self, client: OpenAI, training_file: str) -> None:
        pairs = upload(client, *PAIRS)
        with pytest.raises(openai.BadRequestError, match="row 1") as caught:
            client.fine_tuning.jobs.create(model="flan", training_file=pairs)
        assert (caught.value.param, caught.value.code) == ("training_file", "invalid_examples")
        with pytest.raises(openai.BadRequestError, match="row 1") as caught:
            client.fine_tuning.jobs.create(model="flan", training_file=training_file, validation_file=pairs)
        assert caught.value.param == "validation_file"
        long = upload(client, EXAMPLES[0], {"input": "a fruit " * 300, "output": "yes"})
        for fields in ({"training_file": long}, {"training_file": training_file, "validation_file": long}):
            with pytest.raises(openai.BadRequestError, match="row 2") as caught:
                client.fine_tuning.jobs.create(model="flan", **fields)
            assert (caught.value.param, caught.value.code) == ([*fields][-1], "context_length_exceeded")

    @pytest.mark.parametrize(
        ("fields", "param", "code"),
        [
            ({"training_file": f"file-{'0' * 28}"}, "training_file", "file_not_found"),
            ({"training_file": "\0"}, "training_file", "file_not_found"),
            ({"validation_file": "nowhere"}, "validation_file", "file_not_found"),
            ({"model": "gpt-4o-mini"}, "model", "model_not_found"),
            ({"model": "flan/gone"}, "model", "model_not_found"),
            ({"model": "flan/base"}, "model", "model_not_found"),
            ({"model": "flan/"}, "model", "model_not_found"),
            ({"metadata": {"experts": "ag-news,gone"}}, "metadata.experts.1", "expert_not_found"),
        ],
    )
    def test_404(self, client: OpenAI, training_file: str, fields: dict[str, Any], param: str, code: str) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.fine_tuning.jobs.create(**({"model": "flan", "training_file": training_file} | fields))
        assert (caught.value.param, caught.value.code) == (param, code)

    def test_a_pools_name_is_taken(self, client: OpenAI, training_file: str) -> None:
        with pytest.raises(openai.ConflictError) as caught:
            client.fine_tuning.jobs.create(model="flan", training_file=training_file, suffix="bge")
        assert caught.value.param == "suffix"

    def test_jobs_are_not_paused(self, client: OpenAI, training_file: str) -> None:
        job = succeeded(client, training_file=training_file, suffix="restless")
        for call in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
            with pytest.raises(openai.BadRequestError) as caught:
                call(job.id)
            assert caught.value.code == "not_supported"
        assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []

    @pytest.mark.parametrize("job_id", [f"ftjob-{'0' * 28}", "nothing"])
    def test_a_job_that_is_not_there(self, gateway: LiveGateway, job_id: str) -> None:
        url = f"{gateway.base_url}/fine_tuning/jobs/{job_id}"
        answers = [httpx.get(url + tail) for tail in ("", "/events", "/checkpoints")]
        answers += [httpx.post(url + tail) for tail in ("/cancel", "/pause", "/resume")]
        assert [answer.status_code for answer in answers] == [404] * 6
        assert {answer.json()["error"]["code"] for answer in answers} == {"job_not_found"}


def slow(folder: Path, score_ms: int) -> dict[str, Any]:
    """An engine that scores slowly enough to be looked at."""
    return {"args": {"faults": str(folder / "faults"), "score-ms": score_ms}}


class TestUnfinished:
    def test_cancel(self, tmp_path: Path) -> None:
        with live_gateway(tmp_path, engine=slow(tmp_path, 30_000)) as live, strict(live) as client:
            fields: Any = {"model": "flan", "training_file": upload(client, *EXAMPLES), "suffix": "stopped"}
            job = client.fine_tuning.jobs.create(**fields)
            assert job.fine_tuned_model is None
            cancelled = client.fine_tuning.jobs.cancel(job.id)
            assert (cancelled.id, cancelled.status, cancelled.fine_tuned_model) == (job.id, "cancelled", None)
            assert cancelled.finished_at is not None
            assert client.fine_tuning.jobs.cancel(job.id) == cancelled, "once more changes nothing"
            assert events_of(client, job)[-1].message == "The job was cancelled"
            again = client.fine_tuning.jobs.create(**fields)
            assert again.id != job.id, "a cancelled job does not stand for a new one"
            assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
            # the deletion of its model ends a job as well
            assert httpx.delete(f"{live.base_url}/cocktails/stopped").status_code == 200
            ended = client.fine_tuning.jobs.retrieve(again.id)
            assert (ended.status, ended.error, ended.fine_tuned_model) == ("cancelled", None, None)
            assert "deleted" in events_of(client, ended)[-1].message

    def test_a_job_survives_a_restart(self, tmp_path: Path) -> None:
        with live_gateway(tmp_path, engine=slow(tmp_path, 30_000)) as live, strict(live) as client:
            file = upload(client, *EXAMPLES)
            job = client.fine_tuning.jobs.create(model="flan", training_file=file, suffix="patient")
            deadline = time.monotonic() + DEADLINE_S
            while client.fine_tuning.jobs.retrieve(job.id).status != "running":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            told = events_of(client, job)
        with live_gateway(tmp_path) as live, strict(live) as client:
            done = finished(client, client.fine_tuning.jobs.retrieve(job.id))
            assert (done.status, done.created_at) == ("succeeded", job.created_at)
            assert events_of(client, done)[: len(told)] == told, "what was told stays told"
            assert client.fine_tuning.jobs.create(model="flan", training_file=file, suffix="patient").id == job.id
            answer = client.chat.completions.create(model="patient", messages=MESSAGES, max_tokens=2)
            assert answer.model == done.fine_tuned_model

    def test_a_job_that_fails_says_why(self, tmp_path: Path) -> None:
        with live_gateway(tmp_path) as live, strict(live) as client:
            fields: Any = {"model": "flan", "training_file": upload(client, *EXAMPLES), "suffix": "unlucky"}
            (live.faults / "mix_invalid").touch()
            job = finished(client, client.fine_tuning.jobs.create(**fields))
            assert (job.status, job.fine_tuned_model) == ("failed", None)
            assert job.error is not None
            assert job.error.code
            assert events_of(client, job)[-1].level == "error"
            assert job.error.message in events_of(client, job)[-1].message
            assert finished(client, client.fine_tuning.jobs.create(**fields)).status == "succeeded", "tried again"
            assert client.fine_tuning.jobs.retrieve(job.id) == job


def test_another_tenants_files_jobs_and_events_are_not_there(tmp_path: Path) -> None:
    with live_gateway(tmp_path, server={"auth": "required"}, admin_key=ADMIN) as live:

        def key(tenant: str, *scopes: str) -> str:
            body = {"tenant": tenant, "scopes": scopes or ["use", "create"]}
            answer = httpx.post(f"{live.url}/admin/keys", headers={"authorization": f"Bearer {ADMIN}"}, json=body)
            return str(answer.json()["key"])

        with strict(live, key("acme")) as ours, strict(live, key("other")) as theirs:
            file = upload(ours, *EXAMPLES)
            job = succeeded(ours, training_file=file, suffix="ours")
            assert job.organization_id == "acme"
            with pytest.raises(openai.NotFoundError) as caught:
                theirs.fine_tuning.jobs.create(model="flan", training_file=file, suffix="ours")
            assert caught.value.code == "file_not_found"
            jobs = theirs.fine_tuning.jobs
            for call in (jobs.retrieve, jobs.list_events, jobs.cancel, jobs.pause, jobs.checkpoints.list):
                with pytest.raises(openai.NotFoundError) as caught:
                    call(job.id)
                assert caught.value.code == "job_not_found"
            assert list(jobs.list()) == []
            same = succeeded(theirs, training_file=upload(theirs, *EXAMPLES), suffix="ours")
            assert (same.id != job.id, [each.id for each in jobs.list()]) == (True, [same.id])
            theirs.models.delete("ours")
            assert ours.fine_tuning.jobs.retrieve(job.id) == job
            assert len(events_of(ours, job)) > 4

            headers = {"authorization": f"Bearer {ADMIN}"}
            httpx.put(f"{live.url}/admin/tenants/other", headers=headers, json={"pools": ["bge"]}).raise_for_status()
            with pytest.raises(openai.NotFoundError, match="there are: bge") as caught:
                jobs.create(model="flan", training_file=upload(theirs, *EXAMPLES), suffix="hidden")
            assert caught.value.param == "model"
        with strict(live, key("acme", "use")) as reader:
            assert reader.fine_tuning.jobs.retrieve(job.id) == job
            for refused in (reader.fine_tuning.jobs.cancel, reader.fine_tuning.jobs.pause):
                with pytest.raises(openai.PermissionDeniedError):
                    refused(job.id)
            with pytest.raises(openai.PermissionDeniedError):
                reader.fine_tuning.jobs.create(model="flan", training_file=file)


def test_a_tenants_limits_hold_for_jobs(tmp_path: Path) -> None:
    with live_gateway(tmp_path, limits={"cocktails": 1}) as live, strict(live) as client:
        file = upload(client, *EXAMPLES)
        first = succeeded(client, training_file=file, suffix="first")
        with pytest.raises(openai.RateLimitError, match="the limit is 1"):
            client.fine_tuning.jobs.create(model="flan", training_file=file, suffix="second")
        assert [job.id for job in client.fine_tuning.jobs.list()] == [first.id], "what was refused left no job"
        client.models.delete("first")
        succeeded(client, training_file=file, suffix="second")
