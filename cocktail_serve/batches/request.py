"""What a batch is asked with: the body of `POST /v1/batches`, and the lines of its input file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from cocktail_serve.batches.batch import BatchError, BatchLine
from cocktail_serve.digest import digest_of
from cocktail_serve.errors import InvalidRequestError
from cocktail_serve.storable_text import check_text

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/decisions", "/v1/embeddings", "/v1/responses")

WINDOW_S = 86_400.0
"""`24h`: how long a batch may take."""

MAX_LINES = 50_000
"""Of one batch, as OpenAI's; its bytes are bounded by what one upload may be."""

MAX_ERRORS = 100
"""Errors of a file that its batch shows."""

MAX_CUSTOM_ID = 512

_Value = Annotated[str, Field(max_length=512)]
_Key = Annotated[str, Field(max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OutputExpiry(_Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000, description="From the making of the files to their end.")


class BatchBody(_Body):
    """The body of `POST /v1/batches`."""

    input_file_id: str = Field(description="Id of a file that was uploaded with the purpose `batch`.")
    endpoint: str = Field(
        description=f"What all lines ask: {', '.join(f'`{path}`' for path in ENDPOINTS)}.",
        json_schema_extra={"enum": list(ENDPOINTS)},
    )
    completion_window: str = Field(
        description="`24h`: what is not answered by then is given up.", json_schema_extra={"enum": ["24h"]}
    )
    metadata: dict[_Key, _Value] | None = Field(None, max_length=16, description="Up to 16 pairs of strings; kept.")
    output_expires_after: OutputExpiry | None = Field(
        None, description="How long output files are kept; left out: until they are deleted."
    )

    def check(self) -> None:
        """Raises InvalidRequestError for what is not served."""
        if self.endpoint not in ENDPOINTS:
            raise InvalidRequestError(
                f"endpoint: must be one of {', '.join(ENDPOINTS)}, got {self.endpoint[:80]!r}", param="endpoint"
            )
        if self.completion_window != "24h":
            raise InvalidRequestError(
                f"completion_window: must be '24h', got {self.completion_window[:80]!r}", param="completion_window"
            )
        for key, value in (self.metadata or {}).items():
            check_text(key + value, param="metadata")


def read_lines(content: bytes, endpoint: str) -> tuple[list[BatchLine], list[str], list[BatchError]]:
    """The requests of an input file. Bound by the CPU.

    Returns:
        The lines; for each what its model is called by, as digest: lines of one model are answered together; and what
        is wrong, the first `MAX_ERRORS` of it. With any error the lines are of no use.
    """
    lines: list[BatchLine] = []
    models: list[str] = []
    errors: list[BatchError] = []
    seen: dict[str, int] = {}
    for number, line in _lines(content):
        if len(lines) >= MAX_LINES:
            errors.append(
                BatchError("too_many_tasks", f"the file has more than {MAX_LINES} requests; send several files")
            )
            break
        found = _check(line, number, endpoint, seen)
        if isinstance(found, BatchError):
            errors.append(found)
            if len(errors) == MAX_ERRORS:
                break
            continue
        lines.append(BatchLine(number, line))
        models.append(digest_of(str(found.get("model"))))
    if not lines and not errors:
        errors.append(BatchError("empty_file", "the file holds no requests: one JSON object on each line"))
    return lines, models, errors


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    # one by one: a list of all would be many times as large as a file of short ones
    lines = enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), start=1)
    return ((number, line.strip()) for number, line in lines if line.strip())


def _check(line: bytes, number: int, endpoint: str, seen: dict[str, int]) -> dict[str, Any] | BatchError:
    """The body of a request, or what is wrong with it."""
    try:
        request = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BatchError("invalid_json_line", f"this line is not JSON: {error}", number)
    if not isinstance(request, dict):
        return BatchError("invalid_json_line", "this line is no JSON object", number)
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters, which tells the answer by"
        wrong = BatchError("invalid_request", message, number, "custom_id")
    elif (first := seen.setdefault(custom_id, number)) != number:
        message = f"the custom_id {custom_id[:80]!r} was given before, on line {first}"
        wrong = BatchError("duplicate_custom_id", message, number, "custom_id")
    elif request.get("method") != "POST":
        wrong = BatchError("invalid_method", "method must be 'POST'", number, "method")
    elif request.get("url") != endpoint:
        message = f"url must be the endpoint of the batch, {endpoint!r}, got {str(request.get('url'))[:80]!r}"
        wrong = BatchError("mismatched_url", message, number, "url")
    elif not isinstance(body, dict):
        wrong = BatchError("invalid_request", "body must be the request, a JSON object", number, "body")
    elif not _can_be_written(body):
        wrong = BatchError("invalid_json_line", "the body is nested too deeply", number, "body")
    elif body.get("stream"):
        wrong = BatchError("invalid_request", "nobody reads a stream here: leave stream out", number, "body.stream")
    else:
        found: dict[str, Any] = body
        return found
    return wrong


def _can_be_written(body: Any) -> bool:
    """Whether the server can be asked with it: JSON is read at more levels than it is written at."""
    try:
        orjson.dumps(body)
    except orjson.JSONEncodeError:
        return False
    return True
