"""Fine-tuning jobs, as OpenAI's API has them. The body of a new one is that of `finetuning.request`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from cocktail_serve.cocktails.cocktail import Failure
from cocktail_serve.finetuning.job import Job, JobStatus, Level, ListedEvent
from cocktail_serve.gateway.schemas.pages import Listed, PageView


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None

    @classmethod
    def of(cls, failure: Failure) -> Self:
        return cls(code=failure.code, message=failure.message, param=failure.param)


class HyperparametersView(BaseModel):
    """As asked for; nothing is trained by them."""

    batch_size: Literal["auto"] | int
    learning_rate_multiplier: Literal["auto"] | int | float
    n_epochs: Literal["auto"] | int


class SupervisedView(BaseModel):
    hyperparameters: HyperparametersView


class MethodView(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedView


class JobView(Listed):
    """A fine-tuning job."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int = Field(description="Unix time, seconds.")
    error: JobError | None = Field(description="Why it failed.")
    fine_tuned_model: str | None = Field(description="`name@digest8`, once the job has succeeded.")
    finished_at: int | None
    hyperparameters: HyperparametersView
    model: str = Field(description="As asked for: `<pool>`, or `<pool>/<expert>`.")
    organization_id: str = Field(description="The tenant.")
    result_files: list[str] = Field(description="None: results are in the events and in the cocktail's report.")
    seed: int
    status: JobStatus
    trained_tokens: int | None = Field(description="0 once it has succeeded: nothing is trained.")
    training_file: str
    validation_file: str | None
    estimated_finish: None = None
    integrations: list[Any] = Field(description="None are served.")
    metadata: dict[str, str] | None
    method: MethodView

    @classmethod
    def of(cls, job: Job) -> Self:
        hyperparameters = HyperparametersView.model_validate(job.request.hyperparameters)
        succeeded = job.status == "succeeded"
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            error=None if job.error is None else JobError.of(job.error),
            fine_tuned_model=job.cocktail_id if succeeded else None,
            finished_at=None if job.finished_at is None else int(job.finished_at),
            hyperparameters=hyperparameters,
            model=job.request.model,
            organization_id=job.tenant,
            result_files=[],
            seed=job.request.seed,
            status=job.status,
            trained_tokens=0 if succeeded else None,
            training_file=job.request.training_file,
            validation_file=job.request.validation_file,
            integrations=[],
            metadata=None if job.request.metadata is None else dict(job.request.metadata),
            method=MethodView(supervised=SupervisedView(hyperparameters=hyperparameters)),
        )


class JobList(PageView[JobView]):
    """The newest first."""


class JobEventView(Listed):
    """Something that happened to a job."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int = Field(description="Unix time, seconds.")
    level: Level
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None = Field(
        description="What is known by then of `losses`, `merging_weights`, `entropy`, `temperature`, `alpha`, "
        "`mixed_loss`, `validation_loss` and `progress`."
    )

    @classmethod
    def of(cls, listed: ListedEvent) -> Self:
        event = listed.event
        return cls(
            id=listed.id,
            created_at=int(listed.created_at),
            level=event.level,
            message=event.message,
            type="metrics" if event.is_metrics and event.data is not None else "message",
            data=None if event.data is None else dict(event.data),
        )


class JobEventList(PageView[JobEventView]):
    """The newest first."""


class CheckpointList(PageView[Listed]):
    """Always empty: a mixture has no steps to keep."""
