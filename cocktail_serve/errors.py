"""Every error a caller can see, drawn as one tree. Knows no HTTP: the gateway holds the one table of statuses.

CocktailError
├── ClientError              the request must change
│   ├── InvalidRequestError
│   │   ├── InvalidExamplesError
│   │   ├── InvalidMixError
│   │   │   └── MethodNotServedError
│   │   ├── WrongModelKindError
│   │   └── ContextLengthError
│   ├── ConfigError
│   ├── AuthenticationError
│   ├── PermissionDeniedError
│   ├── NotFoundError
│   ├── ConflictError
│   ├── PayloadTooLargeError
│   ├── NotServedError
│   ├── CheckpointError
│   ├── ModelChangedError
│   ├── IncompatibleModelsError
│   └── NotFiniteError
├── CapacityError            the same request may succeed later
│   ├── ModelNotReadyError
│   ├── QueueTimeoutError
│   ├── DrainedError
│   ├── RateLimitError
│   └── QuotaExceededError
└── ServerError              nothing the caller can change
    ├── EngineError
    ├── EngineTimeoutError
    └── StorageError
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class CocktailError(Exception):
    """Root of the tree.

    Args:
        message: what is wrong, where, and what to do about it.
        param: the request field at fault, in dotted form (`examples`, `merging_weights.ag-news`), if there is one.
        code: overrides the class's stable code where one class serves several (404s name what was not found).
    """

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code  # type: ignore[misc]  # an instance may be more exact than its class


class ClientError(CocktailError):
    """The request must change before it can succeed."""

    code = "invalid_request"


class InvalidRequestError(ClientError):
    """A malformed or unfit request; `param` names the field."""


class InvalidExamplesError(InvalidRequestError):
    """Examples that are empty, malformed, or do not fit the pool; the message carries the row number, from 1."""

    code = "invalid_examples"

    def __init__(
        self, message: str, *, row: int | None = None, param: str | None = "examples", code: str | None = None
    ) -> None:
        super().__init__(message if row is None else f"row {row}: {message}", param=param, code=code)
        self.row = row


class InvalidMixError(InvalidRequestError):
    """Merging weights, alpha, temperature or a method that break their rule."""

    code = "invalid_mix"


class MethodNotServedError(InvalidMixError):
    """A method that needs merged parameters, in a pool that is served unmerged; says what the operator can do."""

    code = "method_not_served"


class WeightingNotServedError(InvalidMixError):
    """A weighting that the server does not offer for this pool; says what to use instead."""

    code = "weighting_not_served"


class WrongModelKindError(InvalidRequestError):
    """A request for a kind of model that the pool is not: chat on an encoder, embeddings of a decoder."""

    code = "wrong_model_kind"


class ContextLengthError(InvalidRequestError):
    """A text longer than the model's context."""

    code = "context_length_exceeded"


class ConfigError(ClientError):
    """A configuration file that cannot be used; names the key."""

    code = "invalid_config"


class AuthenticationError(ClientError):
    """No key, or one that is not valid."""

    code = "invalid_api_key"


class PermissionDeniedError(ClientError):
    """A valid key without the scope; or the deletion of what the operator owns."""

    code = "permission_denied"


class NotFoundError(ClientError):
    """Unknown, or another tenant's."""

    code = "not_found"


class ConflictError(ClientError):
    """Clashes with what exists. A retry of the same request never helps."""

    code = "conflict"


class PayloadTooLargeError(ClientError):
    """A body or a set of examples over the limit."""

    code = "payload_too_large"


class NotServedError(ClientError):
    """A part of an API that is not served here, whatever the request; says what to use instead."""

    code = "not_served"


class CheckpointError(ClientError):
    """A checkpoint that cannot be read (truncated, corrupt, pickled with code, quantised, a shard missing), or holds
    NaN or infinity."""

    code = "invalid_checkpoint"


class ModelChangedError(ClientError):
    """A model's files are not those any more that its name stands for; names the file, and how to go on."""

    code = "model_changed"


class IncompatibleModelsError(ClientError):
    """Models that cannot be mixed; names the tensor or setting, both values, and the fix."""

    code = "incompatible_models"


class NotFiniteError(ClientError):
    """A mixture, a loss or an answer that is infinite or not a number; names the tensor or example, and the models."""

    code = "not_finite"


def error_of_code(code: str | None, message: str) -> ClientError | None:
    """Why another process does not mix its models, by the code that it gave; None of any other code."""
    for kind in (ModelChangedError, CheckpointError, IncompatibleModelsError, NotFiniteError):
        if code == kind.code:
            return kind(message)
    return None


@contextmanager
def params_named(rename: Callable[[str | None], str | None]) -> Iterator[None]:
    """What is at fault inside is named as the caller's request has it: a field within another, or by another word.

    Args:
        rename: the caller's `param` for that of an error.
    """
    try:
        yield
    except ClientError as error:
        error.param = rename(error.param)
        raise


class CapacityError(CocktailError):
    """The same request may succeed later.

    Args:
        retry_after_s: seconds until a retry makes sense, 1 to 120.
    """

    retryable = True
    code = "unavailable"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float = 5.0
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = min(max(retry_after_s, 1.0), 120.0)


class ModelNotReadyError(CapacityError):
    """The engine or the cocktail is not ready yet: starting, restarting, still mixing."""

    code = "model_not_ready"


class QueueTimeoutError(CapacityError):
    """The request waited `queue_timeout_s` for its recipe's turn."""

    code = "queue_timeout"


class DrainedError(CapacityError):
    """A stream was ended because other recipes waited longer than `drain_s` for it to finish."""

    code = "drained"


class RateLimitError(CapacityError):
    """Over a tenant's limit on what it may do a minute or at once; waiting helps."""

    code = "rate_limit_exceeded"


class QuotaExceededError(CapacityError):
    """Over a tenant's limit on what is kept for it; waiting does not help, deleting does."""

    code = "rate_limit_exceeded"
    retryable = False

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code, retry_after_s=120.0)


class ServerError(CocktailError):
    """Nothing the caller can change; the server's log has the details."""


class EngineError(ServerError):
    """The engine failed or died while it held the request."""

    code = "engine_error"
    retryable = True


class EngineTimeoutError(ServerError):
    """The engine did not answer in time."""

    code = "engine_timeout"
    retryable = True


class StorageError(ServerError):
    """The store or the disk refused: full, read-only, gone. Nothing was changed, and it may be back in a while."""

    code = "storage_error"
    retryable = True
    retry_after_s: ClassVar[float] = 5.0
