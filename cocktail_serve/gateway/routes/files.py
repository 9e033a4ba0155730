"""`/v1/files`: examples to fine-tune with and requests of batches, used by name. Each tenant its own."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.finetuning.files import PURPOSE, UPLOADED, check_jsonl
from cocktail_serve.gateway.dependencies import CreatorDep, GatewayDep, TenantDep
from cocktail_serve.gateway.openapi import error_responses, form_request
from cocktail_serve.gateway.schemas.files import FileDeleted, FileList, FileUpload, FileView
from cocktail_serve.gateway.schemas.pages import AfterQuery
from cocktail_serve.ids import Order
from cocktail_serve.request_schema import parse_as
from cocktail_serve.storable_text import check_text

router = APIRouter(tags=["files"])

MAX_FILES = 10_000
"""Files of one page, as OpenAI's limit and default."""

MAX_FIELDS = 16
MAX_FILENAME = 255


@router.post("/v1/files", responses=error_responses(413, 429), openapi_extra=form_request(FileUpload))
async def upload_file(gateway: GatewayDep, creator: CreatorDep, request: Request) -> FileView:
    """Keeps a JSONL file of examples, once every line of it is one; or the requests of a batch."""
    form = await _form(request)
    try:
        upload = parse_as(FileUpload, form)
        if not isinstance(upload.file, UploadFile):
            raise InvalidRequestError("file: must be an uploaded file, with a file name", param="file")
        purpose = next((purpose for purpose in UPLOADED if purpose == upload.purpose), None)
        if purpose is None:
            raise InvalidRequestError(
                f"purpose: must be 'fine-tune' or 'batch', got {upload.purpose!r}: files are examples to fine-tune "
                "with, or requests of a batch, here",
                param="purpose",
            )
        content = await upload.file.read()
    finally:
        for part in form.values():
            if isinstance(part, UploadFile):
                await part.close()
    if purpose == PURPOSE:
        await gateway.off_loop(partial(check_jsonl, content))  # the lines of a batch are checked with it
    filename = check_text((upload.file.filename or "examples.jsonl")[:MAX_FILENAME], param="file")
    return FileView.of(
        await gateway.files.add(
            creator.tenant, filename, content, expires_after_s=upload.expires_after_s, purpose=purpose
        )
    )


@router.get("/v1/files", responses=error_responses())
async def list_files(
    *,
    gateway: GatewayDep,
    tenant: TenantDep,
    after: AfterQuery = None,
    limit: Annotated[int, Query(ge=1, le=MAX_FILES)] = MAX_FILES,
    order: Annotated[Order, Query(description="By creation.")] = "desc",
    purpose: Annotated[str | None, Query(description="Only files of this purpose.")] = None,
) -> FileList:
    """The tenant's files, the newest first."""
    page = await gateway.files.list(tenant, after=after, limit=limit, order=order, purpose=purpose)
    return FileList.of([FileView.of(file) for file in page.data], has_more=page.has_more)


@router.get("/v1/files/{file_id}", responses=error_responses(404))
async def retrieve_file(gateway: GatewayDep, tenant: TenantDep, file_id: str) -> FileView:
    """One file, without its content."""
    return FileView.of(await gateway.files.get(tenant, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=Response,
    responses={
        **error_responses(404),
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    },
)
async def retrieve_file_content(gateway: GatewayDep, tenant: TenantDep, file_id: str) -> Response:
    """What was uploaded, byte for byte."""
    return Response(await gateway.files.content(tenant, file_id), media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", responses=error_responses(404, 429))
async def delete_file(gateway: GatewayDep, creator: CreatorDep, file_id: str) -> FileDeleted:
    """Deletes a file and its content; models made from it stay, with the examples they were made from."""
    await gateway.files.delete(creator.tenant, file_id)
    return FileDeleted(id=file_id)


async def _form(request: Request) -> dict[str, Any]:
    """The fields of a form.

    Raises:
        InvalidRequestError: no form, or a field that is there twice.
        PayloadTooLargeError: from `BodyLimit`, while reading.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequestError(
            "the body must be a form with the header 'Content-Type: multipart/form-data'",
            code="unsupported_content_type",
        )
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS)
    except HTTPException as error:
        raise InvalidRequestError(f"the form cannot be read: {error.detail}", code="invalid_form") from error
    return dict(form)
