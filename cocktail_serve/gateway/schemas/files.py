"""Files, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictStr, WithJsonSchema

from cocktail_serve.finetuning.files import File, Purpose
from cocktail_serve.gateway.schemas.pages import Listed, PageView

MIN_EXPIRY_S = 3600
MAX_EXPIRY_S = 2_592_000
"""An hour to thirty days, as OpenAI's API bounds `expires_after`."""


class FileUpload(BaseModel):
    """The form of `POST /v1/files`, as `multipart/form-data`."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[Any, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        description="JSONL: an example on each line, in a form that a pool takes; or a request of a batch."
    )
    purpose: StrictStr = Field(description="`fine-tune` or `batch`; no other is served.")
    expires_after_anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    expires_after_s: int | None = Field(
        None,
        alias="expires_after[seconds]",
        ge=MIN_EXPIRY_S,
        le=MAX_EXPIRY_S,
        description="Seconds from its creation until it is deleted; left out: kept until you delete it.",
    )


class FileView(Listed):
    """An uploaded file. Being there, it has been checked: `status` says no more."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Unix time, seconds.")
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: None = None

    @classmethod
    def of(cls, file: File) -> Self:
        return cls(
            id=file.id,
            bytes=file.num_bytes,
            created_at=int(file.created_at),
            expires_at=None if file.expires_at is None else int(file.expires_at),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(PageView[FileView]):
    """The newest first, unless asked otherwise."""


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
