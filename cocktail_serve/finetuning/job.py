"""The job as it stands at one moment, and what happens to it, told from what happens to its cocktail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cocktail_serve.cocktails.cocktail import Cocktail, Failure, Status
from cocktail_serve.finetuning.request import JobRequest, param_of_job

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]

JOB_STATUS: Mapping[Status, JobStatus] = {
    "queued": "queued",
    "scoring": "running",
    "mixing": "running",
    "ready": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}

UNFINISHED: tuple[JobStatus, ...] = ("queued", "running")


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job. What is finished does not change, whatever becomes of its cocktail.

    Attributes:
        cocktail_id: `name@digest8`, known at once; the model is there once the job has succeeded.
        created_at: seconds since the epoch, as `finished_at`.
    """

    id: str
    tenant: str
    cocktail_id: str
    request: JobRequest
    created_at: float
    status: JobStatus
    finished_at: float | None = None
    error: Failure | None = None

    @property
    def is_final(self) -> bool:
        return self.status not in UNFINISHED


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job.

    Attributes:
        is_metrics: whether it tells what was measured on the examples: that goes when the cocktail is deleted.
    """

    message: str
    level: Level = "info"
    data: Mapping[str, Any] | None = None
    is_metrics: bool = False


@dataclass(frozen=True, slots=True)
class ListedEvent:
    """An event in its place.

    Attributes:
        created_at: seconds since the epoch.
    """

    id: str
    created_at: float
    event: JobEvent


def failure_of(cocktail: Cocktail) -> Failure | None:
    """Why a job failed: its cocktail's failure, naming the field of the job."""
    error = cocktail.error
    return None if error is None else Failure(error.type, error.code, error.message, param_of_job(error.param))


def first_events(job: Job, cocktail: Cocktail) -> Iterator[JobEvent]:
    """What there is to say of a job that has just been made; its cocktail may have been there before."""
    yield JobEvent(f"Created fine-tuning job: {job.id}")
    ignored = job.request.ignored
    if ignored:
        named = ", ".join(f"{name} {value}" for name, value in ignored.items())
        yield JobEvent(f"Ignored {named}: models are mixed, not trained", "warn", {"ignored": ignored})
    if cocktail.status == "ready":
        yield JobEvent("The same request made this model before; nothing had to be done")
        yield _weighed(cocktail)
        yield from _ready(cocktail)
        return
    yield from _warned(cocktail.warnings)


def events_between(before: Cocktail, after: Cocktail) -> Iterator[JobEvent]:
    """What a change of a cocktail means to its jobs."""
    if after.status == "scoring":
        if before.status != "scoring":
            count = after.request.num_examples
            models = len(after.request.scored)
            yield JobEvent(f"Scoring {models} models on {count} examples", data={"progress": after.progress})
        yield from _scored(before, after)
    elif after.status == "mixing" and before.status != "mixing":
        yield from _scored(before, after)
        yield _weighed(after)
    elif after.status == "ready" and before.status != "ready":
        yield from _ready(after, known=before.warnings)
    elif after.status == "failed" and before.status != "failed":
        error = failure_of(after)
        message = "" if error is None else f": {error.message}"
        yield JobEvent(f"The job failed{message}", "error", None if error is None else error.to_json())
    elif after.status == "cancelled" and before.status != "cancelled":
        yield JobEvent("The job was cancelled")


def _scored(before: Cocktail, after: Cocktail) -> Iterator[JobEvent]:
    new = {name: loss for name, loss in after.losses.items() if name not in before.losses}
    if new:
        told = ", ".join(f"{name} {loss:.4g}" for name, loss in new.items())
        data = {"losses": dict(after.losses), "progress": after.progress}
        yield JobEvent(f"Loss on the examples (nats): {told}", data=data, is_metrics=True)
    elif int(10 * after.progress) > int(10 * before.progress):
        yield JobEvent(f"Trying mixtures: {after.progress:.0%} done", data={"progress": after.progress})


def _weighed(cocktail: Cocktail) -> JobEvent:
    weights = dict(cocktail.merging_weights or {})
    told = ", ".join(f"{name} {weight:.3g}" for name, weight in sorted(weights.items(), key=lambda item: -item[1]))
    chosen = cocktail.chosen
    data = {
        "losses": dict(cocktail.losses),
        "merging_weights": weights,
        "entropy": cocktail.entropy,
        "temperature": None if chosen is None else chosen.temperature,
        "alpha": None if chosen is None else chosen.alpha,
        "progress": cocktail.progress,
    }
    return JobEvent(f"Merging weights: {told}", data=data, is_metrics=True)


def _ready(cocktail: Cocktail, known: tuple[str, ...] = ()) -> Iterator[JobEvent]:
    data = {
        "mixed_loss": cocktail.mixed_loss,
        "validation_loss": cocktail.validation_loss,
        "progress": cocktail.progress,
    }
    told = [
        f"{loss:.4g} on the {of} examples"
        for loss, of in ((cocktail.mixed_loss, "training"), (cocktail.validation_loss, "validation"))
        if loss is not None
    ]
    if told:
        yield JobEvent(f"Loss of the mixture (nats): {', '.join(told)}", data=data, is_metrics=True)
    yield from _warned(tuple(text for text in cocktail.warnings if text not in known))
    yield JobEvent(
        f"New fine-tuned model created: {cocktail.id}", data={"fine_tuned_model": cocktail.id, "progress": 1.0}
    )
    yield JobEvent("The job has successfully completed")


def _warned(warnings: tuple[str, ...]) -> Iterator[JobEvent]:
    """Some of them name losses, so all are treated like them."""
    for text in warnings:
        yield JobEvent(text, "warn", is_metrics=True)
