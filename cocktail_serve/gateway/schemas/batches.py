"""Batches, as OpenAI's API has them. The body of a new one is that of `batches.request`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field

from cocktail_serve.batches.batch import Batch, BatchStatus
from cocktail_serve.gateway.schemas.pages import Listed, PageView


class BatchErrorView(BaseModel):
    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrorList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchErrorView]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int = Field(description="Those in the error file: refused, or given up when the batch ended.")


class BatchView(Listed):
    """A batch."""

    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrorList | None = Field(description="Why it failed: what is wrong with its input file.")
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = Field(description="The answers, in the order of the input.")
    error_file_id: str | None = Field(description="The lines that have none, likewise.")
    created_at: int = Field(description="Unix time, seconds.")
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: Batch) -> Self:
        errors = [BatchErrorView.model_validate(error.to_json()) for error in batch.errors]
        return cls(
            id=batch.id,
            endpoint=batch.endpoint,
            errors=BatchErrorList(data=errors) if errors else None,
            input_file_id=batch.input_file_id,
            completion_window=batch.completion_window,
            status=batch.status,
            output_file_id=batch.output_file_id,
            error_file_id=batch.error_file_id,
            created_at=int(batch.created_at),
            in_progress_at=_seconds(batch.in_progress_at),
            expires_at=int(batch.expires_at),
            finalizing_at=_seconds(batch.finalizing_at),
            completed_at=_seconds(batch.completed_at),
            failed_at=_seconds(batch.failed_at),
            expired_at=_seconds(batch.expired_at),
            cancelling_at=_seconds(batch.cancelling_at),
            cancelled_at=_seconds(batch.cancelled_at),
            request_counts=RequestCounts(total=batch.num_total, completed=batch.num_completed, failed=batch.num_failed),
            metadata=None if batch.metadata is None else dict(batch.metadata),
        )


class BatchList(PageView[BatchView]):
    """The newest first."""


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
