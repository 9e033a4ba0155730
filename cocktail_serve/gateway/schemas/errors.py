"""The one body that every error has."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong, where, and what to do about it.")
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error, server_error, ...")
    param: str | None = Field(description="The field at fault, in dotted form.")
    code: str | None = Field(description="A stable name to branch on; the reference lists all.")


class ErrorBody(BaseModel):
    error: ErrorDetail
