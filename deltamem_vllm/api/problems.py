"""Our errors as HTTP answers, in the form that OpenAI's clients read."""

import json
from typing import Any, Final

from fastapi.responses import JSONResponse

from deltamem_vllm.errors import (
    BackboneError,
    BrokenOffError,
    ConflictError,
    DeltaMemError,
    MemoryRequestError,
    ModelNotFoundError,
    QueueFullError,
    QuotaError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
    SnapshotError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    TooLargeError,
    TurnMismatchError,
    UnauthorizedError,
)

STATUS: Final[tuple[tuple[type[DeltaMemError], int], ...]] = (
    (UnauthorizedError, 401),
    (ModelNotFoundError, 404),
    (MemoryRequestError, 400),
    (BackboneError, 400),
    (SessionNotFoundError, 404),
    (SessionExistsError, 409),
    (SessionBusyError, 409),
    (ConflictError, 409),
    (TooLargeError, 413),
    (SnapshotError, 422),
    (TurnMismatchError, 422),
    (QueueFullError, 429),
    (QuotaError, 429),
    (StoreFullError, 507),
    (StoreUnavailableError, 503),
    (StoreError, 500),
    (BrokenOffError, 503),
    (SessionError, 400),
)
"""First match counts; anything else is a 500."""

WORTH_A_RETRY: Final = (SessionBusyError, QueueFullError, StoreUnavailableError, BrokenOffError)
"""The same request may succeed a little later. Clients retry 409, 429 and 5xx by themselves, so
every other answer of these tells them not to."""

RETRY_AFTER_S: Final = 1


def status_of(error: DeltaMemError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def problem(error: DeltaMemError) -> dict[str, Any]:
    """The body of an error's answer."""
    return {
        "error": {
            "message": str(error),
            "type": type(error).__name__,
            "param": "memory",
            "code": status_of(error),
        }
    }


def problem_response(error: DeltaMemError) -> JSONResponse:
    """The answer to a request that ended in `error`."""
    status = status_of(error)
    headers = {}
    if isinstance(error, WORTH_A_RETRY):
        headers = {"retry-after": str(RETRY_AFTER_S)}
    elif status == 409 or status == 429 or status >= 500:
        headers = {"x-should-retry": "false"}
    return JSONResponse(problem(error), status_code=status, headers=headers)


def problem_event(error: DeltaMemError) -> str:
    """The event of a stream that ends in `error`."""
    return f"data: {json.dumps(problem(error))}\n\n"
