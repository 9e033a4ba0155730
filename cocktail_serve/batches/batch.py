"""A batch as it stands at one moment, the lines of its file, and what is wrong with one that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

UNFINISHED: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")

ENDED_AT: Mapping[BatchStatus, str] = {
    "failed": "failed_at",
    "completed": "completed_at",
    "expired": "expired_at",
    "cancelled": "cancelled_at",
}
"""The moment that each end is kept as."""


@dataclass(frozen=True, slots=True)
class BatchError:
    """What is wrong with an input file.

    Attributes:
        line: from 1; None: of the file as a whole.
        param: field of the line.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch.

    Attributes:
        key_id: of the key that asked for it: what it uses is counted under that.
        metadata: None where none was given.
        output_expires_after_s: seconds that its output files are kept; None: until they are deleted.
        created_at: seconds since the epoch, as all moments.
        num_total: lines, once the file was read.
        errors: why it failed.
        owner: id of the gateway that works on it.
        epoch: raised whenever a gateway takes it over: what another still writes of it changes nothing.
    """

    id: str
    tenant: str
    key_id: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str] | None
    output_expires_after_s: int | None
    status: BatchStatus
    created_at: float
    expires_at: float
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[BatchError, ...] = ()
    owner: str | None = None
    epoch: int = 0

    @property
    def is_final(self) -> bool:
        return self.status not in UNFINISHED


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch.

    Attributes:
        position: of its line, from 1.
        content: the line, JSON.
    """

    position: int
    content: bytes


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What became of a line.

    Attributes:
        content: a line of the output or of the error file, JSON.
        is_error: which of the two.
    """

    position: int
    content: bytes
    is_error: bool
